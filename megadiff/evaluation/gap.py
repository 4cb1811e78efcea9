"""The conditioning gap: how much better a model explains a sample given its own condition than given another sample's.

Zero means that the condition is ignored. Noise and times are the same on both sides, so only the condition differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import Model
from megadiff.diffusion.conditional import exact_losses
from megadiff.types import Denoiser, Metric

RESAMPLES = 2000


@dataclass(frozen=True)
class Gap:
    """Mean over pairs of (loss given another sample's condition - loss given the right one), with a 95 % bootstrap interval.

    Attributes:
        right, wrong: mean losses, per element (grid) or nats per token.
    """

    target: str
    given: str
    pairs: int
    right: float
    wrong: float
    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0

    def metric(self, depends: Mapping[str, Any]) -> Metric:
        """The gap as a metric; `depends` says of which network and data."""
        own = {"pairs": self.pairs, "given": self.given}
        return Metric(f"conditioning gap/{self.target}", self.mean, self.low, self.high, {**depends, **own})

    def __str__(self) -> str:
        verdict = "the condition is used" if self.excludes_zero else "NOT above 0: the condition is not used"
        return (
            f"{self.target} given {self.given}: loss {self.right:.4f} with its own, {self.wrong:.4f} with another sample's; "
            f"gap {self.mean:.4f} [{self.low:.4f}, {self.high:.4f}] over {self.pairs} pairs: {verdict}"
        )


def conditioning_gap(
    denoiser: Denoiser, model: Model, states: Mapping[str, Tensor], *, target: str, seed: int, batch: int = 64, times: int = 8
) -> Gap:
    """The gap of `target` given all other modalities.

    Args:
        states: clean states [N, ...] of all modalities; sample i's wrong condition is sample (i + 1) mod N's.
        batch: samples of one call of the denoiser.
        times: stratified times per sample.
    """
    count = len(next(iter(states.values())))
    given = [name for name in states if name != target]
    keys = rng.sample_keys(seed, torch.arange(count), device=states[target].device)
    others = {name: state.roll(-1, 0) if name in given else state for name, state in states.items()}
    right, wrong = (
        exact_losses(denoiser, model, clean, keys, target=target, given=given, times=times, rows=batch).cpu()
        for clean in (states, others)
    )
    low, high = bootstrap_interval(wrong - right, seed)
    difference = (wrong - right).mean().item()
    return Gap(target, "+".join(given), count, right.mean().item(), wrong.mean().item(), difference, low, high)


def bootstrap_interval(values: Tensor, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` [N]."""
    keys = rng.sample_keys(seed, torch.arange(RESAMPLES))
    picks = (rng.uniform(keys, "bootstrap", (len(values),)) * len(values)).long()
    means = values.to(torch.float64)[picks].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
