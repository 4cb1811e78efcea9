"""Tar shards in WebDataset's layout, and the manifest that lists them.

A sample is the members of a tar that share a key (the path up to the first dot of the base name): 000123.png, 000123.json.
Hidden members and members without an ending belong to no sample.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import webdataset

from megadiff.config.errors import UserError
from megadiff.data.errors import DataError
from megadiff.data.shards.tar import KindError, index
from megadiff.storage import addresses, store

FORMAT, VERSION = "megadiff-shards", 1
MANIFEST = "manifest.json"

TAR = ".tar"
COMPRESSED = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4", ".tar.z", ".tgz", ".tbz2", ".txz", ".tzst")
"""Endings, in any case, of tars that are read, and of tars that must be unpacked first."""

Members = dict[str, bytes]
"""A sample: the ending of each member (png, json) and its bytes."""
Views = Mapping[str, bytes | memoryview]
"""A sample whose bytes need not be copies of its own."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its file name beside the manifest, how many samples, its size and hash.

    Attributes:
        bucket: the size that its pictures are cropped to, HEIGHTxWIDTH in pixels; None without buckets.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    bucket: str | None = None


_SAMPLES = attrgetter("samples")
_NEEDED, _KNOWN = {"name", "samples", "bytes", "sha256"}, {"name", "samples", "bytes", "sha256", "bucket"}


