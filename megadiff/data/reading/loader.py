"""Shards and an order to micro-batches on the right rank; shards are fetched, and batches decoded, ahead by threads."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megadiff import rng
from megadiff.config import checks
from megadiff.config.errors import UserError
from megadiff.config.schema import Data, GridSpace, Model
from megadiff.data.buckets import Bucket
from megadiff.data.codecs.base import Array, Loadable, array_of
from megadiff.data.codecs.build import build_codecs, check_manifest
from megadiff.data.errors import DataError, SampleError
from megadiff.data.reading.mixture import Mixture, StepSamples
from megadiff.data.reading.order import Order
from megadiff.data.shards.cache import ShardCache
from megadiff.data.shards.reader import ShardReader
from megadiff.data.shards.shard import Manifest, Shard, Views, read_manifest
from megadiff.storage import addresses
from megadiff.types import Batch

log = logging.getLogger(__name__)

FEWEST_READ = 200
"""Least number of samples before the unreadable share is judged."""
_NAMED_IN_LOG = 20
_HELD_OUT_BLOCK = 8
"""Shards that held-out samples come from at a time, so that only a few shards of a large source are fetched."""


@dataclass(frozen=True)
class LoaderStats:
    """Totals since this process began: samples taken by this rank, undecodable ones among them, time spent waiting."""

    read: int
    unreadable: int
    waited_s: float = field(default=0.0, compare=False)


def check_unreadable(read: int, unreadable: int, share: float) -> None:
    """Stop a run whose data is bad; give the sums over all ranks, so that all decide alike.

    Raises:
        DataError: more than `share` of at least FEWEST_READ samples could not be read.
    """
    if read >= FEWEST_READ and unreadable > share * read:
        raise DataError(
            f"{unreadable} of {read} samples could not be read, more than data.max_unreadable_share ({share:g}); "
            "the log names them: mend the shards or raise the share"
        )


class FeatureReader(Loadable):
    """Precomputed features of one modality: a NumPy array [S, F] in a member of the shards."""

    def __init__(self, member: str, shape: tuple[int, int]) -> None:
        self.member, self.shape = member, shape

    def load(self, members: Views, key: int = 0, bucket: Bucket | None = None) -> Array:
        """Float32 [S, F]. Raises SampleError if the member is missing, damaged or of another shape."""
        values = array_of(members, self.member)
        if values.shape != self.shape:
            raise SampleError(f"its .{self.member} member has the shape {list(values.shape)}, not {list(self.shape)}")
        return values.astype(np.float32)

    def blank(self, bucket: Bucket | None = None) -> Array:
        return np.zeros(self.shape, dtype=np.float32)


class _Codecs:
    """Members of samples to stacked arrays, and those to clean states. Thread-safe."""

    def __init__(self, data: Data, model: Model, features: Mapping[str, tuple[int, int]] | None = None) -> None:
        self.codecs = build_codecs(data, model)
        self.features = {name: FeatureReader(data.features[name], shape) for name, shape in (features or {}).items()}

    def load(
        self, samples: Sequence[Views], keys: Sequence[int], bucket: Bucket | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[int, SampleError]]:
        """(values [B, ...], features [B, ...], errors by place in the batch of the samples that could not be loaded)."""
        errors: dict[int, SampleError] = {}
        parts: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        kinds: tuple[Mapping[str, Loadable], ...] = (self.codecs, self.features)
        for part, readers in zip(parts, kinds, strict=True):
            for name, reader in readers.items():
                array, faults = reader.load_batch(samples, keys, bucket)
                errors = {**faults, **errors}
                part[name] = torch.from_numpy(array)
        for place in errors:  # an incomplete sample is blank in all modalities
            for tensor in (*parts[0].values(), *parts[1].values()):
                tensor[place] = 0
        return *parts, errors

    def finish(self, stacked: Mapping[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
        """Clean states."""
        return {name: codec.finish(stacked[name], keys) for name, codec in self.codecs.items()}


class Loader:
    """This rank's micro-batches of one global batch after another; what they hold does not depend on workers or ranks.

    Attributes:
        sources: the names of the sources, if there are several.
    """

    def __init__(
        self,
        data: Data,
        model: Model,
        *,
        seed: int,
        global_samples: int,
        micro_batch: int,
        data_rank: int = 0,
        data_ranks: int = 1,
        data_step: int = 0,
        features: Mapping[str, tuple[int, int]] | None = None,
        mixture: Mapping[str, float] | None = None,
        reads: bool = True,
    ) -> None:
        """Start with global batch number `data_step`.

        Args:
            reads: whether this rank takes samples; one that does not counts the steps alone.
            features: modalities whose precomputed features are read as well, with their shape (tokens, numbers).
            mixture: shares of the sources; by default their sizes.

        Raises:
            UserError: a manifest cannot be read or does not fit the fields, or lanes, ranks and batch do not divide.
        """
        manifests = {name: read_manifest(address) for name, address in data.sources.items()}
        for name, manifest in manifests.items():
            check_manifest(data.sources[name], manifest, data, model, features or ())
        self._codecs = _Codecs(data, model, features)
        self._mixture = Mixture(manifests, data.lanes, data.block_shards, seed, mixture)
        self._slots = self._mixture.slots_of_rank(data_rank, data_ranks, global_samples)
        self._reads = reads
        checks.require(checks.batch_over_ranks(global_samples, micro_batch, data_ranks))
        self._decoders = ThreadPoolExecutor(data.workers, thread_name_prefix="decode") if data.workers else None
        self._fetchers = ThreadPoolExecutor(data.downloads, thread_name_prefix="fetch") if data.workers else None
        cache = ShardCache(data.cache) if data.cache else None
        self._readers = [
            ShardReader(addresses.folder_of(data.sources[name]), manifest, cache, fetchers=self._fetchers)
            for name, manifest in manifests.items()
        ]
        self.sources = tuple(manifests) if len(manifests) > 1 else ()
        self.seed, self.global_samples, self.micro_batch = seed, global_samples, micro_batch
        self.data_step = data_step
        self._ahead = data.prefetch_batches if data.workers else 1
        self._pending: deque[Future[list[Batch]]] = deque()
        self._needed: deque[dict[int, list[int]]] = deque()
        self._next = data_step
        self._read = self._unreadable = 0
        self._waited_s = 0.0
        self._named: set[str] = set()
        self._lock = threading.Lock()

    def take(self, device: torch.device | str = "cpu") -> list[Batch]:
        """The micro-batches of the next global batch, in order, on a device.

        Raises:
            UserError: a shard is missing or damaged.
        """
        moved = [batch.to(torch.device(device)) for batch in self.take_stored()]
        return [replace(batch, states=self._codecs.finish(batch.states, batch.keys)) for batch in moved]

    def take_stored(self) -> list[Batch]:
        """`take`, with states as they are stored (uint8 pixels, means and deviations of latents), on the CPU."""
        if not self._reads:
            self.data_step += 1
            return []
        began = time.perf_counter()
        self._plan()
        batches = self._pending.popleft().result()
        self._waited_s += time.perf_counter() - began
        self._needed.popleft()
        self.data_step += 1
        self._read += sum(len(batch.weight) for batch in batches)
        self._unreadable += sum(int((batch.weight == 0).sum()) for batch in batches)
        return batches

    def names(self, data_step: int) -> list[str]:
        """Of this rank's samples of a global batch, read or not yet, as Batch.ids; their shards are opened."""
        step = self._mixture.step(data_step, self._slots, self.global_samples)
        names = []
        for source, number, offset in zip(step.source.tolist(), step.shard.tolist(), step.offset.tolist(), strict=True):
            try:
                key = self._readers[source].shard(number).key(offset)
            except UserError:  # the shard is gone or damaged
                key = f"sample number {offset}"
            names.append(self._name(source, number, key))
        return names

    def fingerprint(self) -> str:
        """A hash of the sources' manifests, which list every shard."""
        digest = hashlib.blake2b(digest_size=8)
        for reader in self._readers:
            digest.update(repr(reader.manifest).encode())
        return digest.hexdigest()

    def stats(self) -> LoaderStats:
        return LoaderStats(self._read, self._unreadable, self._waited_s)

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to continue from here: a single integer."""
        return {"data_step": self.data_step}

    def load_state(self, state: dict[str, Any]) -> None:
        self.skip_to(state["data_step"])

    def skip_to(self, data_step: int) -> None:
        """Take the global batch number `data_step` next."""
        for future in self._pending:
            future.cancel()
        self._pending.clear()
        self._needed.clear()
        self.data_step = self._next = data_step

    def close(self) -> None:
        """Stop the threads."""
        for pool in (self._decoders, self._fetchers):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def _plan(self) -> None:
        """Start the next global batches, and the fetching of the shards after them."""
        while len(self._pending) < self._ahead:
            step = self._mixture.step(self._next, self._slots, self.global_samples)
            self._needed.append(self._shards_of(step))
            self._expect()
            self._pending.append(self._submit(step, self._next))
            self._next += 1

    def _shards_of(self, step: StepSamples) -> dict[int, list[int]]:
        """The shards of a step and of the steps soon after it, by source."""
        needed = self._mixture.shards_ahead(self._next, self._slots, self.global_samples)
        for source in needed:
            now = np.unique(step.shard[step.source == source]).tolist()
            needed[source] = list(dict.fromkeys([*now, *needed[source]]))
        return needed

    def _expect(self) -> None:
        for source, reader in enumerate(self._readers):
            reader.expect(dict.fromkeys(shard for needed in self._needed for shard in needed.get(source, ())))

    def _submit(self, step: StepSamples, data_step: int) -> Future[list[Batch]]:
        if self._decoders is not None:
            return self._decoders.submit(self._decode, step, data_step)
        done: Future[list[Batch]] = Future()
        done.set_result(self._decode(step, data_step))
        return done

    def _decode(self, step: StepSamples, data_step: int) -> list[Batch]:
        keys = rng.sample_keys(self.seed, torch.from_numpy(step.epoch), torch.from_numpy(step.number), data_step)
        bucket = None if step.bucket is None else Bucket.parse(step.bucket)
        shards: dict[tuple[int, int], Shard] = {}
        samples: list[Views] = []
        names = []
        for source, number, offset in zip(step.source.tolist(), step.shard.tolist(), step.offset.tolist(), strict=True):
            shard = shards.get((source, number))
            if shard is None:
                shard = shards[source, number] = self._readers[source].shard(number)
            names.append(self._name(source, number, shard.key(offset)))
            samples.append(shard.views(offset))
        slots = torch.tensor(list(self._slots))
        sources = [self.sources[source] for source in step.source.tolist()] if self.sources else []
        parts = [slice(start, start + self.micro_batch) for start in range(0, len(samples), self.micro_batch)]
        return [
            self._batch(samples[part], keys[part], slots[part], names[part], sources[part], bucket, data_step) for part in parts
        ]

    def _batch(
        self,
        samples: Sequence[Views],
        keys: Tensor,
        slots: Tensor,
        names: Sequence[str],
        sources: Sequence[str],
        bucket: Bucket | None,
        data_step: int,
    ) -> Batch:
        values, features, errors = self._codecs.load(samples, keys.tolist(), bucket)
        weight = torch.ones(len(samples))
        for place, error in sorted(errors.items()):
            self._report(names[place], error)
            weight[place] = 0
        return Batch(values, keys, slots, weight, tuple(names), data_step, self.global_samples, features, tuple(sources))

    def _name(self, source: int, shard: int, key: str) -> str:
        prefix = f"{self.sources[source]}/" if self.sources else ""
        return f"{prefix}{self._readers[source].manifest.shards[shard].name}/{key}"

    def _report(self, name: str, error: SampleError) -> None:
        with self._lock:
            if name in self._named or len(self._named) == _NAMED_IN_LOG:
                return
            self._named.add(name)
            log.warning("sample %s is skipped: %s", name, error)
            if len(self._named) == _NAMED_IN_LOG:
                log.warning("further unreadable samples are counted, not named")


@dataclass(frozen=True)
class HeldOut:
    """Some samples of a source in a fixed shuffled order: clean states [N, ...] per modality, and names."""

    states: dict[str, Tensor]
    ids: list[str]


class ShuffledSamples:
    """The samples of a manifest in a fixed shuffled order, read by number; many neighbours in it share a shard.

    All have the model's own size: pictures are cropped to it, latents of other buckets are left out.
    """

    def __init__(self, address: str, data: Data, model: Model, seed: int = 0) -> None:
        """Raises UserError if the manifest cannot be read, or holds no sample of the model's size."""
        manifest = read_manifest(address)
        check_manifest(address, manifest, data, model)
        self._codecs = _Codecs(data, model)
        self._reader = ShardReader(addresses.folder_of(address), manifest, ShardCache(data.cache) if data.cache else None)
        self._shards = _of_own_size(address, manifest, data, model)
        sizes = [manifest.shards[number].samples for number in self._shards]
        self._order = Order(sizes, lanes=1, block_shards=_HELD_OUT_BLOCK, seed=seed, name="held out")

    def __len__(self) -> int:
        return self._order.samples

    def read(self, number: int) -> tuple[str, dict[str, Tensor]] | None:
        """A sample's name and clean states; None, with a warning, if it cannot be decoded.

        Raises:
            UserError: its shard cannot be read.
        """
        place, shard, offset = self._find(number)
        values, _, errors = self._codecs.load([shard.views(offset)], [0])
        if errors:
            name = self._reader.manifest.shards[place].name
            log.warning("sample %s/%s is skipped: %s", name, shard.key(offset), errors[0])
            return None
        states = self._codecs.finish(values, rng.sample_keys(0))
        return shard.key(offset).rpartition("/")[2], {name: state[0] for name, state in states.items()}

    def members(self, number: int) -> Views:
        """A sample's members. Raises UserError if its shard cannot be read."""
        _, shard, offset = self._find(number)
        return shard.views(offset)

    def _find(self, number: int) -> tuple[int, Shard, int]:
        """(place of its shard in the manifest, shard, place in it) of a sample."""
        visits = self._order.visits(0, number, 1)
        place = self._shards[int(visits.shard[0])]
        return place, self._reader.shard(place), int(visits.offset[0])


