"""Tile sizes, warps and stages of kernels: measured ones out of committed tables, else a kernel's defaults.

Nothing is tuned while a job runs, so that all ranks run the same code. A table is a file `GPU.json` in this folder, a list of
entries that were measured on that GPU; an entry holds for the versions of Triton and ptxas that it was measured with. There
is no table yet: every kernel runs with its defaults, which are chosen by the compiler's report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Entry(NamedTuple):
    """A measured configuration.

    Attributes:
        kernel: the op's folder and the kernel's name, such as "joint_attention.forward".
        bucket: what of the shape matters, as the op's triton.py names it, such as "d64".
        dtype: such as "bfloat16".
        gpu: torch's name of the GPU.
        triton, ptxas: versions.
        config: the fastest one.
    """

    kernel: str
    bucket: str
    dtype: str
    gpu: str
    triton: str
    ptxas: str
    config: dict[str, int]


@lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """All entries of all tables."""
    tables = sorted(TABLES.glob("*.json"))
    return tuple(Entry(**entry) for table in tables for entry in json.loads(table.read_text(encoding="utf-8")))


def configuration(kernel: str, bucket: str, dtype: torch.dtype, device: torch.device, defaults: Defaults) -> Config:
    """The configuration of a kernel on a device."""
    if device.type != "cuda":
        return defaults[0]
    return _configuration(kernel, bucket, dtype, device.index) or _newest(defaults, architecture(device.index))


def options(config: Config) -> dict[str, int]:
    """The part of a configuration that is Triton's own."""
    return {name: config[name] for name in _OPTIONS if name in config}


@lru_cache(maxsize=8)
def architecture(index: int | None) -> int:
    """Of a GPU: 80, 90, ..."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@lru_cache(maxsize=256)
def _configuration(kernel: str, bucket: str, dtype: torch.dtype, index: int | None) -> Config | None:
    key = (kernel, bucket, str(dtype).removeprefix("torch."), torch.cuda.get_device_name(index), *toolchain.toolchain())
    return next((entry.config for entry in entries() if entry[:6] == key), None)


def _newest(defaults: Defaults, limit: int) -> Config:
    return defaults[max(architecture for architecture in defaults if 0 < architecture <= limit)]
