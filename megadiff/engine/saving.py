"""Pieces to a checkpoint and back. All functions here are collective."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from megadiff.config.layout import Layout
from megadiff.config.run_folder import CheckpointsFolder
from megadiff.config.schema import Checkpointing
from megadiff.distributed.reduce import gather_objects, raise_together
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
    tensor_key,
)
from megadiff.weights.fence import Fence
from megadiff.weights.universal import open_source


class WeightReader(Protocol):
    """What weights come from."""

    def read(self, kind: str, parameter: str, extent: Extent) -> Tensor: ...


def save(
    checkpoints: CheckpointsFolder,
    step: int,
    pieces: Pieces,
    ema: Ema,
    layout: Layout,
    *,
    stage: str,
    progress: Mapping[str, Any],
    config: str,
    rule: Checkpointing,
    fence: Fence | None,
) -> Path:
    """Write and publish a checkpoint; `latest` changes when all of it is on the disk.

    Raises:
        CheckpointError: on all ranks, if one cannot write, or a newer start of the run has taken the fence.
    """
    token = "" if fence is None else fence.token
    try:
        with all_or_none(checkpoints.root):
            if layout.leads:
                if fence is not None:
                    fence.check()
                checkpoint.begin(checkpoints, step, token)
        entry: FileEntry | None = None
        with all_or_none(checkpoints.root):
            entry = checkpoint.write_rank_file(checkpoints.partial(step, token), layout.rank, *_tensors(pieces, ema))
        files = [file for file in gather_objects(entry) if file is not None]
        parameters = {name: parameter for part in gather_objects(_parameters(pieces)) for name, parameter in part.items()}
        with all_or_none(checkpoints.root):
            if layout.leads:
                manifest = CheckpointManifest(stage, parameters, tuple(ema.profiles), dict(progress), config, tuple(files))
                if fence is not None:
                    fence.check()
                checkpoint.publish(checkpoints, step, manifest, rule, token)
    except CheckpointError:
        if layout.leads:
            checkpoint.abandon(checkpoints, step, token)
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
def all_or_none(place: Path) -> Iterator[None]:
    """Raise on all ranks if the block's work on the disk fails on one. Collective at its end.

    Raises:
        CheckpointError: the block's own, or the disk is full, read-only, or gone.
    """
    error: CheckpointError | None = None
    try:
        yield
    except CheckpointError as fault:
        error = fault
    except (OSError, SafetensorError) as fault:
        error = CheckpointError(f"a checkpoint cannot be written to {place}: {fault}; what was saved before is still there")
    raise_together(error)


def _tensors(pieces: Pieces, ema: Ema) -> tuple[dict[str, Tensor], dict[str, Extent]]:
    """The tensors that this rank saves, and by name the part of the parameter that they are."""
    tensors: dict[str, Tensor] = {}
    extents: dict[str, Extent] = {}
    for index, piece in enumerate(pieces.trained):
        if not piece.owned:
            continue
        extents[piece.name] = piece.extent
        tensors[tensor_key("weight", piece.name)] = piece.master.cpu()
        for kind in MOMENTS:
            tensors[tensor_key(kind, piece.name)] = piece.moment(pieces.optimizer, kind).cpu()
        for profile, averages in ema.averages.items():
            tensors[tensor_key(f"ema.{profile}", piece.name)] = averages[index].cpu()
    for frozen in pieces.frozen:
        if frozen.extent.size:
            extents[frozen.name] = frozen.extent
            tensors[tensor_key("weight", frozen.name)] = frozen.master
    return tensors, extents


def _parameters(pieces: Pieces) -> dict[str, tuple[Shape, bool]]:
    """By name the whole shape, and whether the parameter is trained."""
    frozen = {piece.name for piece in pieces.frozen}
    return {name: (shape, name not in frozen) for name, shape in pieces.shapes.items()}
