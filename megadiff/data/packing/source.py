"""The interface of all sources: raw samples in units of work, or reasons why samples are left out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megadiff.config.errors import UserError
from megadiff.data.shards.shard import Members
from megadiff.storage import addresses

NO_CAPTION, NO_PICTURE, UNREADABLE, TOO_SMALL = "no caption", "no picture", "unreadable picture", "too small"
UNREACHABLE, NOT_ENCODED = "unreachable picture", "cannot be encoded"
"""Reasons why a sample is left out."""


@dataclass(frozen=True)
class LeftOut:
    """A sample that is not written: where it is from, one of the reasons above, and the fault in words."""

    source: str
    reason: str
    detail: str = ""


class LeaveOut(Exception):
    """Raised while a sample's picture is read: (reason, detail)."""


@dataclass(frozen=True)
class Raw:
    """A sample as a source has it.

    Attributes:
        origin: stable, and unique over the whole source; the key is made from it.
        source: the path, address or key, for people.
        captions: as found; they are cleaned later.
        read: its picture's bytes. Raises LeaveOut.
    """

    origin: str
    source: str
    captions: Sequence[Any]
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Encoded:
    """A sample that is written as it is; `origin` and `source` as in `Raw`, `read` gives its members or raises LeaveOut."""

    origin: str
    source: str
    read: Callable[[], Members]


class Source(Protocol):
    """One kind of raw data, cut into units."""

    @property
    def kind(self) -> str: ...

    @property
    def names(self) -> Sequence[str]:
        """Names of the units: stable, unique, of letters, digits, - and _."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that the units' samples depend on."""

    @property
    def threads(self) -> int:
        """Pictures read at once; above 1 if reading mostly waits."""

    def samples(self, unit: int) -> Iterator[Raw | Encoded | LeftOut]:
        """A unit's samples, always in the same order. Raises DataError, StorageError."""


def key_of(origin: str) -> str:
    """A key from an origin: its letters for people, a hash of the whole; ASCII, without dots and slashes."""
    return f"{slug(origin.rpartition('/')[2].partition('.')[0])}-{hashed(origin, 10)}"


def unit_name(origin: str) -> str:
    """A unit's name from what it is read from."""
    return f"{slug(origin.rpartition('/')[2].partition('.')[0])}-{hashed(origin, 5)}"


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "_", text)[:40].strip("_") or "x"


def clean(captions: Iterable[Any]) -> list[str]:
    """Stripped texts; entries that are empty, no text, or hold half of a surrogate pair are dropped."""
    texts = [caption.strip() for caption in captions if isinstance(caption, str)]
    return [text for text in texts if text and not re.search("[\ud800-\udfff]", text)]


def captions_in(tree: Any) -> list[Any]:
    """The captions of parsed JSON: a text, a list of texts, or an object with `captions` or `caption`."""
    if isinstance(tree, Mapping):
        return captions_in(tree.get("captions") or tree.get("caption"))
    if isinstance(tree, str):
        return [tree]
    return list(tree) if isinstance(tree, Sequence) else []


def expand(address: str) -> list[str]:
    """The addresses that an address with {00000..00012} or {a,b} stands for."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", address)
    if braces is None:
        return [address]
    if braces[3] is not None:
        choices = braces[3].split(",")
    else:
        first, last = int(braces[1]), int(braces[2])
        if first > last:
            raise UserError(f"{braces[0]} in {address} counts down; write {{{braces[2]}..{braces[1]}}}")
        choices = [str(number).zfill(len(braces[1])) for number in range(first, last + 1)]
    return [whole for choice in choices for whole in expand(address[: braces.start()] + choice + address[braces.end() :])]


def is_encoded(folder: str) -> bool:
    """Whether a folder looks like the output of the paper's scripts."""
    return addresses.is_local(folder) and all((addresses.local_path(folder) / name).is_dir() for name in ("images", "tokens"))


def hashed(text: str, size: int) -> str:
    """A hash of a text as hexadecimal digits, two for each of `size` bytes."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=size).hexdigest()
