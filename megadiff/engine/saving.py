"""Pieces to a checkpoint and back. All functions here are collective."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megadiff.config.errors import UserError
from megadiff.config.layout import Layout
from megadiff.config.run_folder import CheckpointsFolder, step_of
from megadiff.config.schema import Stage
from megadiff.distributed.joining import software
from megadiff.distributed.reduce import any_rank, gather_objects, raise_together
from megadiff.engine.ema import Ema
from megadiff.engine.pieces import Pieces, Shape
from megadiff.weights import checkpoint
from megadiff.weights.boxes import Extent
from megadiff.weights.checkpoint import (
    MOMENTS,
    CheckpointError,
    CheckpointManifest,
    DamagedCheckpoint,
    FileEntry,
    WeightSource,
    read_manifest,
    tensor_key,
)
from megadiff.weights.fence import Fence
from megadiff.weights.remote import RemoteCheckpoints, fetch_files, fetch_manifest
from megadiff.weights.universal import open_source

RESTORED = "restored"
"""In place of a start's token, in the name of the folder that a copy is downloaded to."""


class WeightReader(Protocol):
    """What weights come from."""

    def read(self, kind: str, parameter: str, extent: Extent) -> Tensor: ...


@dataclass(frozen=True)
class Published:
    """A checkpoint that is whole and has its name.

    Attributes:
        stalled_s: seconds that training waited for it on this rank: for the copy, and for what is done together.
        took_s: seconds from the moment that it holds to its publication.
    """

    folder: Path
    step: int
    stalled_s: float
    took_s: float


@dataclass
class _Pending:
    """A checkpoint that the ranks still write."""

    step: int
    progress: dict[str, Any]
    config: str
    file: Future[FileEntry]
    began: float
    stalled_s: float = 0.0


