"""The cut of a model's layers into pipeline stages. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from megadiff.config.derived import layer_flops
from megadiff.config.errors import ConfigError
from megadiff.config.schema import Model, Stage


def partition(model: Model, stage: Stage, stages: int) -> list[int]:
    """Where `stages` pipeline stages begin and the last one ends, in `MMDiT.layers()`: stages + 1 numbers from 0.

    The slowest stage sets the pace, so its FLOPs in training are as few as whole layers allow.

    Raises:
        ConfigError: there are more stages than layers.
    """
    costs = layer_flops(model, stage)
    if stages > len(costs):
        raise ConfigError(
            f"stage {stage.name} has {len(costs)} layers (embeddings, blocks, heads) for {stages} pipeline stages; "
            f"use at most {len(costs)}"
        )
    return cut(costs, stages)


def cut(costs: Sequence[float], stages: int) -> list[int]:
    """The bounds of `stages` runs of at least one item each, of which the costliest is as cheap as can be.

    Args:
        costs: at least `stages`, 0 or more each.
    """
    count, total = len(costs), [0.0, *accumulate(costs)]
    # best[i]: the cheapest costliest run of the first i items in as many runs as done so far, and where the last one begins.
    best: list[tuple[float, int]] = [(total[i], 0) for i in range(count + 1)]
    begins = [best]
    for runs in range(2, stages + 1):
        best = [
            min((max(best[j][0], total[i] - total[j]), j) for j in range(runs - 1, i)) if i >= runs else (float("inf"), 0)
            for i in range(count + 1)
        ]
        begins.append(best)
    bounds = [count]
    for table in reversed(begins):
        bounds.append(table[bounds[-1]][1])
    return bounds[::-1]
