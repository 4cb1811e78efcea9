"""Arrays in NumPy's file format, read by many threads at once.

Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import io
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Header = tuple[np.dtype[Any], tuple[int, ...]]

SHORTEST_HEADER = 64
_PLAIN = re.compile(
    rb"\{'descr': '([<>|](?:[iu][1248]|f[248]|c8|c16|b1))', 'fortran_order': False, "
    rb"'shape': \(((?:\d+, ?)*(?:\d+)?)\), \} *\n"
)
_headers: dict[bytes, Header] = {}
"""Parsed headers by their bytes: the samples of a data set have few different ones."""
_parsing = threading.Lock()
"""Held while NumPy parses a header: it calls `ast.parse`, whose counter of depth Python 3.11 and 3.12 keep once for all
threads, so that two threads in it at once may raise SystemError (AST constructor recursion depth mismatch)."""


def header_length(data: bytes | memoryview) -> int:
    """Number of bytes before the array's numbers."""
    return 10 + int.from_bytes(data[8:10], "little")


def known_header(header: bytes) -> Header | None:
    """The result of an earlier `header_of` of these bytes; None without one."""
    return _headers.get(header)


def header_of(header: bytes) -> Header:
    """Type and shape of an array stored by rows, from the bytes before its numbers.

    Raises ValueError if its version is not 1.0, or it is damaged, stored by columns, or holds objects.
    """
    parsed = _headers.get(header)
    if parsed is None:
        parsed = _headers[header] = _parsed(header)
    return parsed


def _parsed(header: bytes) -> Header:
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("its format is not 1.0")
    plain = _PLAIN.fullmatch(header, 10)
    if plain:
        return np.dtype(plain[1].decode()), tuple(int(size) for size in plain[2].split(b",") if size.strip())
    with _parsing:
        try:
            shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        except (EOFError, SyntaxError) as error:
            raise ValueError(str(error)) from None
    if by_columns or dtype.hasobject:
        raise ValueError("it is stored by columns or holds objects")
    return dtype, shape


def load(path: Path) -> NDArray[Any]:
    """The array in a file. Raises ValueError if it holds none, OSError if it cannot be read."""
    file = io.BytesIO(path.read_bytes())
    with _parsing:
        try:
            array: NDArray[Any] = np.load(file, allow_pickle=False)
        except (EOFError, SyntaxError) as error:
            raise ValueError(str(error)) from None
    return array


def dump(array: NDArray[Any]) -> bytes:
    """The bytes of an array's file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
