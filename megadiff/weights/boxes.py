"""The part of a parameter that a flat tensor holds, for any way of splitting it.

Tensor parallelism cuts a parameter into boxes (a fused query-key-value map into three per rank), ZeRO cuts a rank's boxes into
flat ranges. An extent describes both: a range of boxes laid end to end.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Box = tuple[tuple[int, int], ...]
"""[start, stop) in every dimension."""
_AT_A_TIME = 1 << 16
"""Runs that are Python objects at a time."""


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

    def runs(self, shape: Sequence[int], within: tuple[int, int] | None = None) -> NDArray[np.int64]:
        """[n, 3]: each run of numbers' start in the parameter (C order), its start in this extent, and its length.

        Args:
            shape: the whole parameter's.
            within: [start, stop) of the parameter; what lies outside is left out, and costs neither time nor memory.
        """
        low, high = within or (0, math.prod(shape))
        laid, parts = 0, [np.empty((0, 3), np.int64)]
        for box in self.boxes or (tuple((0, size) for size in shape),):
            begins, inside, length = _runs_of(box, shape, low, high)
            shift = begins - laid - inside  # from a place in the boxes to the place in the parameter
            first = np.maximum(np.maximum(begins, low), self.start + shift)
            last = np.minimum(np.minimum(begins + length, high), self.stop + shift)
            parts.append(np.stack([first, first - shift - self.start, last - first], 1)[last > first])
            laid += math.prod(stop - start for start, stop in box)
        return np.concatenate(parts)

    def span(self, shape: Sequence[int]) -> tuple[int, int]:
        """A range [start, stop) of the parameter (C order) that contains all the numbers."""
        if self.boxes is None:
            return self.start, self.stop
        strides = _strides(shape)
        corners = [
            sum(place * stride for place, stride in zip(corner, strides, strict=True))
            for box in self.boxes
            if all(start < stop for start, stop in box)
            for corner in ([start for start, _ in box], [stop - 1 for _, stop in box])
        ]
        return min(corners, default=0), max(corners, default=-1) + 1


def whole(shape: Sequence[int]) -> Extent:
    """All numbers of a parameter."""
    return Extent(0, math.prod(shape))


def overlaps(one: Extent, other: Extent, shape: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(start in one, start in the other, length) of each run of numbers in both."""
    left, right = one.runs(shape, other.span(shape)), other.runs(shape, one.span(shape))
    left, right = (runs[runs[:, 0].argsort()] for runs in (left, right))
    # Between two neighbouring edges, all numbers are in the same runs.
    edges = np.unique(np.concatenate([left[:, 0], left[:, 0] + left[:, 2], right[:, 0], right[:, 0] + right[:, 2]]))
    for first in range(0, len(edges) - 1, _AT_A_TIME):
        low, high = edges[first : first + _AT_A_TIME + 1][:-1], edges[first + 1 : first + 1 + _AT_A_TIME]
        here, in_one = _places(left, low)
        there, in_other = _places(right, low)
        yield from map(tuple, np.stack([here, there, high - low], 1)[in_one & in_other].tolist())


def _places(runs: NDArray[np.int64], numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where numbers of the parameter are in an extent with these runs, which are sorted, and whether they are in it."""
    if not len(runs):
        return np.zeros_like(numbers), np.zeros(len(numbers), np.bool_)
    run = runs[np.maximum(np.searchsorted(runs[:, 0], numbers, "right") - 1, 0)]
    offset = numbers - run[:, 0]
    return run[:, 1] + offset, (offset >= 0) & (offset < run[:, 2])


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]


def _runs_of(box: Box, shape: Sequence[int], low: int, high: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Of a box's runs that reach into [low, high) of the parameter: starts there, starts in the box, and the common length."""
    sizes = [stop - start for start, stop in box]
    cut = len(shape)  # every dimension from here on is whole
    while cut and sizes[cut - 1] == shape[cut - 1]:
        cut -= 1
    outer = max(cut - 1, 0)
    strides = _strides(shape)
    corner = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    count, length = math.prod(sizes[:outer]), math.prod(sizes[outer:])
    if not count * length:
        return np.empty(0, np.int64), np.empty(0, np.int64), 0

    def begins(runs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the runs with these numbers begin; the numbers' order is that of the places."""
        places = np.unravel_index(runs, (1, *sizes[:outer]))[1:]
        return corner + sum((place * stride for place, stride in zip(places, strides)), np.zeros_like(runs))

    def begin(run: int) -> int:
        return int(begins(np.array([run]))[0])

    first = bisect_right(range(count), low, key=lambda run: begin(run) + length)
    runs = np.arange(first, bisect_left(range(count), high, key=begin))
    return begins(runs), length * runs, length