class Saver:
    """Writes a stage's checkpoints, one at a time, each by a thread of every rank.

    With `checkpoint.asynchronous` the thread writes a copy in host memory, and steps go on meanwhile. All methods but `close`
    are collective, and only they change what is published: what a thread has not finished, nobody sees.
    """

    def __init__(
        self,
        checkpoints: CheckpointsFolder,
        pieces: Pieces,
        ema: Ema,
        layout: Layout,
        device: torch.device,
        stage: Stage,
        fence: Fence | None,
        copy_failed: Callable[[int, str], None],
    ) -> None:
        """Allocate nothing yet.

        Args:
            fence: of this start of the run, if others may follow it.
            copy_failed: is told, on the first rank, of the step of a checkpoint that could not be copied, and why.
        """
        self._checkpoints, self._pieces, self._ema, self._layout, self._device = checkpoints, pieces, ema, layout, device
        self._stage, self._token = stage, "" if fence is None else fence.token
        self._check_fence = _nothing if fence is None else fence.check
        self._parameters = {name: each for part in gather_objects(_parameters(pieces)) for name, each in part.items()}
        self._software = software() if layout.leads else {}
        self._host: dict[str, Tensor] = {}
        self._pending: _Pending | None = None
        self._thread, self._copier = ThreadPoolExecutor(1, "checkpoint"), ThreadPoolExecutor(1, "checkpoint copy")
        self._remote = remote_of(stage) if layout.leads else None
        self._copy: tuple[int, Future[None]] | None = None
        self._copy_failed = copy_failed

    def begin(self, progress: Mapping[str, Any], config: str) -> None:
        """Begin a checkpoint of this moment, of the step `progress["optimizer_step"]`. The one before has to be published.

        Raises:
            CheckpointError: on all ranks, if the folder cannot be made, or a newer start of the run has taken the fence.
        """
        assert self._pending is None
        began, step = time.perf_counter(), progress["optimizer_step"]
        with self._abandoned_on_failure(step), all_or_none(self._checkpoints.root):
            if self._layout.leads:
                self._check_fence()
                checkpoint.begin(self._checkpoints, step, self._token)
        trained = _trained(self._pieces, self._ema)
        if self._stage.checkpoint.asynchronous:
            trained = self._copied(trained)
        tensors, folder = trained | _frozen(self._pieces), self._checkpoints.partial(step, self._token)
        rank, extents = self._layout.rank, _extents(self._pieces)
        file = self._thread.submit(checkpoint.write_rank_file, folder, rank, tensors, extents)
        self._pending = _Pending(step, dict(progress), config, file, began)
        self._pending.stalled_s = time.perf_counter() - began

    def publish_if_written(self) -> Published | None:
        """Publish the pending checkpoint if all ranks have written their files, and the one before is copied.

        Raises as `publish`.
        """
        if self._pending is None:
            return None
        copies = self._copy is not None and not self._copy[1].done()
        if any_rank(copies or not self._pending.file.done(), self._device):
            return None
        return self.publish()

    def publish(self) -> Published | None:
        """Wait until all ranks have written the pending checkpoint, if there is one, and publish it.

        Raises:
            CheckpointError: on all ranks, if one could not write, or a newer start of the run has taken the fence.
        """
        if self._pending is None:
            return None
        pending, self._pending, since = self._pending, None, time.perf_counter()
        entry: FileEntry | None = None
        with self._abandoned_on_failure(pending.step):
            with all_or_none(self._checkpoints.root):
                entry = pending.file.result()
            files = tuple(file for file in gather_objects(entry) if file is not None)
            self._end_copy()  # publication retires older checkpoints
            with all_or_none(self._checkpoints.root):
                if self._layout.leads:
                    profiles = tuple(self._ema.profiles)
                    manifest = CheckpointManifest(
                        self._stage.name, self._parameters, profiles, pending.progress, pending.config, files, self._software
                    )
                    self._check_fence()
                    checkpoint.publish(self._checkpoints, pending.step, manifest, self._stage.checkpoint, self._token)
        now = time.perf_counter()
        folder = self._checkpoints.step(pending.step)
        if self._remote is not None:
            copy = self._copier.submit(self._remote.copy, folder, pending.config, self._stage.checkpoint, self._check_fence)
            self._copy = pending.step, copy
        return Published(folder, pending.step, pending.stalled_s + now - since, now - pending.began)

    def go_back(self, folder: Path) -> None:
        """Let an earlier checkpoint be the newest, here and where the copies are.

        Raises:
            CheckpointError: on all ranks, as `begin`.
        """
        self._end_copy()
        with all_or_none(self._checkpoints.root):
            if self._layout.leads:
                self._check_fence()
                checkpoint.point_latest(self._checkpoints, folder)
        if self._remote is not None:
            self._copy = 0, self._copier.submit(self._remote.point_latest, folder)
            self._end_copy()

    def close(self) -> None:
        """Wait for this rank's threads; what is pending is never published, but what is published is copied."""
        self._thread.shutdown()
        self._end_copy()
        self._copier.shutdown()

    def _end_copy(self) -> None:
        if self._copy is None:
            return
        (step, copy), self._copy = self._copy, None
        try:
            copy.result()
        except (UserError, OSError) as error:
            self._copy_failed(step, str(error))

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in host memory that is taken once and used for every checkpoint."""
        for key, tensor in tensors.items():
            if key not in self._host:
                self._host[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._host[key].copy_(tensor, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._host

    @contextmanager
    def _abandoned_on_failure(self, step: int) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            if self._layout.leads:
                checkpoint.abandon(self._checkpoints, step, self._token)
            raise


def remote_of(stage: Stage) -> RemoteCheckpoints | None:
    """Where a stage's checkpoints are copied to."""
    return RemoteCheckpoints(stage.checkpoint.remote, stage.name) if stage.checkpoint.remote else None


def copies(remote: RemoteCheckpoints, layout: Layout) -> list[str]:
    """The addresses of a stage's copies, the newest first.

    Raises:
        StorageError: on all ranks, if the first one cannot reach them.
    """
    found: list[str] | None = None
    with all_or_none(remote.root):
        if layout.leads:
            found = remote.newest_first()
    return next(each for each in gather_objects(found) if each is not None)


def restore(address: str, checkpoints: CheckpointsFolder, layout: Layout) -> Path:
    """Download a copy to where it was written first, each rank its share of the files; returns the folder.

    Raises:
        DamagedCheckpoint: on all ranks, if it is damaged; nothing of it stays.
        UserError: on all ranks, if it cannot be read, or not be written here.
    """
    step = step_of(address.rpartition("/")[2])
    assert step is not None
    partial = checkpoints.partial(step, RESTORED)
    try:
        with all_or_none(checkpoints.root):
            if layout.leads:
                checkpoint.begin(checkpoints, step, RESTORED)
                fetch_manifest(address, partial)
        with all_or_none(checkpoints.root):
            fetch_files(address, partial, read_manifest(partial).files[layout.rank :: layout.world])
        with all_or_none(checkpoints.root):
            if layout.leads:
                checkpoint.give_name(checkpoints, step, RESTORED)
    except UserError:
        if layout.leads:
            checkpoint.abandon(checkpoints, step, RESTORED)
        raise
    return checkpoints.step(step)


