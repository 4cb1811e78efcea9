"""Jobs in Slurm's queue."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

PATIENCE_S = 60.0
"""Seconds that Slurm's commands may take; without its controller they give up after about ten."""


def states(jobs: Sequence[str]) -> Mapping[str, str]:
    """Which of these jobs are in the queue, and their state in Slurm's words (`PENDING (Dependency)`, `RUNNING`).

    Empty where Slurm is not, or does not answer.
    """
    if not jobs:
        return {}
    # squeue fails for a list with a single unknown job, so all of this user's are asked for.
    command = ["squeue", "--me", "--noheader", "--format=%i|%T|%r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {}
    rows = [line.strip().split("|") for line in done.stdout.splitlines()]
    return {job: f"{state} ({why})" if state == "PENDING" else state for job, state, why in rows if job in jobs}


def cancel(jobs: Sequence[str]) -> None:
    """Take jobs out of the queue, and end those that run."""
    if jobs:
        subprocess.run(["scancel", *jobs], capture_output=True, timeout=PATIENCE_S, check=False)
