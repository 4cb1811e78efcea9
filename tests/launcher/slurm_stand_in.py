"""Stand-ins for Slurm's commands: a queue that is a folder, and nothing that runs by itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SBATCH = """
case "$*" in *--test-only*)
    cat > "$SLURM/tried"
    if grep -q -- --nodes=9 "$SLURM/tried"; then
        echo "allocation failure: Requested node configuration is not available" >&2
        exit 1
    fi
    exit 0
esac
echo "$*" >> "$SLURM/calls"
number=$((40 + $(wc -l < "$SLURM/calls")))
if [ -e "$SLURM/refuses_$number" ]; then echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; fi
case "$*" in *afterok*) why=Dependency ;; *) why=Priority ;; esac
echo "$number|PENDING|$why" >> "$SLURM/queue"
echo "$number;cluster"
"""
SQUEUE = 'cat "$SLURM/queue"'
SCANCEL = 'for job in "$@"; do sed -i "/^$job|/d" "$SLURM/queue"; done'


class SlurmStandIn:
    """A queue with `sbatch`, `squeue` and `scancel` on PATH; the first job is 41."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "slurm"
        self.folder.mkdir()
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)):
            path = self.folder / name
            path.write_text(f"#!/bin/bash\n{text}\n")
            path.chmod(0o755)
        for name in ("calls", "queue"):
            (self.folder / name).touch()
        monkeypatch.setenv("SLURM", str(self.folder))
        monkeypatch.setenv("PATH", f"{self.folder}:{os.environ['PATH']}")

    def refuse(self, job: int) -> None:
        (self.folder / f"refuses_{job}").touch()

    def set_state(self, job: int, state: str) -> None:
        """An empty state takes the job out of the queue."""
        rows = [row for row in self.queue if not row.startswith(f"{job}|")]
        (self.folder / "queue").write_text("".join(f"{row}\n" for row in [*rows, *([f"{job}|{state}|None"] if state else [])]))

    @property
    def queue(self) -> list[str]:
        return (self.folder / "queue").read_text().splitlines()

    @property
    def calls(self) -> list[str]:
        """The arguments of every submission."""
        return (self.folder / "calls").read_text().splitlines()
