"""Extents: whatever is cut out of a parameter, and however, is found again."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megadiff.weights.boxes import Box, Extent, overlaps, whole


def numbers_of(extent: Extent, values: np.ndarray) -> np.ndarray:
    """What an extent holds, by slicing: the definition."""
    boxes = [values] if extent.boxes is None else [values[tuple(slice(*side) for side in box)] for box in extent.boxes]
    return np.concatenate([part.reshape(-1) for part in boxes])[extent.start : extent.stop]


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    sides = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    return tuple((start, stop) for start, stop in sides)


@st.composite
def extents(draw: st.DrawFn, shape: tuple[int, ...], most: int = 3) -> Extent:
    cut = draw(st.none() | st.lists(boxes(shape), min_size=1, max_size=most).map(tuple))
    count = numbers_of(Extent(0, 10**9, cut), np.zeros(shape)).size
    start, stop = sorted(draw(st.tuples(st.integers(0, count), st.integers(0, count))))
    return Extent(start, stop, cut)


@given(st.data())
def test_runs_name_the_numbers_that_slicing_gives(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    values = np.arange(int(np.prod(shape))).reshape(shape)
    extent = data.draw(extents(shape))
    found = np.full(extent.size, -1)
    for begin, here, length in extent.runs(shape).tolist():
        found[here : here + length] = np.arange(begin, begin + length)
    assert found.tolist() == numbers_of(extent, values).tolist()


@given(st.data())
def test_runs_within_a_range_are_those_that_lie_there_cut_to_it(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    extent = data.draw(extents(shape))
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, int(np.prod(shape)))] * 2)))
    cut = [
        (max(begin, low), here + max(low - begin, 0), min(begin + length, high) - max(begin, low))
        for begin, here, length in extent.runs(shape).tolist()
        if begin < high and begin + length > low
    ]
    assert sorted(map(tuple, extent.runs(shape, (low, high)).tolist())) == sorted(run for run in cut if run[2] > 0)
    first, last = extent.span(shape)
    assert all(first <= begin and begin + length <= last for begin, _, length in extent.runs(shape).tolist())


@given(st.data())
def test_overlaps_are_what_both_hold(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    values = np.arange(int(np.prod(shape))).reshape(shape)
    # Boxes of one extent do not share numbers where they come from a split of a parameter.
    one, other = (data.draw(extents(shape, most=1)) for _ in range(2))
    left, right = numbers_of(one, values), numbers_of(other, values)
    shared = []
    for here, there, length in overlaps(one, other, shape):
        assert left[here : here + length].tolist() == right[there : there + length].tolist()
        shared += left[here : here + length].tolist()
    assert sorted(shared) == sorted(set(left) & set(right))


def test_a_row_shard_is_one_run_and_a_column_shard_one_a_row() -> None:
    rows, columns = Extent(0, 6, (((2, 4), (0, 3)),)), Extent(0, 4, (((0, 4), (1, 2)),))
    assert rows.runs((4, 3)).tolist() == [[6, 0, 6]]
    assert columns.runs((4, 3)).tolist() == [[1, 0, 1], [4, 1, 1], [7, 2, 1], [10, 3, 1]]
    assert whole((4, 3)).runs((4, 3)).tolist() == [[0, 0, 12]]


def test_a_range_of_a_box_with_a_billion_runs_is_found_without_the_others() -> None:
    shape, box = (2**30, 4), ((0, 2**30), (1, 3))
    half = Extent(0, 2**31, (box,))
    assert half.runs(shape, (4 * 10**8, 4 * 10**8 + 6)).tolist() == [
        [4 * 10**8 + 1, 2 * 10**8, 2],
        [4 * 10**8 + 5, 2 * 10**8 + 2, 1],
    ]
    assert list(overlaps(half, Extent(4 * 10**8, 4 * 10**8 + 6), shape)) == [(2 * 10**8, 1, 2), (2 * 10**8 + 2, 5, 1)]
