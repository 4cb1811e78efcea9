"""Decoupled times: every modality of every sample has its own.

Legend: B samples of a micro-batch, G samples of the global batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import LogitNormalTimes, Stage, UniformTimes
from megadiff.types import Batch

SMALLEST_TIME = 1e-5


class Times(NamedTuple):
    """Per modality times float32 [B] and whether the modality may be scored in the sample, bool [B]."""

    times: dict[str, Tensor]
    free: dict[str, Tensor]


def draw_times(stage: Stage, batch: Batch, seed: int) -> Times:
    """Draw the times of a micro-batch.

    One draw per sample decides whether one modality is only a condition there: clean at t = 0, or absent at t = 1. It is then
    not scored: a fixed time teaches nothing and would bias the loss over times. All other times follow the modality's
    distribution. Times are a function of (seed, data step, slot) or of the sample's key, so the same on any rank.
    """
    # Of the step, for numbers that are spread over its global batch.
    key = rng.sample_keys(seed, batch.data_step, device=batch.keys.device) if stage.antithetic_times else None
    role = _uniforms(batch, "role", key)
    times: dict[str, Tensor] = {}
    free: dict[str, Tensor] = {}
    below = 0.0
    for name, modality in stage.modalities.items():
        own = quantile(modality.times, _uniforms(batch, f"{name} time", key))
        clean = (role >= below) & (role < below + modality.conditioning.clean)
        below += modality.conditioning.clean
        absent = (role >= below) & (role < below + modality.conditioning.absent)
        below += modality.conditioning.absent
        times[name] = torch.where(clean, 0.0, torch.where(absent, 1.0, own))
        free[name] = ~(clean | absent)
    return Times(times, free)


def quantile(distribution: UniformTimes | LogitNormalTimes, uniforms: Tensor) -> Tensor:
    """Times from uniform numbers by the inverse distribution function: evenly spread numbers give evenly spread times.

    For logit_normal, numbers below the uniform share are spread over all times, the rest go through sigmoid(location + scale *
    normal quantile). Source: Esser et al., arXiv 2403.03206, section 3.1.
    """
    if isinstance(distribution, LogitNormalTimes):
        share = distribution.uniform_share
        rest = ((uniforms - share) / max(1 - share, 1e-9)).clamp(1e-6, 1 - 1e-6)
        logit_normal = torch.sigmoid(distribution.location + distribution.scale * torch.special.ndtri(rest.double())).float()
        uniforms = torch.where(uniforms < share, uniforms / max(share, 1e-9), logit_normal)
    return uniforms.clamp(SMALLEST_TIME, 1.0)


def _uniforms(batch: Batch, purpose: str, key: Tensor | None) -> Tensor:
    """Float32 [B]; with a key, int64 [1], spread evenly over the global batch."""
    if key is None:
        return rng.uniform(batch.keys, purpose)
    shift = rng.uniform(key, f"{purpose} shift", dtype=torch.float64)
    # No two float64 numbers are equal, so the order is the same on every device.
    places = rng.uniform(key, f"{purpose} order", (batch.global_samples,), dtype=torch.float64)[0].argsort()
    return ((shift + places[batch.slots].double() / batch.global_samples) % 1.0).float()
