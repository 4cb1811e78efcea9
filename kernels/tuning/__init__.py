"""Tile sizes, warps and stages of kernels: measured ones out of committed tables, else a kernel's defaults.

Nothing is tuned while a job runs, so that all ranks run the same code. A table is a file `GPU.json` in this folder, a list of
entries that were measured on that GPU (`python -m megadiff.kernels.tuning.triton` writes it); an entry holds for the versions
of Triton and ptxas that it was measured with. There is no table yet: every kernel runs with its defaults, which are chosen by
the compiler's report.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from megadiff.kernels import toolchain

Config = Mapping[str, int]
"""By name: the tile sizes of a kernel, num_warps, num_stages, maxnreg, 0 or 1 for tma."""
Defaults = Mapping[int, Config]
"""By architecture (80, 90, ...; a GPU takes the newest that is not above it); 0: Triton's interpreter."""
TABLES = Path(__file__).parent
_assumed: Target | None = None
_tried: dict[str, Config] = {}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Target(NamedTuple):
    """What kernels are compiled for: an architecture (0: Triton's interpreter) and, if it is known, torch's name of the GPU."""

    architecture: int
    gpu: str = ""


class Question(NamedTuple):
    """What a launcher asks the configuration of.

    Attributes:
        kernel: the op's folder and the kernel's name, such as "joint_attention.forward".
        bucket: what of the shape matters, as the op's triton.py names it, such as "d64".
        dtype: such as "bfloat16".
    """

    kernel: str
    bucket: str
    dtype: str


_asked: list[tuple[Question, Config]] | None = None


class Entry(NamedTuple):
    """A measured configuration.

    Attributes:
        kernel, bucket, dtype: as in Question.
        gpu: torch's name of the GPU.
        architecture: its own, 80, 90, ...
        triton, ptxas: versions.
        config: the fastest one.
    """

    kernel: str
    bucket: str
    dtype: str
    gpu: str
    architecture: int
    triton: str
    ptxas: str
    config: dict[str, int]


@lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """All entries of all tables."""
    tables = sorted(TABLES.glob("*.json"))
    return tuple(Entry(**entry) for table in tables for entry in json.loads(table.read_text(encoding="utf-8")))


def configuration(kernel: str, bucket: str, dtype: torch.dtype, device: torch.device, defaults: Defaults) -> Config:
    """The configuration of a kernel on a device: its entry in a table, else a default."""
    target, question = target_of(device), Question(kernel, bucket, str(dtype).removeprefix("torch."))
    config = _tried.get(kernel) or _measured(question, target) or _default(defaults, target.architecture)
    if _asked is not None:
        _asked.append((question, config))
    return config


def target_of(device: torch.device) -> Target:
    """What kernels are compiled for on a device."""
    return _assumed or (_target(device.index) if device.type == "cuda" else Target(0))


@contextmanager
def assumed(target: Target) -> Iterator[None]:
    """Configurations are those of a target, whatever the device, so that kernels can be compiled without it."""
    global _assumed
    before, _assumed = _assumed, target
    try:
        yield
    finally:
        _assumed = before


@contextmanager
def trying(kernel: str, config: Config) -> Iterator[None]:
    """A kernel has this configuration, whatever its tables and defaults say."""
    _tried[kernel] = config
    try:
        yield
    finally:
        del _tried[kernel]


@contextmanager
def listening() -> Iterator[list[tuple[Question, Config]]]:
    """What is asked, and answered, in the block."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


def options(config: Config) -> dict[str, int]:
    """The part of a configuration that is Triton's own."""
    return {name: config[name] for name in _OPTIONS if name in config}


@lru_cache(maxsize=8)
def _target(index: int | None) -> Target:
    major, minor = torch.cuda.get_device_capability(index)
    return Target(10 * major + minor, torch.cuda.get_device_name(index))


@lru_cache(maxsize=256)
def _measured(question: Question, target: Target) -> Config | None:
    key = (*question, target.gpu, target.architecture, *toolchain.toolchain())
    return next((entry.config for entry in entries() if entry[:7] == key), None) if target.gpu else None


def _default(defaults: Defaults, limit: int) -> Config:
    return defaults[max(each for each in defaults if each <= limit and bool(each) == bool(limit))]
