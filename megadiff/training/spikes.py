"""Finds losses that rise and stay."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

from megadiff.config.schema import Spikes

SPREAD = 1.4826
"""The standard deviation of normal numbers, in median absolute deviations."""
LEAST_SPREAD = 0.01
"""A standard deviation below this share of the median is taken for it."""


@dataclass(frozen=True)
class Spike:
    """Steps whose losses are all too large.

    Attributes:
        step: the first of them.
        data_steps: of the first and the last.
        loss: of the last.
        bound: what it exceeds.
    """

    step: int
    data_steps: tuple[int, int]
    loss: float
    bound: float


class SpikeWatch:
    """Looks at every step's loss. All inputs are equal on all ranks, so all ranks decide alike."""

    def __init__(self, rule: Spikes) -> None:
        self.rule = rule
        self._usual: deque[float] = deque(maxlen=rule.window)
        self._above: list[tuple[int, int]] = []

    def look(self, loss: float, step: int, data_step: int) -> Spike | None:
        """The spike that this step completes."""
        bound = self._bound()
        if not loss > bound:
            if math.isfinite(loss):
                self._usual.append(loss)
            self._above.clear()
            return None
        self._above.append((step, data_step))
        if len(self._above) < self.rule.steps:
            return None
        (first, began), (_, ended) = self._above[0], self._above[-1]
        self._above.clear()
        return Spike(first, (began, ended), loss, bound)

    def _bound(self) -> float:
        if len(self._usual) < self.rule.window:
            return math.inf
        middle = median(self._usual)
        spread = SPREAD * median(abs(loss - middle) for loss in self._usual)
        return middle + self.rule.deviations * max(spread, LEAST_SPREAD * abs(middle))
