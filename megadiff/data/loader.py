"""Shards and an order to micro-batches on the right rank, decoded ahead by threads."""

from __future__ import annotations

import io
import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.errors import ConfigError
from megadiff.config.schema import Data, Model, TokenSpace
from megadiff.data.encode import build_codecs
from megadiff.data.errors import DataError, SampleError
from megadiff.data.order import Order, Visit, generator
from megadiff.data.shards import Members, ShardReader, read_manifest
from megadiff.types import Batch

log = logging.getLogger(__name__)

FEWEST_READ = 200
"""An unreadable share is judged only after this many samples."""
_NAMED_IN_LOG = 20


@dataclass(frozen=True)
class LoaderStats:
    """Since this process began: samples taken by this rank, and those that could not be decoded."""

    read: int
    unreadable: int


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


class Sample(NamedTuple):
    """Clean states and precomputed features of one sample, by modality."""

    states: dict[str, Tensor]
    features: dict[str, Tensor]


@dataclass(frozen=True)
class FeatureReader:
    """Precomputed features of one modality: a NumPy array [S, F] in a member of the shards."""

    member: str
    shape: tuple[int, int]

    def read(self, members: Members) -> Tensor:
        """Float32 [S, F]. Raises SampleError if the member is missing, damaged or of another shape."""
        if self.member not in members:
            raise SampleError(f"it has no .{self.member} member (it has {', '.join(sorted(members)) or 'none'})")
        try:
            values = np.load(io.BytesIO(members[self.member]), allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise SampleError(f"its .{self.member} member is no NumPy array: {error}") from None
        if values.shape != self.shape:
            raise SampleError(f"its .{self.member} member has the shape {list(values.shape)}, not {list(self.shape)}")
        return torch.from_numpy(values.astype(np.float32))

    def blank(self) -> Tensor:
        return torch.zeros(self.shape)


class _Source:
    """Decodes one visit at a time. Thread-safe."""

    def __init__(
        self, address: str, data: Data, model: Model, in_memory: int = 64, features: Mapping[str, tuple[int, int]] | None = None
    ) -> None:
        self.features = {name: FeatureReader(data.features[name], shape) for name, shape in (features or {}).items()}
        self.manifest = read_manifest(address)
        self.reader = ShardReader(address, self.manifest, data.cache, in_memory)
        self.codecs = build_codecs(data, model)
        self.model = model

    def sample(self, shard: int, offset: int, key: int) -> Sample:
        """Raises SampleError if the sample cannot be decoded."""
        members = self.reader.members(shard, offset)
        states = {name: codec.encode(codec.read(members, key)) for name, codec in self.codecs.items()}
        return Sample(states, {name: reader.read(members) for name, reader in self.features.items()})

    def name(self, shard: int, offset: int) -> str:
        return f"{self.manifest.shards[shard].name}/{self.reader.shard(shard).key(offset)}"

    def blank(self) -> Sample:
        """States and features of the right shapes for a sample that cannot be read."""
        blank: dict[str, Tensor] = {}
        for name, modality in self.model.modalities.items():
            space = modality.space
            if isinstance(space, TokenSpace):
                blank[name] = torch.zeros(space.length, dtype=torch.int64)
            else:
                blank[name] = torch.zeros(space.channels, space.height, space.width)
        return Sample(blank, {name: reader.blank() for name, reader in self.features.items()})


class Loader:
    """This rank's micro-batches of one global batch after another; what they hold does not depend on workers or ranks."""

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
    ) -> None:
        """Start with global batch number `data_step`.

        Args:
            features: modalities whose precomputed features are read as well, with their shape (tokens, numbers).

        Raises:
            UserError: the manifest cannot be read, or lanes, ranks and batch do not divide.
        """
        # Lanes move through blocks of their own: each needs a block's shards at once, one more where it starts amid a shard,
        # and one of the next block.
        in_memory = -(-data.lanes // data_ranks) * (data.block_shards + 2)
        self._source = _Source(data.train, data, model, in_memory, features)
        self._order = Order([s.samples for s in self._source.manifest.shards], data.lanes, data.block_shards, seed)
        self._slots = self._order.slots_of_rank(data_rank, data_ranks, global_samples)
        if len(self._slots) % micro_batch:
            raise ConfigError(
                f"batch.micro_batch ({micro_batch}) must divide a rank's {len(self._slots)} samples of the global batch "
                f"({global_samples} over {data_ranks} ranks)"
            )
        self.seed, self.global_samples, self.micro_batch = seed, global_samples, micro_batch
        self.data_step = data_step
        self._ahead = data.prefetch_batches if data.workers else 0
        self._pool = ThreadPoolExecutor(data.workers, thread_name_prefix="loader") if data.workers else None
        self._pending: deque[Future[list[Batch]]] = deque()
        self._next = data_step
        self._read = self._unreadable = 0
        self._named: set[str] = set()
        self._lock = threading.Lock()

    def take(self) -> list[Batch]:
        """The micro-batches of the next global batch, in order.

        Raises:
            UserError: a shard is missing or damaged.
        """
        if self._pool is None:
            batches = self._step(self.data_step)
        else:
            while len(self._pending) < self._ahead:
                self._pending.append(self._pool.submit(self._step, self._next))
                self._next += 1
            batches = self._pending.popleft().result()
        self.data_step += 1
        self._read += sum(len(batch.weight) for batch in batches)
        self._unreadable += sum(int((batch.weight == 0).sum()) for batch in batches)
        return batches

    def stats(self) -> LoaderStats:
        return LoaderStats(self._read, self._unreadable)

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on from here; a few integers, however far the run is."""
        return {"data_step": self.data_step}

    def load_state(self, state: dict[str, Any]) -> None:
        self.skip_to(state["data_step"])

    def skip_to(self, data_step: int) -> None:
        """Take the global batch number `data_step` next."""
        for future in self._pending:
            future.cancel()
        self._pending.clear()
        self.data_step = self._next = data_step

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _step(self, data_step: int) -> list[Batch]:
        visits = self._order.slots(data_step, self.global_samples, self._slots)
        epochs = torch.tensor([visit.epoch for visit in visits])
        indices = torch.tensor([visit.index for visit in visits])
        keys = rng.sample_keys(self.seed, epochs, indices, data_step)
        parts = [slice(start, start + self.micro_batch) for start in range(0, len(visits), self.micro_batch)]
        slots = torch.tensor(list(self._slots))
        return [self._batch(visits[part], keys[part], slots[part], data_step) for part in parts]

    def _batch(self, visits: Sequence[Visit], keys: Tensor, slots: Tensor, data_step: int) -> Batch:
        samples: list[Sample] = []
        weights, names = [], []
        for visit, key in zip(visits, keys.tolist(), strict=True):
            names.append(self._source.name(visit.shard, visit.offset))
            try:
                samples.append(self._source.sample(visit.shard, visit.offset, key))
                weights.append(1.0)
            except SampleError as error:
                self._report(names[-1], error)
                samples.append(self._source.blank())
                weights.append(0.0)
        states, features = (_stacked([sample[part] for sample in samples]) for part in range(2))
        return Batch(states, keys, slots, torch.tensor(weights), tuple(names), data_step, self.global_samples, features)

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


class Shuffled:
    """The samples of a manifest in a fixed shuffled order, read by number."""

    def __init__(self, address: str, data: Data, model: Model, seed: int = 0) -> None:
        """Raises UserError if the manifest cannot be read."""
        self._source = _Source(address, data, model)
        shards = self._source.manifest.shards
        self._places = [(shard, offset) for shard, entry in enumerate(shards) for offset in range(entry.samples)]
        self._order = generator(seed, "held out").permutation(len(self._places))

    def __len__(self) -> int:
        return len(self._places)

    def read(self, number: int) -> tuple[str, dict[str, Tensor]] | None:
        """A sample's name and clean states; None, with a warning, if it cannot be decoded.

        Raises:
            UserError: its shard cannot be read.
        """
        shard, offset = self._places[self._order[number]]
        name = self._source.name(shard, offset)
        try:
            return name.rpartition("/")[2], self._source.sample(shard, offset, key=0).states
        except SampleError as error:
            log.warning("sample %s is skipped: %s", name, error)
            return None


def read_held_out(address: str, data: Data, model: Model, count: int, seed: int = 0) -> HeldOut:
    """The first `count` readable samples (or all, if there are fewer) of a manifest, shuffled by `seed`.

    Raises:
        UserError: the manifest or a shard cannot be read, or no sample can.
    """
    source = Shuffled(address, data, model, seed)
    readable = (found for number in range(len(source)) if (found := source.read(number)) is not None)
    samples = list(islice(readable, count))
    if not samples:
        raise DataError(f"{address} holds no sample that can be read")
    return HeldOut(_stacked([states for _, states in samples]), [name for name, _ in samples])


def _stacked(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
