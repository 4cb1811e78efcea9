"""Keyed random numbers: one key per sample, Philox-4x32-10, no state.

The numbers of a sample depend on its key and the purpose alone: not on its batch, the rank, the device or earlier draws.
Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
Legend: B samples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[np.uint64]

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW, _LOW31, _HALF = np.uint64(_MASK32), np.uint64(0x7FFFFFFF), np.uint64(32)
_WIDE, _STEPS = np.array(_MULTIPLIERS, dtype=np.uint64), np.array(_WEYL, dtype=np.uint64)


def purpose_words(purpose: str) -> tuple[int, int]:
    """A purpose as two 32-bit numbers: the middle words of a block's counter."""
    digest = hashlib.blake2b(purpose.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _multiply_high_low(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of multiplier * word; int64 wraps around, which keeps all 64 bits of the product."""
    product = word * multiplier
    return (product >> 32) & _MASK32, product & _MASK32


def _philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_high_low(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_high_low(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _WEYL[0]) & _MASK32
        k1 = (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def _in_numpy(keys: Tensor) -> bool:
    return keys.device.type == "cpu" and type(keys) is Tensor and not torch.compiler.is_compiling()


def _as_words(keys: Tensor) -> Words:
    return keys.numpy().view(np.uint64)


def _philox_in_numpy(evens: Words, odds: Words, keys: Words) -> tuple[Words, Words]:
    """`_philox` in NumPy, whose operations on a few numbers cost a fraction of torch's; words are 32 bits in uint64.

    Args:
        evens: words 0 and 2 of the counters, [2, ...]; odds: words 1 and 3.
        keys: whole, [...].

    Returns:
        Words 0 and 2, and words 1 and 3.
    """
    shape = (2, *[1] * keys.ndim)
    factors, steps = _WIDE.reshape(shape), _STEPS.reshape(shape)
    halves = np.stack([keys & _LOW, keys >> _HALF])
    for _ in range(_ROUNDS):
        products = evens * factors
        evens, odds = (products >> _HALF)[::-1] ^ odds ^ halves, (products & _LOW)[::-1]
        halves = (halves + steps) & _LOW
    return evens, odds


def _words(keys: Tensor, purpose: str, blocks: int) -> Tensor:
    """int64 [B, n, 4], each entry a 32-bit word, of the first n blocks."""
    first, second = purpose_words(purpose)
    if _in_numpy(keys):
        return _words_in_numpy(_as_words(keys), first, second, blocks)
    index = torch.arange(blocks, device=keys.device, dtype=torch.int64).expand(len(keys), -1)
    low = (keys & _MASK32)[:, None].expand_as(index)
    high = ((keys >> 32) & _MASK32)[:, None].expand_as(index)
    fill = torch.zeros_like(index)
    return torch.stack(_philox((index, fill + first, fill + second, fill), (low, high)), dim=-1)


def _words_in_numpy(keys: Words, first: int, second: int, blocks: int) -> Tensor:
    index = np.arange(blocks, dtype=np.uint64)
    evens, odds = np.stack([index, np.full_like(index, second)]), np.array([[first], [0]], dtype=np.uint64)
    evens, odds = _philox_in_numpy(evens[:, None], odds[:, None], keys[:, None])
    return torch.from_numpy(np.stack([evens[0], odds[0], evens[1], odds[1]], axis=-1).view(np.int64))


def fold(keys: Tensor, value: int | Tensor | str) -> Tensor:
    """New keys [B] from keys [B] and a number, a number per sample (int64 [B]) or a word."""
    if isinstance(value, str):
        first, second = purpose_words(value)
        value = first | ((second & 0x7FFFFFFF) << 32)
    if _in_numpy(keys):
        return _fold_in_numpy(_as_words(keys), value)
    number = torch.as_tensor(value, dtype=torch.int64, device=keys.device).expand_as(keys)
    counter = (number & _MASK32, (number >> 32) & _MASK32, torch.zeros_like(keys), torch.full_like(keys, 1))
    words = _philox(counter, (keys & _MASK32, (keys >> 32) & _MASK32))
    return words[0] | ((words[1] & 0x7FFFFFFF) << 32)


def _fold_in_numpy(keys: Words, value: int | Tensor) -> Tensor:
    number = np.broadcast_to(np.asarray(value, dtype=np.int64), keys.shape).view(np.uint64)
    evens, odds = np.stack([number & _LOW, np.zeros_like(keys)]), np.stack([number >> _HALF, np.ones_like(keys)])
    evens, odds = _philox_in_numpy(evens, odds, keys)
    return torch.from_numpy((evens[0] | ((odds[0] & _LOW31) << _HALF)).view(np.int64))


def sample_keys(seed: int, *numbers: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """int64 [B] keys from a run seed and any numbers, each an int or an int64 tensor [B] (epoch, sample index, step...)."""
    sizes = [number.shape[0] for number in numbers if isinstance(number, Tensor)]
    keys = torch.full((sizes[0] if sizes else 1,), seed, dtype=torch.int64, device=device)
    for number in numbers:
        keys = fold(keys, number)
    return keys


def uniform(keys: Tensor, purpose: str, shape: Sequence[int] = (), *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in the open interval (0, 1), [B, *shape].

    Args:
        keys: int64 [B].
        purpose: a few words; another purpose gives independent numbers.
        dtype: float32 (23 random bits) or float64 (52 random bits: use it to draw from categoricals).
    """
    count = math.prod(shape)
    per_block = 2 if dtype == torch.float64 else 4
    words = _words(keys, purpose, -(-count // per_block))
    if dtype == torch.float64:
        numbers = _from_52_bits(words)
    else:
        numbers = ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return numbers.flatten(1)[:, :count].reshape(len(keys), *shape)


def _from_52_bits(words: Tensor) -> Tensor:
    """Pairs of words, int64 [..., 4], as float64 [..., 2] in (0, 1)."""
    bits = ((words[..., 0::2] >> 6) << 26) | (words[..., 1::2] >> 6)
    return (bits.to(torch.float64) + 0.5) * 2.0**-52


def normal(keys: Tensor, purpose: str, shape: Sequence[int] = ()) -> Tensor:
    """Standard normal numbers, float32 [B, *shape], by Box-Muller in float64 (equal on CPU and CUDA to float32 rounding)."""
    count = math.prod(shape)
    pairs = uniform(keys, purpose, ((count + 1) // 2, 2), dtype=torch.float64)
    radius = torch.sqrt(-2.0 * torch.log(pairs[..., 0]))
    angle = (2.0 * math.pi) * pairs[..., 1]
    numbers = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return numbers.flatten(1)[:, :count].reshape(len(keys), *shape).to(torch.float32)
