"""Memory of the host that a step frees and the next one needs again."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3)."""
NEVER = -1


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for later, instead of returning it to the system.

    Otherwise a step's activations, flat gradients and buffers may be mapped anew in every step on a CPU, and page faults take a
    large part of its time. Allocations above 32 MiB are mapped each on its own whatever the threshold, unless none is. A
    process's peak is somewhat higher so.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)
        libc.mallopt(M_MMAP_MAX, 0)
