"""Memory of the host that a step frees and the next one needs again."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
KEPT_BYTES = 2**30
LARGEST_KEPT_BYTES = 2**25
"""Of one allocation: the most that every glibc takes."""


def keep_freed_memory() -> None:
    """Let glibc keep up to `KEPT_BYTES` at its heap's end, instead of returning them to the system.

    Otherwise a network's activations may be mapped anew in every step on a CPU, and page faults take up to a fifth of its time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
