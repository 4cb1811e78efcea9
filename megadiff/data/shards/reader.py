"""The shards of one source, opened ahead of their use: local ones in place, distant ones through the cache or in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Executor, Future
from pathlib import Path

from megadiff.data.errors import DataError
from megadiff.data.shards.cache import ShardCache, fetched
from megadiff.data.shards.shard import Manifest, Members, Shard, ShardEntry
from megadiff.storage import addresses


class ShardReader:
    """Opens each shard once, for any number of threads. Thread-safe."""

    def __init__(
        self,
        folder: str,
        manifest: Manifest,
        cache: ShardCache | None = None,
        *,
        keep: int = 64,
        fetchers: Executor | None = None,
    ) -> None:
        """Read the shards beside a manifest.

        Args:
            folder: where the shards lie.
            cache: for distant shards.
            keep: most shards that stay open without being expected.
            fetchers: threads that open expected shards ahead; None opens each on demand.
        """
        self.folder, self.manifest, self.keep, self.fetchers = folder, manifest, keep, fetchers
        self.cache = None if addresses.is_local(folder) else cache
        self._open: dict[int, Future[Shard]] = {}
        self._expected: frozenset[int] = frozenset()
        self._lock = threading.Lock()

    def expect(self, indices: Iterable[int]) -> None:
        """Announce the shards needed from now on, in their order: they are opened ahead, and all others are closed."""
        coming = list(indices)
        with self._lock:
            self._expected = frozenset(coming)
            for index in [index for index in self._open if index not in self._expected]:
                self._open.pop(index).cancel()
            if self.fetchers is not None:
                for index in coming:
                    if index not in self._open:
                        self._open[index] = self.fetchers.submit(self._read, index)

    def shard(self, index: int) -> Shard:
        """The shard with an index of the manifest.

        Raises:
            StorageError: it cannot be had. DataError: it is damaged or has another number of samples than the manifest says.
        """
        with self._lock:
            earlier = self._open.pop(index, None)
            future = self._open[index] = earlier or Future()  # the order of the dict is that of the latest uses
            if earlier is None:
                for other in [other for other in self._open if other not in self._expected][: -self.keep]:
                    del self._open[other]
        if earlier is None:
            _fulfil(future, self, index)
        try:
            return future.result()
        except BaseException:
            with self._lock:
                if self._open.get(index) is future:
                    del self._open[index]  # so that a later call tries again
            raise

    def members(self, index: int, offset: int) -> Members:
        """The members of one sample. Raises as `shard`."""
        return self.shard(index).members(offset)

    def _read(self, index: int) -> Shard:
        entry = self.manifest.shards[index]
        address = addresses.join(self.folder, entry.name)
        shard = self._opened(address, entry)
        if len(shard) != entry.samples:
            raise DataError(
                f"shard {addresses.shown(address)} holds {len(shard)} samples, and the manifest says {entry.samples}; "
                "run `megadiff data index`"
            )
        return shard

    def _opened(self, address: str, entry: ShardEntry) -> Shard:
        if addresses.is_local(address):
            return Shard(address, _local(address, entry))
        return self.cache.shard(address, entry) if self.cache else Shard(address, fetched(address, entry))


def _fulfil(future: Future[Shard], reader: ShardReader, index: int) -> None:
    try:
        future.set_result(reader._read(index))
    except BaseException as error:
        future.set_exception(error)


def _local(address: str, entry: ShardEntry) -> Path:
    path = addresses.local_path(address)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"shard {address} cannot be read ({error.strerror}); bring it back or run `megadiff data index`"
        ) from None
    if size != entry.bytes:
        raise DataError(f"shard {address} has {size} bytes, and the manifest says {entry.bytes}; run `megadiff data index`")
    return path
