"""One command as several processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megadiff.config.errors import UserError
from megadiff.launcher.local import ERROR_FILE


def several(processes: int, arguments: Sequence[str]) -> int:
    """A command line of megadiff once per process; one that fails ends the others.

    They have no more threads in all than there are cores.
    """
    own = max(len(os.sched_getaffinity(0)) // processes, 1)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(int(asked), own) if asked.isdigit() and int(asked) else own
    with tempfile.TemporaryDirectory() as folder:
        error = Path(folder) / "error"
        common = {**os.environ, "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": str(threads), ERROR_FILE: str(error)}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "megadiff", *arguments],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=None if rank == 0 else subprocess.DEVNULL,
            )
            for rank in range(processes)
        ]
        try:
            while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
                time.sleep(0.1)
        finally:
            for rank in ranks:
                rank.terminate()
                rank.wait()
        if error.exists():
            raise UserError(error.read_text(encoding="utf-8").strip())
        return next((abs(code) for code in codes if code), 0)
