"""Tools for checkpoints on a machine without a GPU: inspect, compare, and consolidate into one file.

All of them stream: a piece of one parameter is in memory at a time.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megadiff.models.names import part_of
from megadiff.weights.boxes import Extent
from megadiff.weights.checkpoint import MOMENTS, CheckpointError, CheckpointReader

PIECE = 16 * 2**20
"""Elements per read: 64 MiB of float32."""


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) ranges that cover `size` elements."""
    for start in range(0, size, PIECE):
        yield start, min(start + PIECE, size)


# ------------------------------------------------------------------------------------------------------------ looking


@dataclass(frozen=True)
class ParameterCounts:
    """How many numbers the parameters of one part of the model have, trained and frozen."""

    trained: int
    frozen: int


def parameter_counts(reader: CheckpointReader) -> dict[str, ParameterCounts]:
    """By part of the model (see models.names.part_of)."""
    counts: dict[str, ParameterCounts] = {}
    for name, (shape, trained) in reader.manifest.parameters.items():
        size, before = math.prod(shape), counts.get(part_of(name), ParameterCounts(0, 0))
        counts[part_of(name)] = ParameterCounts(before.trained + size * trained, before.frozen + size * (not trained))
    return counts


def faults(reader: CheckpointReader, checked: Callable[[], object]) -> list[str]:
    """The faults of a checkpoint's files, one sentence each: wrong hashes, and elements that no file or two files hold.

    Args:
        checked: called after each file.
    """
    sentences = []
    for entry in reader.manifest.files:
        if reader.damaged([entry]):
            sentences.append(f"{entry.name} is damaged (its hash differs)")
        checked()
    for name, (shape, _) in reader.manifest.parameters.items():
        runs = [entry.extents[name].runs(shape).tolist() for entry in reader.manifest.files if name in entry.extents]
        end = 0
        for start, stop in sorted((start, start + length) for part in runs for start, _, length in part):
            if start != end:
                sentences.append(f"{name}: elements {end} to {start} are {'missing' if start > end else 'held twice'}")
            end = max(end, stop)
        if end != math.prod(shape):
            sentences.append(f"{name}: {end} of {math.prod(shape)} elements are held")
    return sentences


# ---------------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Difference:
    """The difference of one parameter: |a - b| / |a| over all its numbers, and the largest |a - b|; or why there is none."""

    name: str
    relative: float
    largest: float
    reason: str = ""


def differences(one: CheckpointReader, other: CheckpointReader, kind: str) -> Iterator[Difference]:
    """Every parameter of either checkpoint that is not equal to the bit in the other.

    Args:
        kind: weight, ema.<profile>, exp_avg or exp_avg_sq.
    """
    both = [reader.manifest.parameters for reader in (one, other)]
    for name in sorted({*both[0], *both[1]}):
        missing = [reader.folder for reader, parameters in zip((one, other), both, strict=True) if name not in parameters]
        if missing:
            yield Difference(name, math.inf, math.inf, f"is not in {missing[0]}")
            continue
        (shape, trained), (other_shape, other_trained) = both[0][name], both[1][name]
        if shape != other_shape:
            yield Difference(name, math.inf, math.inf, f"has shape {shape} and {other_shape}")
            continue
        if kind in MOMENTS and not (trained and other_trained):
            continue
        squares, own, largest = 0.0, 0.0, 0.0
        for start, stop in pieces(math.prod(shape)):
            left, right = (reader.read(kind, name, Extent(start, stop)).double() for reader in (one, other))
            apart = left - right
            squares, own = squares + float(apart.square().sum()), own + float(left.square().sum())
            largest = max(largest, float(apart.abs().max()))
        if largest or math.isnan(squares):
            yield Difference(name, math.sqrt(squares / own) if own else math.inf, largest)


# ------------------------------------------------------------------------------------------------------ consolidating


def consolidate(reader: CheckpointReader, kind: str, out: Path, wrote: Callable[[], object]) -> None:
    """Write all parameters whole, float32, to one safetensors file, which gets its name when it is complete.

    Args:
        kind: as for `differences`; moments leave out frozen parameters, which have none.
        wrote: called after each parameter.

    Raises:
        CheckpointError: `out` is there already, or cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out} is there already; name a new file")
    header: dict[str, dict[str, object]] = {}
    offset = 0
    shapes = {name: shape for name, (shape, trained) in reader.manifest.parameters.items() if trained or kind not in MOMENTS}
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt", "kind": kind}, **header}).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to 8 bytes
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, shape in shapes.items():
                for start, stop in pieces(math.prod(shape)):
                    file.write(reader.read(kind, name, Extent(start, stop)).numpy().tobytes())
                wrote()
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{out} cannot be written: {error.strerror}") from None