def _of_own_size(address: str, manifest: Manifest, data: Data, model: Model) -> list[int]:
    """Indices of the shards whose latents fill the model's grids; all shards without buckets of latents."""
    own: set[str] = set()
    for name, field_ in data.fields.items():
        facts, space = manifest.facts.get("encoded", {}).get(getattr(field_, "member", None), {}), model.modalities[name].space
        if "factor" in facts and isinstance(space, GridSpace):
            own.add(str(Bucket(space.height * facts["factor"], space.width * facts["factor"])))
    shards = [i for i, shard in enumerate(manifest.shards) if shard.bucket is None or not own or shard.bucket in own]
    if not shards:
        raise DataError(f"{address} has no shards of the bucket {', '.join(own)}, which is the model's own size")
    return shards


def read_held_out(address: str, data: Data, model: Model, count: int, seed: int = 0) -> HeldOut:
    """The first `count` readable samples (or all, if there are fewer) of a manifest, shuffled by `seed`.

    Raises:
        UserError: the manifest or a shard cannot be read, or no sample can.
    """
    source = ShuffledSamples(address, data, model, seed)
    readable = (found for number in range(len(source)) if (found := source.read(number)) is not None)
    samples = list(islice(readable, count))
    if not samples:
        raise DataError(f"{address} holds no sample that can be read")
    return HeldOut(_stacked([states for _, states in samples]), [name for name, _ in samples])


def _stacked(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