@dataclass(frozen=True)
class Manifest:
    """The shards of one source and free facts about it (split, licence, ...)."""

    shards: tuple[ShardEntry, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def samples(self) -> int:
        return sum(map(_SAMPLES, self.shards))


def manifest_of(address: str) -> str:
    """The address of a manifest: its own, or that of the folder it lies in."""
    return address if addresses.is_json(address) else addresses.join(address, MANIFEST)


def read_manifest(address: str) -> Manifest:
    """Read manifest.json (its own address, or that of the folder it lies in).

    Raises:
        StorageError: it is not there.
        DataError: it is no manifest, or lists no samples.
    """
    address = manifest_of(address)
    try:
        with _without_collection():
            tree = json.loads(store.read_bytes(address))
        if tree["format"] != FORMAT or tree["version"] != VERSION:
            raise DataError(
                f"{address} is a {tree['format']} of version {tree['version']}; this program reads {FORMAT} {VERSION}"
            )
        with _without_collection():
            shards = tuple([_entry(fields) for fields in tree["shards"]])
        if not _types_of(shards, "samples") <= {int} or min(map(_SAMPLES, shards), default=0) < 0:
            raise ValueError("`samples` must be whole numbers")
        if not _types_of(shards, "bytes") <= {int} or not _types_of(shards, "name") | _types_of(shards, "sha256") <= {str}:
            raise ValueError("`name` and `sha256` must be texts, `bytes` a whole number")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{address} is no manifest of shards ({reason}); make one with `megadiff data index FOLDER`") from None
    manifest = Manifest(shards, {key: value for key, value in tree.items() if key not in ("format", "version", "shards")})
    if manifest.samples == 0:
        raise DataError(f"{address} lists no samples")
    return manifest


def _types_of(shards: tuple[ShardEntry, ...], field: str) -> set[type]:
    return set(map(type, map(attrgetter(field), shards)))


def _entry(fields: dict[str, Any]) -> ShardEntry:
    """An entry without the generated constructor, which takes most of the time of a million entries."""
    if not _NEEDED <= fields.keys() <= _KNOWN:
        return ShardEntry(**fields)  # raises an error that says what is wrong
    entry = ShardEntry.__new__(ShardEntry)
    object.__setattr__(entry, "__dict__", fields)
    return entry


@contextmanager
def _without_collection() -> Iterator[None]:
    """Switch garbage collection off while many objects are made: it would double the time and find nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def write_manifest(folder: str, manifest: Manifest) -> str:
    """Write manifest.json into a folder; returns its address."""
    shards = [{key: value for key, value in vars(entry).items() if value is not None} for entry in manifest.shards]
    tree = {"format": FORMAT, "version": VERSION, **manifest.facts, "shards": shards}
    address = addresses.join(folder, MANIFEST)
    text = json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
    store.write_bytes(address, text.encode("utf-8", "backslashreplace"))  # undecodable bytes of names are escaped
    return address


def pack_shard(samples: Mapping[str, Members]) -> bytes:
    """A tar of samples by key; the same samples give the same bytes."""
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, mtime=0, user="", group="", encoder=False) as writer:
        for key, members in samples.items():
            writer.write({"__key__": key, **dict(sorted(members.items()))})
    return buffer.getvalue()


def write_shard(folder: str, name: str, samples: Mapping[str, Members], bucket: str | None = None) -> ShardEntry:
    """Pack samples and write them as `folder/name`."""
    data = pack_shard(samples)
    store.write_bytes(addresses.join(folder, name), data)
    return ShardEntry(name, len(samples), len(data), hashlib.sha256(data).hexdigest(), bucket)


def index_shards(folder: str, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """The manifest of the tars in a folder; facts (licences, ...) of an existing manifest are kept.

    Raises:
        DataError: there are none, or one is damaged or compressed.
    """
    names = tars_in(folder)
    entries = []
    for done, name in enumerate(names, 1):
        data = store.read_bytes(addresses.join(folder, name))
        shard = Shard(addresses.join(folder, name), data)
        entries.append(ShardEntry(name, len(shard), len(data), hashlib.sha256(data).hexdigest()))
        if progress:
            progress(done, len(names))
    return Manifest(tuple(entries), _facts_at(folder))


def is_tar(name: str) -> bool:
    """Whether a name is a tar's. Raises DataError if it is a compressed one's."""
    if name.lower().endswith(COMPRESSED):
        raise DataError(f"{addresses.shown(name)} is compressed, and samples are read in place: unpack it to a .tar")
    return name.lower().endswith(TAR)


def tars_in(folder: str) -> list[str]:
    """Sorted names of the tars directly inside a folder. Raises DataError if there are none, or a compressed one."""
    names = [name for name in store.list_names(folder) if is_tar(addresses.join(folder, name))]
    if not names:
        raise DataError(f"{addresses.shown(folder)} holds no {TAR} files")
    return names


def _facts_at(folder: str) -> dict[str, Any]:
    try:
        return read_manifest(folder).facts
    except UserError:
        return {}


def place_of(name: str) -> tuple[str, str] | None:
    """(key, ending) of a tar's member; None if it is no sample's: hidden, or without an ending (README, .DS_Store)."""
    head, _, base = name.rpartition("/")
    stem, dot, ending = base.partition(".")
    if not stem or not dot:
        return None
    return f"{head}/{stem}" if head else stem, ending.lower()


class Shard:
    """Random access to the samples of one tar, held in memory or as an open local file."""

    def __init__(self, address: str, source: bytes | memoryview | Path, *, mapped: bool = False) -> None:
        """Raises DataError if it is no whole tar, FileNotFoundError if the file is gone.

        Args:
            mapped: map a file into memory. For files that nobody shortens: reading past the end kills the process.
        """
        self.address = address
        self._descriptor = os.open(source, os.O_RDONLY) if isinstance(source, Path) else None
        if self._descriptor is not None:
            weakref.finalize(self, os.close, self._descriptor)
        data = memoryview(b"") if self._descriptor is None else _map(self._descriptor)
        data = data if isinstance(source, Path) else memoryview(source)
        self._data = data if mapped or self._descriptor is None else None
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            for name, start, size in index(data):
                if place := place_of(name):
                    samples.setdefault(place[0], {})[place[1]] = (start, size)
        except KindError as error:
            raise DataError(f"shard {addresses.shown(address)} cannot be read: its member {error}; write it anew") from None
        except (ValueError, OSError) as error:
            raise DataError(
                f"shard {addresses.shown(address)} is damaged: {error}; write it anew or take it out of the manifest"
            ) from None
        self._keys, self._places = list(samples), list(samples.values())

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, offset: int) -> str:
        return self._keys[offset]

    def members(self, offset: int) -> Members:
        """The members of the sample at a place, whole."""
        return {ending: self._read(start, size) for ending, (start, size) in self._places[offset].items()}

    def views(self, offset: int) -> Views:
        """`members` without copies where the shard is in memory."""
        if self._data is None:
            return self.members(offset)
        data = self._data
        return {ending: data[start : start + size] for ending, (start, size) in self._places[offset].items()}

    def _read(self, start: int, size: int) -> bytes:
        if self._descriptor is None or self._data is not None:
            assert self._data is not None
            return self._data[start : start + size].tobytes()
        return os.pread(self._descriptor, size, start)


def _map(descriptor: int) -> memoryview:
    """A file's content, mapped into memory and read on access."""
    size = os.fstat(descriptor).st_size
    return memoryview(mmap.mmap(descriptor, size, prot=mmap.PROT_READ) if size else b"")
