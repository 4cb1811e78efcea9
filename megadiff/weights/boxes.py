"""The part of a parameter that a flat tensor holds, for any way of splitting it.

Tensor parallelism cuts a parameter into boxes (a fused query-key-value map into three per rank), ZeRO cuts a rank's boxes into
flat ranges. An extent describes both: a range of boxes laid end to end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Box = tuple[tuple[int, int], ...]
"""[start, stop) in every dimension."""


@dataclass(frozen=True)
class Extent:
    """The numbers [start, stop) of `boxes` laid end to end, each in C order.

    Attributes:
        boxes: None is the whole parameter as one box.
    """

    start: int
    stop: int
    boxes: tuple[Box, ...] | None = None

    @property
    def size(self) -> int:
        return self.stop - self.start

    def runs(self, shape: Sequence[int]) -> NDArray[np.int64]:
        """[n, 3]: each run of numbers' start in the parameter (C order), its start in this extent, and its length.

        Args:
            shape: the whole parameter's.
        """
        if self.boxes is None:
            return np.array([[self.start, 0, self.size]])
        whole, parts = 0, []
        for box in self.boxes:
            firsts, length = _runs_of(box, shape)
            inside = whole + length * np.arange(len(firsts))
            whole += length * len(firsts)
            low, high = np.maximum(inside, self.start), np.minimum(inside + length, self.stop)
            inner = np.stack([firsts + low - inside, low - self.start, high - low], 1)
            parts.append(inner[high > low])
        return np.concatenate(parts) if parts else np.empty((0, 3), np.int64)


def whole(shape: Sequence[int]) -> Extent:
    """All numbers of a parameter."""
    return Extent(0, math.prod(shape))


def overlaps(one: Extent, other: Extent, shape: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(start in one, start in the other, length) of each run of numbers in both."""
    left, right = (runs[runs[:, 0].argsort()].tolist() for runs in (one.runs(shape), other.runs(shape)))
    i = j = 0
    while i < len(left) and j < len(right):
        (begin, here, length), (other_begin, there, other_length) = left[i], right[j]
        low, high = max(begin, other_begin), min(begin + length, other_begin + other_length)
        if low < high:
            yield here + low - begin, there + low - other_begin, high - low
        if begin + length <= other_begin + other_length:
            i += 1
        else:
            j += 1


def _runs_of(box: Box, shape: Sequence[int]) -> tuple[NDArray[np.int64], int]:
    """The starts of a box's runs in the parameter, in the box's order, and their common length."""
    sizes = [stop - start for start, stop in box]
    cut = len(shape)  # every dimension from here on is whole
    while cut and sizes[cut - 1] == shape[cut - 1]:
        cut -= 1
    outer = max(cut - 1, 0)
    length = math.prod(sizes[outer:])
    strides = [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]
    first = sum(start * stride for (start, _), stride in zip(box[outer:], strides[outer:], strict=True))
    firsts = np.full((1,), first, np.int64)
    for dimension in range(outer):
        start, stop = box[dimension]
        firsts = (firsts[:, None] + strides[dimension] * np.arange(start, stop)).reshape(-1)
    return (firsts if length else firsts[:0]), length
