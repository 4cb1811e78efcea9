"""torch's flight recorder: the last collectives of this rank, where they were called, and whether they have ended."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

SIZE = 2000
"""Collectives that are remembered."""


def prepare(prefix: str) -> None:
    """Let NCCL write the record at a time-out, to `prefix` and the rank's number. Before the ranks have a group.

    Whether and how much is recorded may be set by the environment.
    """
    os.environ["TORCH_FR_DUMP_TEMP_FILE"] = prefix
    for name, value in {"TORCH_FR_BUFFER_SIZE": str(SIZE), "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}.items():
        os.environ.setdefault(name, value)


def write(path: Path) -> str:
    """Write the record as torch's own tools read it (a pickle); without a group, nothing. Raises OSError.

    Returns:
        A sentence on the last collective, or nothing.
    """
    if not dist.is_initialized():
        return ""
    dump = c10d._dump_nccl_trace if dist.get_backend() == "nccl" else c10d._dump_fr_trace  # type: ignore[attr-defined]
    record = dump(includeCollectives=True, includeStackTraces=True, onlyActive=False)
    path.write_bytes(record)
    entries = pickle.loads(record).get("entries", [])
    return _told(entries[-1]) if entries else ""


def _told(entry: dict[str, Any]) -> str:
    own = next((frame for frame in entry.get("frames", []) if "/site-packages/" not in frame["filename"]), None)
    called = f", called in {own['filename']}:{own['line']} ({own['name']})" if own else ""
    name, group = entry["profiling_name"], entry["process_group"][1]
    ended = "is over" if entry["retired"] else "is still in work"
    return f"the last collective, {name} number {entry['collective_seq_id']} of {group}, {ended}{called}"
