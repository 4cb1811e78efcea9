"""Headers of NumPy's format, and arrays that many threads read."""

from __future__ import annotations

import ast
import gc
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megadiff.data import npy

COUNT = 1500
ARRAYS = [
    np.zeros((), "<f4"),
    np.zeros(3, "<i4"),
    np.zeros((1, 1, 2), "<f2"),
    np.zeros((0, 5), ">i8"),
    np.zeros((2, 3), "|u1"),
    np.zeros(4, "?"),
    np.zeros(2, "<U5"),
    np.zeros(2, [("a", "<f4"), ("b", "<i2", (3,))]),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_a_header_says_what_numpy_reads(array: np.ndarray) -> None:
    data = npy.dump(array)
    assert npy.header_of(data[: npy.header_length(data)]) == (array.dtype, array.shape)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"", "EOF"),
        (lambda data: b"\x93NUMPY", "EOF"),
        (lambda data: data[:40], "EOF"),
        (lambda data: data.replace(b"<f4", b"<q9"), "valid dtype"),
        (lambda data: data.replace(b"<f4", b"<f9"), "valid dtype"),
        (lambda data: data.replace(b"(2, 3)", b"(2 3)!"), "parse header"),
        (lambda data: data.replace(b"False", b"True "), "by columns"),
        (lambda data: data.replace(b"NUMPY\x01", b"NUMPY\x02"), "not 1.0"),
        (lambda data: data.replace(b"'<f4'", b"'|O' "), "objects"),
    ],
)
def test_what_is_no_header_is_a_value_error(damage: Callable[[bytes], bytes], words: str) -> None:
    damaged = damage(npy.dump(np.zeros((2, 3), "<f4")))
    with pytest.raises(ValueError, match=words):
        npy.header_of(damaged[: npy.header_length(damaged)])


def test_plain_headers_need_no_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ast, "parse", lambda *args, **kwargs: pytest.fail("ast.parse is not for threads"))
    data = npy.dump(np.zeros((7, 11, 13), "<f4"))
    assert npy.header_of(data[: npy.header_length(data)])[1] == (7, 11, 13)


def test_one_thread_at_a_time_is_in_numpys_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", np.arange(3))
    parse, alone = ast.parse, []
    monkeypatch.setattr(ast, "parse", lambda *args, **kwargs: alone.append(npy._parsing.locked()) or parse(*args, **kwargs))
    npy.load(tmp_path / "a.npy")
    data = npy.dump(np.zeros(1, [("b", "<f4")]))
    npy.header_of(data[: npy.header_length(data)])
    assert alone == [True, True]


class Circle:
    """What the collector finds, in the middle of a parse, and lets another thread run for."""

    itself: Circle

    def __del__(self) -> None:
        time.sleep(0)


def test_threads_read_unlike_headers_at_once(tmp_path: Path) -> None:
    """Without the lock Python 3.11 fails in most runs of this."""
    path = tmp_path / "a.npy"
    np.save(path, np.arange(3))

    def read(number: int) -> int:
        data = npy.dump(np.zeros(1, [("a", "<f4", (number + 1,))]))
        circle = Circle()
        circle.itself = circle
        dtype, _ = npy.header_of(data[: npy.header_length(data)])
        return dtype.itemsize + len(npy.load(path))

    switch, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(5)
    try:
        with ThreadPoolExecutor(4) as pool:
            sizes = list(pool.map(read, range(COUNT)))
    finally:
        sys.setswitchinterval(switch)
        gc.set_threshold(*threshold)
    assert sizes == [4 * (number + 1) + 3 for number in range(COUNT)]
