"""A folder of downloaded shards, shared by the processes of a node and kept under a size."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megadiff.config.schema import Cache
from megadiff.data.errors import DataError
from megadiff.data.shards.shard import Shard, ShardEntry
from megadiff.files import sha256
from megadiff.storage import addresses, store
from megadiff.storage.errors import FullError, StorageError

log = logging.getLogger(__name__)

_TRIES = 5
"""Attempts to open a shard that others drop between its download and its opening."""


class ShardCache:
    """Shards by their hash; the least used are dropped. Safe with any number of threads and processes, killed ones included.

    A shard that is open stays readable when its file is dropped.
    """

    def __init__(self, rule: Cache) -> None:
        self.folder, self.max_bytes = Path(rule.folder), rule.max_bytes
        self._full = False

    def shard(self, address: str, entry: ShardEntry) -> Shard:
        """The local copy of a shard, downloaded if it is not there; in memory where the disk is full.

        Raises:
            StorageError: it cannot be had. DataError: it is damaged or not the one that the manifest lists.
        """
        path = self.folder / f"{entry.sha256}.tar"
        for _ in range(_TRIES):
            try:
                if not self._holds(path, entry):
                    self._download(address, path, entry)
                os.utime(path)
                return Shard(address, path, mapped=True)
            except FileNotFoundError:  # another process has made room
                continue
            except FullError as error:
                if not self._full:
                    log.warning("%s; shards are held in memory instead", error)
                self._full = True
                return Shard(address, fetched(address, entry))
        raise DataError(f"shard {entry.name} was dropped from the cache again and again; raise data.cache.max_bytes")

    def _holds(self, path: Path, entry: ShardEntry) -> bool:
        """Whether the file exists and is whole; the content of files older than the machine's start is compared.

        A machine that dies may leave a file of the right size with wrong content.
        """
        try:
            status = path.stat()
        except FileNotFoundError:
            return False
        whole = status.st_size == entry.bytes and (status.st_ctime > _started() or sha256(path) == entry.sha256)
        if not whole:
            path.unlink(missing_ok=True)
        return whole

    def _download(self, address: str, path: Path, entry: ShardEntry) -> None:
        self._make_room(path, entry.bytes)
        store.download(address, path)
        if sha256(path) != entry.sha256:
            path.unlink(missing_ok=True)
            raise not_listed(address)

    def _make_room(self, path: Path, size: int) -> None:
        """Drop the least used shards until `size` bytes fit; downloads of others count as `size` bytes each."""
        with self._locked():
            files, under_way = [], 0
            for file in [*self.folder.glob("*.tar"), *self.folder.glob(".*.partial")]:
                with suppress(FileNotFoundError):
                    if file.suffix == ".tar" or (_is_abandoned(file) and file.name != f".{path.name}.partial"):
                        files.append((file.stat().st_mtime, file.stat().st_size, file))
                    else:
                        under_way += size
            total = sum(bytes_of_file for _, bytes_of_file, _ in files) + under_way + size
            for _, bytes_of_file, file in sorted(files):
                if total <= self.max_bytes:
                    break
                file.unlink(missing_ok=True)
                if file.suffix == ".partial":
                    file.with_name(file.name + ".etag").unlink(missing_ok=True)
                total -= bytes_of_file

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(f"the cache {self.folder} cannot be written: {error.strerror}; see data.cache.folder") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def fetched(address: str, entry: ShardEntry) -> memoryview:
    """A distant shard's bytes. Raises StorageError if it cannot be had, DataError if it is not the listed one."""
    data = store.read_whole(address)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise not_listed(address)
    return data


def not_listed(address: str) -> DataError:
    return DataError(
        f"shard {addresses.shown(address)} is not the one that the manifest lists (its hash differs); run `megadiff data index`"
    )


def _started() -> float:
    """When this machine started, in seconds since 1970."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def _is_abandoned(partial: Path) -> bool:
    """Whether no process is filling a partial download."""
    with partial.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
