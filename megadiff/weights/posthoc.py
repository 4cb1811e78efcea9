"""An average of any length after training, from the averages in checkpoints.

Power-function profiles of several lengths at several steps nearly span the profile of a length that was not tracked. Least
squares of the profiles give the coefficients of the weights. Source: Karras et al., "Analyzing and Improving the Training
Dynamics of Diffusion Models", CVPR 2024, section 3.2 and algorithm 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from megadiff.config.run_folder import CheckpointsFolder
from megadiff.config.schema import ConstantEma, EmaProfile, PowerEma
from megadiff.weights.checkpoint import CheckpointError, CheckpointReader


@cache
def power_exponent(length: float) -> float:
    """The gamma whose power-function profile has relative standard deviation `length`.

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024, eq. 126 and
    algorithm 2: gamma is the largest real root of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2) with s = length.
    """
    inverse_square = length**-2.0
    return float(np.roots([1, 7, 16 - inverse_square, 12 - inverse_square]).real.max())


def decay(profile: EmaProfile, update: int) -> float:
    """The factor on the average at update number `update` (1 is the first)."""
    if isinstance(profile, ConstantEma):
        return min(profile.decay, update / (9 + update)) if profile.warmup else profile.decay
    return float((1 - 1 / update) ** (power_exponent(profile.length) + 1))


@dataclass(frozen=True)
class Profile:
    """A power-function average: t^gamma over the first `updates` updates, up to a factor that makes its integral 1."""

    updates: int
    exponent: float


@dataclass(frozen=True)
class Combination:
    """A profile as a sum of others.

    Attributes:
        coefficients: one per snapshot.
        error: |profile - sum| / |profile|, as functions of the step.
    """

    coefficients: tuple[float, ...]
    error: float


def inner_product(one: Profile, other: Profile) -> float:
    """The integral of the product of two profiles."""
    early, late = sorted((one, other), key=lambda profile: profile.updates)
    ratio = float((early.updates / late.updates) ** late.exponent)
    sizes = (early.exponent + 1) * (late.exponent + 1) / (early.exponent + late.exponent + 1)
    return sizes * ratio / late.updates


def combine(snapshots: Sequence[Profile], wanted: Profile) -> Combination:
    """The least-squares coefficients of `wanted` in terms of the snapshots' profiles."""
    gram = np.array([[inner_product(one, other) for other in snapshots] for one in snapshots])
    sides = np.array([inner_product(one, wanted) for one in snapshots])
    scale = 1 / np.sqrt(gram.diagonal())  # profiles of equal norm, since the system is ill-conditioned
    coefficients = scale * np.linalg.lstsq(gram * scale * scale[:, None], sides * scale, rcond=1e-12)[0]
    rest = inner_product(wanted, wanted) - 2 * coefficients @ sides + coefficients @ gram @ coefficients
    return Combination(tuple(coefficients.tolist()), math.sqrt(max(rest, 0.0) / inner_product(wanted, wanted)))


@dataclass(frozen=True)
class TrackedAverage:
    """One average in one checkpoint."""

    reader: CheckpointReader
    kind: str
    profile: Profile


def tracked_averages(checkpoints: CheckpointsFolder, profiles: Mapping[str, EmaProfile]) -> list[TrackedAverage]:
    """Every power-function average of a stage's checkpoints, oldest first.

    Raises:
        CheckpointError: there is none.
    """
    power = {name: power_exponent(profile.length) for name, profile in profiles.items() if isinstance(profile, PowerEma)}
    readers = [CheckpointReader(folder) for folder in checkpoints.published().values()]
    averages = [
        TrackedAverage(reader, f"ema.{name}", Profile(reader.manifest.progress["ema_updates"], exponent))
        for reader in readers
        for name, exponent in power.items()
        if name in reader.manifest.ema and reader.manifest.progress["ema_updates"]
    ]
    if not averages:
        raise CheckpointError(
            f"{checkpoints.root} holds no average that can be reconstructed from: give the stage profiles of kind power "
            "(ema: {short: {kind: power, length: 0.05}, long: {kind: power, length: 0.1}}) and keep checkpoints "
            "(checkpoint.keep_every_steps)"
        )
    return averages


def reconstruct(snapshots: Sequence[TrackedAverage], coefficients: Sequence[float], name: str) -> Tensor:
    """One parameter's average, float32, whole."""
    newest = snapshots[-1].reader
    if not newest.manifest.parameters[name][1]:
        return newest.read_whole("weight", name)
    parts = zip(snapshots, coefficients, strict=True)
    return torch.stack([c * s.reader.read_whole(s.kind, name).double() for s, c in parts]).sum(0).float()
