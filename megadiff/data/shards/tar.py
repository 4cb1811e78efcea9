"""Where the members of a tar lie; many times faster than tarfile, which makes an object of every header.

Source: POSIX.1-1988 (ustar) and POSIX.1-2001 (pax) as `pax` describes them, GNU's long names and base-256 numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 512
_END = bytes(BLOCK_BYTES)
_PLAIN = (ord("0"), ord("7"))
_FILES, _HARD_LINK, _SPARSE, _PART = b"\x0007", b"1", b"S", b"M"
_WITHOUT_DATA, _NO_MEMBERS = b"123456V", b"DAI"
"""Links, devices, folders and a volume's label; folders' listings, access lists and inodes."""
_FOLDER = b"5"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_OF_ALL = b"L", b"K", b"xX", b"g"
_PAX_OF_SPARSE, _PAX_OF_PART = ("GNU.sparse.", "SCHILY.realsize"), "GNU.volume.offset"
_CHECKSUM = slice(148, 156)
_MAGIC, _MAGIC_AT = int.from_bytes(b"usta", "little"), 257


class KindError(ValueError):
    """A member whose data are not stored as they are, or of a type that is not known."""


class Member(NamedTuple):
    """A file within a tar: its name, where its content begins, and its size in bytes."""

    name: str
    start: int
    size: int


def index(data: memoryview) -> list[Member]:
    """The files of a whole tar in memory. Raises as `members_of`."""
    members = _index_of_plain(data)
    return list(members_of(lambda start, size: data[start : start + size].tobytes())) if members is None else members


def _index_of_plain(data: memoryview) -> list[Member] | None:
    """All headers at once if they are regular files with short names and octal numbers; else None.

    Headers are the blocks with the magic word, if each one's size leads to the next: a block of content that happens to hold
    the word breaks that chain.
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
    plain = np.isin(headers[:, 156], _PLAIN).all() and not headers[:, 345].any() and not headers[:, 99].any()
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
    """The files of a whole tar, through `read(offset, size)`; a hard link is the file that it names, under another name.

    Folders, symbolic links, devices and entries that only describe others are skipped.

    Raises:
        ValueError: it is no tar, is cut, or a header is damaged. After the last member, so take them all.
        KindError: a member is not stored as it is, or of a type that is not known, or links to one that is not there.
    """
    files: dict[str, Member] = {}
    for entry in _entries(read):
        if entry.kind == _HARD_LINK:
            if entry.link not in files:
                raise _refusal(entry, f"is a hard link to {entry.link!r}, which does not stand before it")
            member = files[entry.link]._replace(name=entry.name)
        elif entry.kind in _WITHOUT_DATA + _NO_MEMBERS:
            continue
        else:
            _check_kind(entry)
            member = Member(entry.name, entry.start, entry.size)
        files[entry.name] = member
        yield member


class _Entry(NamedTuple):
    """A header, what preceding headers say about it, and where its data are."""

    header: bytes
    kind: bytes
    name: str
    link: str
    pax: dict[str, str]
    start: int
    size: int


def _entries(read: Callable[[int, int], bytes]) -> Iterator[_Entry]:
    headers: list[bytes] = []
    position, long_name, long_link = 0, "", ""
    pax: dict[str, str] = {}
    pax_of_all: dict[str, str] = {}
    while True:
        header = bytes(read(position, BLOCK_BYTES))
        if len(header) < BLOCK_BYTES:
            raise ValueError("unexpected end of data")
        if header == _END:
            break
        headers.append(header)
        size, kind, start = _number(header[124:136]), header[156:157], position + BLOCK_BYTES
        if kind == _LONG_NAME:
            long_name = _text(read(start, size))
        elif kind == _LONG_LINK:
            long_link = _text(read(start, size))
        elif kind in _PAX:
            pax = _pax_records(bytes(read(start, size)))
        elif kind == _PAX_OF_ALL:
            pax_of_all |= _pax_records(bytes(read(start, size)))
        else:  # those headers describe this entry alone
            pax = {**pax_of_all, **pax}
            name = pax.get("path") or long_name or _name(header)
            kind = _FOLDER if kind in _FILES and name.endswith("/") else kind  # as before POSIX
            size = 0 if kind in _WITHOUT_DATA else int(pax.get("size", size))
            yield _Entry(header, kind, name, pax.get("linkpath") or long_link or _text(header[157:257]), pax, start, size)
            long_name, long_link, pax = "", "", {}
        if size < 0:
            raise ValueError(f"the header of {_name(header)!r} gives a size below 0")
        position = start + (size + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
    _check(headers)


def _check_kind(entry: _Entry) -> None:
    """Raises KindError if the data are not the file's own bytes, ValueError if that is due to damage."""
    if entry.kind == _SPARSE or any(key.startswith(_PAX_OF_SPARSE) for key in entry.pax):
        raise _refusal(entry, "is stored without its zeros (tar --sparse), which is not read")
    if entry.kind == _PART or _PAX_OF_PART in entry.pax:
        raise _refusal(entry, "is a part of a file (tar --multi-volume), which is not read")
    if entry.kind not in _FILES:
        raise _refusal(entry, f"is of the type {entry.kind.decode('latin-1')!r}, which is not known")


def _refusal(entry: _Entry, reason: str) -> KindError:
    """The error for an entry that is not read. Raises ValueError if its header is damaged instead."""
    _check([entry.header])
    return KindError(f"{entry.pax.get('GNU.sparse.name', entry.name)!r} {reason}")


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _text(field: bytes) -> str:
    return bytes(field).partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """The value of octal digits or, for larger numbers, of a first byte of 128 and a big-endian number."""
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
    """Compare each header's checksum with the sum of its bytes, where the checksum itself counts as blanks."""
    bytes_of = np.frombuffer(b"".join(headers), dtype=np.uint8).reshape(-1, BLOCK_BYTES)
    sums = _sums(bytes_of)
    checksums = [_number(header[_CHECKSUM]) for header in headers]
    wrong = np.flatnonzero(sums != np.array(checksums, dtype=np.int64))
    if len(wrong):
        raise ValueError(f"the header of {_name(headers[int(wrong[0])])!r} does not agree with its checksum")


def _sums(headers: NDArray[np.uint8]) -> NDArray[np.int64]:
    total = headers.sum(axis=1, dtype=np.int64) - headers[:, _CHECKSUM].sum(axis=1, dtype=np.int64)
    return np.asarray(total + 8 * ord(" "))
