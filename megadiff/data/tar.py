"""Where the members of a tar lie, found many times faster than by tarfile, which makes an object of every header.

Source: POSIX.1-1988 (ustar) and POSIX.1-2001 (pax) as `pax` describes them, GNU's long names and base-256 numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 512
_END = bytes(BLOCK_BYTES)
_FILES = (0, ord("0"), ord("7"))
_LONG_NAME, _PAX = ord("L"), ord("x")
_CHECKSUM = slice(148, 156)
_MAGIC, _MAGIC_AT = int.from_bytes(b"usta", "little"), 257


class Member(NamedTuple):
    """A regular file within a tar: its name, where its content begins, and its size in bytes."""

    name: str
    start: int
    size: int


def index(data: memoryview) -> list[Member]:
    """The regular files of a whole tar in memory. Raises ValueError as `members_of`."""
    found = _index_of_plain(data)
    return list(members_of(lambda start, size: data[start : start + size].tobytes())) if found is None else found


def _index_of_plain(data: memoryview) -> list[Member] | None:
    """All headers at once, where they are regular files with short names and octal numbers; None where anything differs.

    Headers are the blocks that hold the magic word, if each one's size leads to the next: a block of content that happens to
    hold it as well breaks that chain.
    """
    if len(data) % BLOCK_BYTES or len(data) < 2 * BLOCK_BYTES:
        return None
    blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, BLOCK_BYTES)
    words = np.ndarray(len(blocks), dtype="<u4", buffer=data, offset=_MAGIC_AT, strides=(BLOCK_BYTES,))
    places = np.flatnonzero(words == _MAGIC)
    headers = blocks[places]
    sizes, sums = _octals(headers[:, 124:135]), _octals(headers[:, 148:154])
    if not len(places) or sizes is None or sums is None:
        return None
    plain = np.isin(headers[:, 156], _FILES).all() and not headers[:, 345].any() and not headers[:, 99].any()
    follows = places + 1 + (sizes + BLOCK_BYTES - 1) // BLOCK_BYTES
    chained = places[0] == 0 and (follows[:-1] == places[1:]).all() and follows[-1] < len(blocks)
    if not plain or not chained or blocks[follows[-1]].any() or (_sums(headers) != sums).any():
        return None
    names = np.ascontiguousarray(headers[:, :100]).view("S100")[:, 0].tolist()
    starts = ((places + 1) * BLOCK_BYTES).tolist()
    try:
        return [Member(name.decode(), start, size) for name, start, size in zip(names, starts, sizes.tolist(), strict=True)]
    except UnicodeDecodeError:
        return None


def _octals(fields: NDArray[np.uint8]) -> NDArray[np.int64] | None:
    """Fields of octal digits, [N, digits], as numbers; None if there is anything else in one."""
    digits = fields.astype(np.int64) - ord("0")
    if ((digits < 0) | (digits > 7)).any():
        return None
    numbers: NDArray[np.int64] = digits @ (8 ** np.arange(fields.shape[1] - 1, -1, -1, dtype=np.int64))
    return numbers


def members_of(read: Callable[[int, int], bytes]) -> Iterator[Member]:
    """The regular files of a whole tar, through `read(offset, size)`; folders, links and the like are passed over.

    Raises:
        ValueError: it is no tar, is cut, or a header is damaged. After the last member, so take them all.
    """
    headers: list[bytes] = []
    position, long_name = 0, ""
    pax: dict[str, str] = {}
    while True:
        header = bytes(read(position, BLOCK_BYTES))
        if len(header) < BLOCK_BYTES:
            raise ValueError("unexpected end of data")
        if header == _END:
            break
        headers.append(header)
        size, kind, start = _number(header[124:136]), header[156], position + BLOCK_BYTES
        if kind == _LONG_NAME:
            long_name = bytes(read(start, size)).partition(b"\0")[0].decode("utf-8", "surrogateescape")
        elif kind == _PAX:
            pax = _pax_records(bytes(read(start, size)))
        else:  # what such headers say is of this one alone, whatever it is
            size = int(pax.get("size", size))
            if kind in _FILES:
                yield Member(pax.get("path") or long_name or _name(header), start, size)
            long_name, pax = "", {}
        if size < 0:
            raise ValueError(f"the header of {_name(header)!r} gives a size below 0")
        position = start + (size + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
    _check(headers)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """Octal digits, or, where those do not suffice, a first byte of 128 and a big-endian number."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    return int(digits, 8) if digits else 0


def _pax_records(data: bytes) -> dict[str, str]:
    """Lines `LENGTH KEY=VALUE`, where a value may hold anything."""
    records = {}
    while data.strip(b"\0"):
        length = int(data.partition(b" ")[0])
        if not 0 < length <= len(data):
            raise ValueError("a damaged pax header")
        key, _, value = data[:length].partition(b" ")[2].partition(b"=")
        records[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        data = data[length:]
    return records


def _check(headers: list[bytes]) -> None:
    """Compare each header's bytes, summed with blanks for the sum itself, with the sum that it holds."""
    bytes_of = np.frombuffer(b"".join(headers), dtype=np.uint8).reshape(-1, BLOCK_BYTES)
    sums = _sums(bytes_of)
    said = [_number(header[_CHECKSUM]) for header in headers]
    wrong = np.flatnonzero(sums != np.array(said, dtype=np.int64))
    if len(wrong):
        raise ValueError(f"the header of {_name(headers[int(wrong[0])])!r} does not agree with its checksum")


def _sums(headers: NDArray[np.uint8]) -> NDArray[np.int64]:
    total = headers.sum(axis=1, dtype=np.int64) - headers[:, _CHECKSUM].sum(axis=1, dtype=np.int64)
    return np.asarray(total + 8 * ord(" "))
