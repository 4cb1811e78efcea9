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
from megadiff.config.schema import TokenSpace
from megadiff.diffusion.conditional import stratum_losses
from megadiff.evaluation.gap import bootstrap_interval
from megadiff.evaluation.pieces import Piece, Pieces, key_of
from megadiff.types import Metric
from megadiff.weights.loading import Loaded

SEED, TIMES, QUARTERS = 0, 16, 4
PER_PIECE = 64


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
            metrics += _metrics(target, isinstance(loaded.model.modalities[target].space, TokenSpace), sides, facts)
    return metrics


def _losses(loaded: Loaded, states: Mapping[str, Tensor], target: str, rows: int, number: int) -> Piece:
    """By side (own, other, absent), float64 [K, P]."""
    count = len(states[target])
    own = torch.arange(number * PER_PIECE, min((number + 1) * PER_PIECE, count))
    device = next(loaded.module.parameters()).device
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
        with torch.no_grad():
            found = stratum_losses(
                loaded.module, loaded.model, clean, keys, target=target, given=others, times=TIMES, rows=rows
            )
        losses[side] = found.cpu().numpy()
    return losses


def _metrics(target: str, tokens: bool, sides: Mapping[str, Tensor], depends: Mapping[str, Any]) -> list[Metric]:
    """Metrics of losses [K, N] by side."""
    what = "NELBO" if tokens else "error"
    spans = {"": slice(None)}
    for quarter in range(QUARTERS):
        width = TIMES // QUARTERS
        spans[f" t {quarter / QUARTERS:.2f}-{(quarter + 1) / QUARTERS:.2f}"] = slice(quarter * width, (quarter + 1) * width)
    values = {
        f"{what} {target}/{'given' if side == 'own' else side}": sides[side] for side in ("own", "absent") if side in sides
    }
    if "own" in sides:
        values[f"conditioning gap/{target}"] = sides["other"] - sides["own"]
    metrics = []
    for name, losses in values.items():
        for span, strata in spans.items():
            mean = losses[strata].mean(0)
            low, high = bootstrap_interval(mean, SEED)
            metrics.append(Metric(f"{name}{span}", mean.mean().item(), low, high, depends))
    return metrics
