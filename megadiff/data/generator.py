"""NumPy's random numbers, determined by words."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(*words: int | str) -> np.random.Generator:
    """A Philox generator keyed by the words; the same on every platform."""
    digest = hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
