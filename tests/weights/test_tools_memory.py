"""The tools hold pieces, whatever the size of a checkpoint: anonymous memory, that is, without the pages of mapped files."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megadiff.config.run_folder import CheckpointsFolder
from megadiff.config.schema import Checkpointing
from megadiff.files import sha256
from megadiff.weights import checkpoint
from megadiff.weights.boxes import Extent
from megadiff.weights.checkpoint import MOMENTS, CheckpointManifest, FileEntry, tensor_key
from tests.forks import start_forked

MIB = 2**20
KINDS = ("weight", *MOMENTS, "ema.main")
TENSOR_RANKS, DATA_RANKS = 2, 2


def extent_of(shape: tuple[int, int], columns: bool, tensor_rank: int, data_rank: int) -> Extent:
    """A range of the whole parameter, or of the box that has half of the columns."""
    rows, width = shape
    half = width // TENSOR_RANKS
    box = ((0, rows), (half * tensor_rank, half * (tensor_rank + 1)))
    part = rows * width // (TENSOR_RANKS * DATA_RANKS)
    index = data_rank if columns else data_rank + DATA_RANKS * tensor_rank
    return Extent(part * index, part * (index + 1), (box,) if columns else None)


def publish(folder: Path, shapes: list[tuple[int, int]]) -> tuple[Path, int]:
    """A checkpoint of 2 tensor x 2 data ranks, every other parameter split by columns, all zeros in files with holes.

    Returns:
        Its folder, and the bytes of its files.
    """
    checkpoints = CheckpointsFolder(folder)
    checkpoint.begin(checkpoints, 1)
    names = {f"joint.{index}.weight": shape for index, shape in enumerate(shapes)}
    header, end = {}, 0
    for name, (rows, width) in names.items():
        for kind in KINDS:
            size = rows * width // (TENSOR_RANKS * DATA_RANKS)
            header[tensor_key(kind, name)] = {"dtype": "F32", "shape": [size], "data_offsets": [end, end + 4 * size]}
            end += 4 * size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    files: list[FileEntry] = []
    for rank in range(TENSOR_RANKS * DATA_RANKS):
        path = checkpoints.partial(1) / f"rank_{rank:05d}.safetensors"
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        digest = files[0].sha256 if files else sha256(path)  # the files are all alike
        extents = {
            name: extent_of(shape, index % 2 == 1, *divmod(rank, DATA_RANKS))
            for index, (name, shape) in enumerate(names.items())
        }
        files.append(FileEntry(path.name, path.stat().st_size, digest, extents))
    parameters = {name: (shape, True) for name, shape in names.items()}
    progress = {"optimizer_step": 1, "adam_steps": 1}
    manifest = CheckpointManifest("first", parameters, ("main",), progress, "config", tuple(files))
    return checkpoint.publish(checkpoints, 1, manifest, Checkpointing()), sum(entry.bytes for entry in files)


def peak(*arguments: str, timeout_s: float = 120) -> int:
    """The largest anonymous memory, in bytes, of a command line of megadiff that must succeed."""
    process = start_forked(["-m", "megadiff", *arguments], environment={}, turn=0)
    most, deadline = 0, time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        most = max(most, *anonymous(process.pid))
        time.sleep(0.001)
    process.kill()
    outputs = process.communicate(timeout=10)
    assert process.returncode == 0, outputs
    return most


def anonymous(pid: int) -> Iterator[int]:
    yield 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                yield int(line.split()[1]) * 1024
    except OSError:  # it has ended
        return


def peaks(folder: Path, out: Path, timeout_s: float = 120) -> dict[str, int]:
    """By verb."""
    source, universal = str(folder), str(out / "universal")
    verbs = {
        "inspect": [source],
        "verify": [source],
        "diff": [source, source],
        "consolidate": [source, str(out / "weights.safetensors")],
        "consolidate universal": [source, universal, "--format", "universal"],
        "verify universal": [universal],
        "diff universal": [source, universal, "--kind", "exp_avg_sq"],
    }
    return {verb: peak("checkpoint", verb.split()[0], *rest, timeout_s=timeout_s) for verb, rest in verbs.items()}


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied at once: pytest keeps those of the last three sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.distributed
def test_the_tools_hold_a_small_part_of_a_checkpoint(scratch: Path) -> None:
    folder, size = publish(scratch / "run", [(4096, 1024), (4096, 1024), (4096, 1024), (32768, 128)])
    assert size >= 256 * MIB
    found = peaks(folder, scratch)
    for verb, most in found.items():
        assert most - found["inspect"] < 96 * MIB, verb


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.distributed
def test_the_tools_take_8_gb_in_1_gb_of_memory(scratch: Path) -> None:
    folder, size = publish(scratch / "run", [(65536, 1024)] * 7 + [(262144, 256)])
    assert size >= 8 * 10**9
    found = peaks(folder, scratch, timeout_s=400)
    for verb, most in found.items():
        assert most < 10**9, verb
