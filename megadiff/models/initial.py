"""Initial values: each number of a parameter is a function of (seed, the parameter's name, its index) alone.

So a rank that holds a part of a parameter makes that part, and every layout of ranks starts from the same weights. A module
that owns parameters leaves their values open, and has a method `initial`: by its own name, the distribution of each of them.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PER_BLOCK = 4
"""64-bit words that one step of Philox's counter gives."""
_AT_ONCE = 2**20
"""Numbers made at a time, a multiple of _PER_BLOCK."""


@dataclass(frozen=True)
class Uniform:
    """Uniform in (-bound, bound)."""

    bound: float


@dataclass(frozen=True)
class Normal:
    """Normal with mean 0."""

    deviation: float


@dataclass(frozen=True)
class Constant:
    """One value everywhere, but 1 in the flat ranges [start, stop) of `ones`."""

    value: float
    ones: tuple[tuple[int, int], ...] = ()


Initial = Uniform | Normal | Constant
ZERO, ONE = Constant(0.0), Constant(1.0)


def initial_range(initial: Initial, seed: int, name: str, start: int, stop: int) -> Tensor:
    """Float32 [stop - start]: the initial values at flat indices [start, stop) of the whole parameter, on the CPU."""
    if isinstance(initial, Constant):
        values = torch.full((stop - start,), initial.value)
        for low, high in initial.ones:
            values[max(low - start, 0) : max(high - start, 0)] = 1.0
        return values
    parts = np.empty(stop - start, np.float32)
    for low in range(start, stop, _AT_ONCE):
        high = min(low + _AT_ONCE, stop)
        parts[low - start : high - start] = _random(initial, seed, name, low, high)
    return torch.from_numpy(parts)


def _random(initial: Uniform | Normal, seed: int, name: str, start: int, stop: int) -> NDArray[np.float64]:
    block = start // _PER_BLOCK
    units = _units(seed, name, block, -(-stop // _PER_BLOCK))
    if isinstance(initial, Uniform):
        numbers = (2 * units - 1) * initial.bound
    else:  # Box and Muller's transform of each pair
        radius, angle = np.sqrt(-2 * np.log(units[0::2])), 2 * math.pi * units[1::2]
        numbers = initial.deviation * np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
    first = block * _PER_BLOCK
    return numbers[start - first : stop - first]


def _units(seed: int, name: str, first: int, last: int) -> NDArray[np.float64]:
    """Numbers in (0, 1) of the counter's blocks [first, last)."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    # NumPy keeps the streams of its bit generators as they are (NEP 19). Its counter goes up before the first block.
    generator = np.random.Philox(key=np.frombuffer(digest, np.uint64), counter=0).advance(first)
    words = generator.random_raw(_PER_BLOCK * (last - first))
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
