"""The records of a run's jobs: a JSON object per line of their files. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

FAILED_AT = "MEGADIFF_FAILED_AT"
"""Variable with the step at which the start of a stage before this one ended badly; 0 or absent if that is unknown."""


@dataclass(frozen=True)
class SubmittedJob:
    """A line of `RunFolder.jobs`.

    Attributes:
        job: Slurm's number of it, as text.
        name: the stage that it trains, or `final-samples`.
        time: seconds since 1970.
    """

    job: str
    name: str
    submission: int
    time: int

    @classmethod
    def read(cls, path: Path) -> list[SubmittedJob]:
        """All jobs of a run, oldest first."""
        return [cls(**row) for row in _rows(path)]

    def append_to(self, path: Path) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self)) + "\n")


class Outcome(StrEnum):
    """What happened to an attempt of a job at its stage."""

    STARTED = "started"
    DONE = "done"
    TIME_LIMIT = "time limit"
    """It saved in order before its time limit, and queued again."""
    STOPPED = "stopped"
    """It saved in order because a user asked for it."""
    MISTAKE = "mistake"
    """A rank reported a user's mistake."""
    FAILED = "failed"
    """It queued again after a failure."""
    GAVE_UP = "gave up"
    """It has used up its restarts."""
    STUCK = "stuck"
    """It failed at the step at which the attempt before had failed."""


@dataclass(frozen=True)
class Attempt:
    """A line of `StageFolder.attempts`, which the job's script writes.

    Attributes:
        code: exit code of the ranks' launcher.
    """

    KEY: ClassVar = '"job": "%s", "outcome": "%s"'
    """The part of a line by which a job counts its own attempts."""
    FORM: ClassVar = f'{{"time": %d, {KEY}, "code": %d}}'
    """A line for printf of a shell, in the order of the fields."""

    time: int
    job: str
    outcome: Outcome
    code: int

    @classmethod
    def read(cls, path: Path) -> list[Attempt]:
        """The attempts at a stage, oldest first."""
        return [cls(**{**row, "outcome": Outcome(row["outcome"])}) for row in _rows(path)]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; none if there is no file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return (json.loads(line) for line in text.split("\n")[:-1] if line)
