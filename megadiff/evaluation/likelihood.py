"""How well a network explains held-out pairs: the NELBO of tokens, the error of grids, and what the condition is worth.

Legend: N pairs, K times of each, P pairs of one piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import Model, TokenSpace
from megadiff.diffusion.conditional import stratum_losses
from megadiff.evaluation.gap import bootstrap_interval
from megadiff.evaluation.pieces import Piece, Pieces, key_of
from megadiff.types import Denoiser, Metric
from megadiff.weights.loading import Loaded

LIKELIHOOD = "likelihood"
SEED, TIMES, QUARTERS = 0, 16, 4
PER_PIECE = 64
SPANS = ("", *(f" t {quarter / QUARTERS:.2f}-{(quarter + 1) / QUARTERS:.2f}" for quarter in range(QUARTERS)))
"""What the names of metrics over all times, and over each quarter of them, end in."""


def likelihood_metrics(
    loaded: Loaded, states: Mapping[str, Tensor], pieces: Pieces, depends: Mapping[str, Any], *, rows: int
) -> list[Metric]:
    """For every predicted modality, its loss with all others given, and absent; and the conditioning gap, over all times and by
    quarter of them. Empty on ranks other than 0.

    The loss of tokens is the NELBO in nats per token, that of grids the mean squared error of the network's target
    (`diffusion.conditional`). The gap is (loss given the next pair's condition - loss given its own), times and noise the same.

    Args:
        states: clean states [N, ...] of all modalities, N >= 2.
        depends: of which weights and pairs.
        rows: of one call of the network.
    """
    count = len(next(iter(states.values())))
    metrics = []
    for target in loaded.predicted:
        facts = {**depends, "pairs": count, "seed": SEED, "times": TIMES}
        starts = range(0, count, PER_PIECE)
        keys = [key_of({**facts, "target": target, "start": start}) for start in starts]
        found = pieces.gather(keys, partial(_losses, loaded, states, target, rows))
        if found is not None:
            sides = {side: torch.from_numpy(np.concatenate([piece[side] for piece in found], axis=1)) for side in found[0]}
            metrics += metrics_of(loaded.model, target, sides, facts)
    return metrics


def _losses(loaded: Loaded, states: Mapping[str, Tensor], target: str, rows: int, number: int) -> Piece:
    own = torch.arange(number * PER_PIECE, min((number + 1) * PER_PIECE, len(states[target])))
    with torch.no_grad():
        losses = pair_losses(loaded.module, loaded.model, states, own, loaded.module.device, target=target, rows=rows)
    return {side: values.numpy() for side, values in losses.items()}


def pair_losses(
    denoiser: Denoiser,
    model: Model,
    states: Mapping[str, Tensor],
    own: Tensor,
    device: torch.device,
    *,
    target: str,
    rows: int,
) -> dict[str, Tensor]:
    """The losses of some pairs by side (`own`: its condition given, `other`: the next pair's, `absent`), float64 [K, P].

    Args:
        states: of all pairs, [N, ...].
        own: int64 [P], which ones.
        rows: of one call of the denoiser.
    """
    count = len(states[target])
    given = [name for name in states if name != target]
    keys = rng.sample_keys(SEED, own).to(device)
    losses = {}
    for side, condition in (("own", own), ("other", (own + 1) % count), ("absent", None)):
        if not given and condition is not None:
            continue
        clean = {
            name: state[own if name == target or condition is None else condition].to(device) for name, state in states.items()
        }
        others = given if condition is not None else []
        found = stratum_losses(denoiser, model, clean, keys, target=target, given=others, times=TIMES, rows=rows)
        losses[side] = found.cpu()
    return losses


def names_of(model: Model, target: str) -> dict[str, str]:
    """By side the names of a target's metrics over all times; `gap` beside the sides, if anything is given."""
    what = "NELBO" if isinstance(model.modalities[target].space, TokenSpace) else "error"
    names = {"absent": f"{what} {target}/absent"}
    if len(model.modalities) > 1:
        names |= {"own": f"{what} {target}/given", "gap": f"likelihood gap/{target}"}
    return names


def metrics_of(model: Model, target: str, sides: Mapping[str, Tensor], depends: Mapping[str, Any]) -> list[Metric]:
    """Metrics of the losses [K, N] of `pair_losses`, over all times and by quarter of them."""
    width = TIMES // QUARTERS
    parts = (slice(None), *(slice(start, start + width) for start in range(0, TIMES, width)))
    values = dict(sides)
    if "own" in sides:
        values["gap"] = sides["other"] - sides["own"]
    metrics = []
    for side, name in names_of(model, target).items():
        for span, strata in zip(SPANS, parts, strict=True):
            mean = values[side][strata].mean(0)
            low, high = bootstrap_interval(mean, SEED)
            metrics.append(Metric(f"{name}{span}", mean.mean().item(), low, high, depends))
    return metrics
