"""Jobs in Slurm's queue."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from megadiff.config.errors import UserError

PATIENCE_S = 60.0
"""Seconds that Slurm's commands may take; without its controller they give up after about ten."""


class NoAnswer(UserError):
    """Slurm is here, and its controller is away."""


def states(jobs: Sequence[str]) -> Mapping[str, str]:
    """Those of these jobs that are in the queue, in order, with Slurm's word for each (`PENDING (Dependency)`, `RUNNING`).

    Empty where Slurm is not.

    Raises:
        NoAnswer: nothing is known of them.
    """
    if not jobs:
        return {}
    # squeue fails for a list with a single unknown job, so all of this user's are asked for.
    command = ["squeue", "--me", "--noheader", "--format=%i|%T|%r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except FileNotFoundError:
        return {}
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"squeue gave no answer for {PATIENCE_S:g} s; try again later") from None
    if done.returncode:
        raise NoAnswer(f"squeue failed: {' '.join(done.stderr.split())}; try again later")
    rows = [line.strip().split("|") for line in done.stdout.splitlines()]
    # Until the scheduler has looked at a job, its reason to wait is "None".
    found = {job: f"{state} ({why})" if state == "PENDING" and why != "None" else state for job, state, why in rows}
    return {job: found[job] for job in jobs if job in found}


def cancel(jobs: Sequence[str]) -> None:
    """Take jobs out of the queue, and end those that run."""
    if jobs:
        subprocess.run(["scancel", *jobs], capture_output=True, timeout=PATIENCE_S, check=False)
