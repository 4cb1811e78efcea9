"""A run of one small parameter, and the copies of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadiff.config.load import dump_run, load_run
from megadiff.config.run_folder import CheckpointsFolder
from megadiff.config.schema import Checkpointing
from megadiff.storage import store
from megadiff.weights import checkpoint
from megadiff.weights.boxes import Extent, whole
from megadiff.weights.checkpoint import CheckpointManifest, CheckpointReader, tensor_key
from megadiff.weights.remote import RemoteCheckpoints

CONFIG = dump_run(load_run("tests/tiny.yaml"))
NUMBERS = 1000


def published(checkpoints: CheckpointsFolder, step: int) -> Path:
    """A checkpoint in two files; all numbers are its step."""
    checkpoint.begin(checkpoints, step)
    files = []
    for rank, (start, stop) in enumerate(((0, 400), (400, NUMBERS))):
        tensors = {tensor_key("weight", "a"): torch.full((stop - start,), float(step))}
        files.append(checkpoint.write_rank_file(checkpoints.partial(step), rank, tensors, {"a": Extent(start, stop)}))
    manifest = CheckpointManifest(
        "first", {"a": ((NUMBERS,), False)}, ("main",), {"optimizer_step": step}, CONFIG, tuple(files)
    )
    return checkpoint.publish(checkpoints, step, manifest, Checkpointing(keep=9))


def copied(run: str, folder: Path, *steps: int, **rule: Any) -> RemoteCheckpoints:
    """Copies of checkpoints of the first stage."""
    remote = RemoteCheckpoints(run, "first")
    for step in steps:
        remote.copy(published(CheckpointsFolder(folder), step), CONFIG, Checkpointing(**rule), lambda: None)
    return remote


def numbers(folder: Path) -> Tensor:
    reader = CheckpointReader(folder)
    assert reader.damaged(reader.manifest.files) == []
    return reader.read("weight", "a", whole((NUMBERS,)))


def spoil(address: str) -> None:
    """Change one byte of an object."""
    content = bytearray(store.read_bytes(address))
    content[-1] ^= 1
    store.write_bytes(address, bytes(content))
