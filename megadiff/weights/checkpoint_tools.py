"""Tools for checkpoints on a machine without a GPU: inspect, compare, and consolidate into one file.

All of them stream: a piece of one parameter is in memory at a time.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megadiff.models.names import part_of
from megadiff.weights.boxes import Extent
from megadiff.weights.checkpoint import MOMENTS, CheckpointError, WeightSource

PIECE = 2**20
"""Elements per read: 4 MiB of float32."""


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


def parameter_counts(reader: WeightSource) -> dict[str, ParameterCounts]:
    """By part of the model (see models.names.part_of)."""
    counts: dict[str, ParameterCounts] = {}
    for name, (shape, trained) in reader.manifest.parameters.items():
        size, before = math.prod(shape), counts.get(part_of(name), ParameterCounts(0, 0))
        counts[part_of(name)] = ParameterCounts(before.trained + size * trained, before.frozen + size * (not trained))
    return counts


def faults(reader: WeightSource, checked: Callable[[], object]) -> list[str]:
    """The faults of a checkpoint, one sentence each: files with wrong checksums, and parameters of which no file or two files
    hold some elements.

    Args:
        checked: called after each file.
    """
    sentences = []
    for entry in reader.manifest.files:
        if reader.damaged([entry]):
            sentences.append(f"{entry.name} is damaged (its checksum differs)")
        checked()
    for name, (shape, _) in reader.manifest.parameters.items():
        extents = [entry.extents[name] for entry in reader.manifest.files if name in entry.extents]
        if fault := _coverage_fault(extents, shape):
            sentences.append(f"{name}: {fault}")
    return sentences


def _coverage_fault(extents: Sequence[Extent], shape: Sequence[int]) -> str | None:
    """The first reason why extents do not contain every element of a parameter exactly once."""
    size, end = math.prod(shape), 0
    for start, stop in pieces(max([size, *(extent.span(shape)[1] for extent in extents)])):
        runs = np.concatenate([np.empty((0, 3), np.int64), *(extent.runs(shape, (start, stop)) for extent in extents)])
        runs = runs[runs[:, 0].argsort()]
        begins, ends = runs[:, 0], np.maximum.accumulate(runs[:, 0] + runs[:, 2])
        before = np.concatenate([[end], ends])
        uneven = np.flatnonzero(begins != before[:-1])
        if len(uneven):
            first, last = int(before[uneven[0]]), int(begins[uneven[0]])
            return f"elements {first} to {last} are {'missing' if last > first else 'held twice'}"
        end = int(before[-1])
    return None if end == size else f"{end} of {size} elements are held"


# ---------------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Difference:
    """The difference of one parameter: |a - b| / |a| over all its numbers, and the largest |a - b|; or why there is none."""

    name: str
    relative: float
    largest: float
    reason: str = ""


def differences(one: WeightSource, other: WeightSource, kind: str) -> Iterator[Difference]:
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
            values = one.read(kind, name, Extent(start, stop)).double()
            own += float(values.dot(values))
            values -= other.read(kind, name, Extent(start, stop))
            squares += float(values.dot(values))
            largest = max(largest, float(torch.linalg.vector_norm(values, math.inf)))
        if largest or math.isnan(squares):
            yield Difference(name, math.sqrt(squares / own) if own else math.inf, largest)


# ------------------------------------------------------------------------------------------------------ consolidating


def consolidate(reader: WeightSource, kind: str, out: Path, wrote: Callable[[], object]) -> None:
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
                    file.write(reader.read(kind, name, Extent(start, stop)).numpy().data)
                wrote()
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{out} cannot be written: {error.strerror}") from None
