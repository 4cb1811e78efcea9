"""Tar shards in WebDataset's layout, and the manifest that lists them.

A sample is the members of a tar that share a key (the path up to the first dot of the base name): 000123.png, 000123.json.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import webdataset

from megadiff.config.errors import UserError
from megadiff.config.schema import Cache
from megadiff.data.errors import DataError
from megadiff.storage import store

FORMAT, VERSION = "megadiff-shards", 1
MANIFEST = "manifest.json"

_EVICTIONS = 5
"""How often a cached shard may be taken away between its download and a reading, before that is an error."""

Members = dict[str, bytes]
"""A sample: the ending of each member (png, json) and its bytes."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its file name beside the manifest, how many samples, its size and hash."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The shards of one source and free facts about it (split, licence, ...)."""

    shards: tuple[ShardEntry, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


def read_manifest(address: str) -> Manifest:
    """Read manifest.json (its own address, or that of the folder it lies in).

    Raises:
        StorageError: it is not there.
        DataError: it is no manifest, or lists no samples.
    """
    address = address if address.endswith(".json") else store.join(address, MANIFEST)
    try:
        tree = json.loads(store.read_bytes(address))
        if tree["format"] != FORMAT or tree["version"] != VERSION:
            raise DataError(
                f"{address} is a {tree['format']} of version {tree['version']}; this program reads {FORMAT} {VERSION}"
            )
        shards = tuple(ShardEntry(**entry) for entry in tree["shards"])
        if not all(isinstance(shard.samples, int) and shard.samples >= 0 for shard in shards):
            raise ValueError("`samples` must be whole numbers")
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{address} is no manifest of shards ({reason}); make one with `megadiff data index FOLDER`") from None
    manifest = Manifest(shards, {key: value for key, value in tree.items() if key not in ("format", "version", "shards")})
    if manifest.samples == 0:
        raise DataError(f"{address} lists no samples")
    return manifest


def write_manifest(folder: str, manifest: Manifest) -> str:
    """Write manifest.json into a folder; returns its address."""
    shards = [vars(entry) for entry in manifest.shards]
    tree = {"format": FORMAT, "version": VERSION, **manifest.facts, "shards": shards}
    address = store.join(folder, MANIFEST)
    store.write_bytes(address, (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode())
    return address


def pack_shard(samples: Mapping[str, Members]) -> bytes:
    """A tar of samples by key; the same bytes for the same samples, whoever makes it and when."""
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, mtime=0, user="", group="", encoder=False) as writer:
        for key, members in samples.items():
            writer.write({"__key__": key, **dict(sorted(members.items()))})
    return buffer.getvalue()


def write_shard(folder: str, name: str, samples: Mapping[str, Members]) -> ShardEntry:
    """Pack samples and write them as `folder/name`."""
    data = pack_shard(samples)
    store.write_bytes(store.join(folder, name), data)
    return ShardEntry(name, len(samples), len(data), hashlib.sha256(data).hexdigest())


def index_shards(folder: str, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """The manifest of the tars that already lie in a folder; facts (licences, ...) of one that is there are kept.

    Raises:
        DataError: there are none, or one is damaged.
    """
    names = [name for name in store.list_names(folder) if name.endswith(".tar")]
    if not names:
        raise DataError(f"{folder} holds no .tar files")
    entries = []
    for done, name in enumerate(names, 1):
        data = store.read_bytes(store.join(folder, name))
        shard = Shard(store.join(folder, name), data)
        entries.append(ShardEntry(name, len(shard), len(data), hashlib.sha256(data).hexdigest()))
        if progress:
            progress(done, len(names))
    return Manifest(tuple(entries), _facts_at(folder))


def _facts_at(folder: str) -> dict[str, Any]:
    try:
        return read_manifest(folder).facts
    except UserError:
        return {}


class Shard:
    """Random access to the samples of one tar, held in memory or as a local file."""

    def __init__(self, address: str, source: bytes | Path) -> None:
        """Raises DataError if it is no whole tar, FileNotFoundError if the file is gone."""
        self.address, self._source = address, source
        self._samples: OrderedDict[str, dict[str, tuple[int, int]]] = OrderedDict()
        try:
            opened = source.open("rb") if isinstance(source, Path) else io.BytesIO(source)
            with opened, tarfile.open(fileobj=opened, mode="r:") as tar:  # A compressed tar has no places.
                for member in tar:
                    if member.isfile():
                        head, _, base = member.name.rpartition("/")
                        stem, _, ending = base.partition(".")
                        key = f"{head}/{stem}" if head else stem
                        self._samples.setdefault(key, {})[ending.lower()] = (member.offset_data, member.size)
                # tarfile takes a cut within a header for the end; a whole tar has blocks of zeros there.
                opened.seek(tar.offset)
                if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("unexpected end of data")
        except FileNotFoundError:
            raise
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"shard {address} is damaged: {error}; write it anew or take it out of the manifest") from None
        self._keys = list(self._samples)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, offset: int) -> str:
        return self._keys[offset]

    def members(self, offset: int) -> Members:
        """The members of the sample at a place, whole. Raises FileNotFoundError if the file is gone."""
        parts = self._samples[self._keys[offset]]
        if isinstance(self._source, bytes):
            return {ending: self._source[start : start + size] for ending, (start, size) in parts.items()}
        found = {}
        with self._source.open("rb") as file:
            for ending, (start, size) in parts.items():
                file.seek(start)
                found[ending] = file.read(size)
        return found


class ShardReader:
    """Opens a manifest's shards: local ones in place, remote ones through a node-local cache or in memory. Thread-safe."""

    def __init__(self, manifest_address: str, manifest: Manifest, cache: Cache | None, in_memory: int) -> None:
        """Keep at most `in_memory` shards open at once."""
        folder = store.parent(manifest_address) if manifest_address.endswith(".json") else manifest_address
        self.manifest, self.folder, self.in_memory = manifest, folder, in_memory
        self.cache = None if cache is None or store.is_local(folder) else ShardCache(cache)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._locks: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()

    def shard(self, index: int) -> Shard:
        """The shard with an index of the manifest; read once however many threads ask.

        Raises:
            StorageError: it cannot be had. DataError: it is damaged or has another number of samples than the manifest says.
        """
        with self._lock:
            if index in self._open:
                self._open.move_to_end(index)
                return self._open[index]
            lock = self._locks.setdefault(index, threading.Lock())
        with lock:
            with self._lock:
                if index in self._open:
                    return self._open[index]
            shard = self._read(self.manifest.shards[index])
            with self._lock:
                self._open[index] = shard
                while len(self._open) > self.in_memory:
                    self._open.popitem(last=False)
            return shard

    def members(self, index: int, offset: int) -> Members:
        """The members of one sample; a shard that another process has dropped from the cache is downloaded again.

        Raises:
            StorageError, DataError: as `shard`.
        """
        for _ in range(_EVICTIONS):
            shard = self.shard(index)
            try:
                return shard.members(offset)
            except FileNotFoundError:
                with self._lock:
                    self._open.pop(index, None)
        raise self._evicted(self.manifest.shards[index])

    def _read(self, entry: ShardEntry) -> Shard:
        address = store.join(self.folder, entry.name)
        shard = self._opened(address, entry)
        if len(shard) != entry.samples:
            raise DataError(f"shard {address} holds {len(shard)} samples, and the manifest says {entry.samples}")
        return shard

    def _opened(self, address: str, entry: ShardEntry) -> Shard:
        if self.cache is None:
            return Shard(address, _local(address, entry) if store.is_local(address) else _fetched(address, entry))
        for _ in range(_EVICTIONS):
            try:
                return Shard(address, self.cache.path(address, entry))
            except FileNotFoundError:
                continue
        raise self._evicted(entry)

    def _evicted(self, entry: ShardEntry) -> DataError:
        return DataError(f"shard {entry.name} was dropped from the cache again and again; raise data.cache.max_bytes")