def all_shapes(pieces: Pieces) -> dict[str, Shape]:
    """By name, the whole shape of every parameter of the model: a rank may hold a part of its layers. Collective."""
    return {name: shape for part in gather_objects(pieces.shapes) for name, shape in part.items()}


def open_checkpoint(folder: Path, layout: Layout) -> WeightSource:
    """A reader of a folder, ours or DeepSpeed's universal, after the ranks have checked its files' checksums between them.

    Raises:
        DamagedCheckpoint: on all ranks, if it is damaged.
        CheckpointError: on all ranks, if it cannot be read.
    """
    error: CheckpointError | None = None
    reader: WeightSource | None = None
    try:
        reader = open_source(folder)
        damaged = reader.damaged(reader.manifest.files[layout.rank :: layout.world])
        if damaged:
            error = DamagedCheckpoint(f"{folder}: {', '.join(damaged)} is damaged (its checksum differs); delete {folder}")
    except CheckpointError as fault:
        error = fault
    except OSError as fault:
        error = CheckpointError(f"{folder} cannot be read: {fault}")
    raise_together(error)
    return reader  # type: ignore[return-value]


def load_weights(reader: WeightReader, kind: str, names: set[str], pieces: Pieces) -> None:
    """Read the masters of the named parameters and publish them."""
    with torch.no_grad():
        for piece in pieces.trained:
            if piece.name in names:
                piece.master.copy_(reader.read(kind, piece.name, piece.extent))
        for frozen in pieces.frozen:
            if frozen.name in names:
                frozen.write(reader.read(kind, frozen.name, frozen.local_extent))
    pieces.publish()


def load_state(reader: WeightSource, pieces: Pieces, ema: Ema) -> None:
    """Read the moments and the averages, and their numbers of updates."""
    with torch.no_grad():
        for index, piece in enumerate(pieces.trained):
            for kind in MOMENTS:
                piece.moment(pieces.optimizer, kind).copy_(reader.read(kind, piece.name, piece.extent))
            for profile, averages in ema.averages.items():
                averages[index].copy_(reader.read(f"ema.{profile}", piece.name, piece.extent))
    pieces.set_adam_steps(reader.manifest.progress["adam_steps"])
    ema.updates = reader.manifest.progress["ema_updates"]


def check_same_profiles(reader: WeightSource, profiles: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a checkpoint lacks an EMA profile of the stage."""
    missing = [name for name in profiles if name not in reader.manifest.ema]
    if missing:
        raise CheckpointError(
            f"{reader.folder} has no EMA profile {', '.join(missing)} (it has {', '.join(reader.manifest.ema)}); "
            "a profile cannot be added in the middle of a stage"
        )


@contextmanager
def all_or_none(place: Path | str) -> Iterator[None]:
    """Raise on all ranks if the block's work on the disk fails on one. Collective at its end.

    Raises:
        UserError: the block's own.
        CheckpointError: the disk is full, read-only, or gone.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as fault:
        error = fault
    except OSError as fault:
        error = CheckpointError(f"a checkpoint cannot be written to {place}: {fault}; what was saved before is still there")
    raise_together(error)


def _trained(pieces: Pieces, ema: Ema) -> dict[str, Tensor]:
    """By key, the tensors that this rank saves and that the next step changes."""
    tensors: dict[str, Tensor] = {}
    for index, piece in enumerate(pieces.trained):
        if piece.owned:
            tensors[tensor_key("weight", piece.name)] = piece.master
            for kind in MOMENTS:
                tensors[tensor_key(kind, piece.name)] = piece.moment(pieces.optimizer, kind)
            for profile, averages in ema.averages.items():
                tensors[tensor_key(f"ema.{profile}", piece.name)] = averages[index]
    return tensors


def _frozen(pieces: Pieces) -> dict[str, Tensor]:
    """By key, the tensors that this rank saves and that no step changes; in host memory."""
    return {tensor_key("weight", piece.name): piece.master for piece in pieces.frozen if piece.extent.size}


def _extents(pieces: Pieces) -> dict[str, Extent]:
    """By name, the part of the parameter that this rank saves."""
    trained = {piece.name: piece.extent for piece in pieces.trained if piece.owned}
    return trained | {piece.name: piece.extent for piece in pieces.frozen if piece.extent.size}


def _parameters(pieces: Pieces) -> dict[str, tuple[Shape, bool]]:
    """By name the whole shape, and whether the parameter is trained."""
    frozen = {piece.name for piece in pieces.frozen}
    return {name: (shape, name not in frozen) for name, shape in pieces.shapes.items()}


def _nothing() -> None:
    """Nothing is fenced."""