def _local(address: str, entry: ShardEntry) -> Path:
    path = store.local_path(address)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"shard {address} cannot be read ({error.strerror}); bring it back or run `megadiff data index`"
        ) from None
    if size != entry.bytes:
        raise DataError(f"shard {address} has {size} bytes, and the manifest says {entry.bytes}; run `megadiff data index`")
    return path


def _fetched(address: str, entry: ShardEntry) -> bytes:
    data = store.read_bytes(address)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise _not_listed(address)
    return data


def _not_listed(address: str) -> DataError:
    return DataError(f"shard {address} is not the one that the manifest lists (its hash differs); run `megadiff data index`")


class ShardCache:
    """A folder of downloaded shards, shared by the processes of a node, kept under a size by dropping the least used."""

    def __init__(self, rule: Cache) -> None:
        self.folder, self.max_bytes = Path(rule.folder), rule.max_bytes

    def path(self, address: str, entry: ShardEntry) -> Path:
        """The local copy of a shard, downloaded if it is not there.

        Raises:
            StorageError: it cannot be had. DataError: it is not the one that the manifest lists.
            FileNotFoundError: another process has taken it away meanwhile.
        """
        path = self.folder / f"{entry.sha256}.tar"
        if path.exists() and path.stat().st_size == entry.bytes:
            os.utime(path)
            return path
        self._make_room(entry.bytes)
        store.download(address, path)
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                path.unlink(missing_ok=True)
                raise _not_listed(address)
        return path

    def _make_room(self, wanted: int) -> None:
        held = []
        for found in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):  # Another process makes room as well.
                held.append((found.stat().st_mtime, found.stat().st_size, found))
        total = sum(size for _, size, _ in held) + wanted
        for _, size, found in sorted(held):
            if total <= self.max_bytes:
                return
            found.unlink(missing_ok=True)
            total -= size
