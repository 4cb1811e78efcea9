"""How far a run is: from the files of its folder, and Slurm's queue where there is one."""

from __future__ import annotations

import json
import os
import signal
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from megadiff.config.errors import UserError
from megadiff.config.jobs import Attempt, Outcome, SubmittedJob
from megadiff.config.schema import Run, Stage
from megadiff.launcher import folder, queue

_TAIL_BYTES = 1 << 16
_LONGEST = 50
"""Steps from which the speed is taken."""


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is.

    Attributes:
        state: for people: `done`, Slurm's word for its job, `running` on this machine, or how it ended.
        job: its newest job, if it had one.
        loss: of the last step; None before the first.
        samples_per_s: over the last steps; None if they do not tell.
        checkpoint: the step of its newest checkpoint.
        restarts: of its newest job.
        reason: of the last restart.
    """

    name: str
    state: str
    job: str | None
    step: int
    steps: int
    loss: float | None
    samples_per_s: float | None
    left: timedelta | None
    checkpoint: int | None
    restarts: int
    reason: str


@dataclass(frozen=True)
class Status:
    """How far a run is. `others` are the states of its queued jobs that train no stage, by their names."""

    stages: Sequence[StageStatus]
    others: Mapping[str, str]


def status(run: Run) -> Status:
    """Look at a run; cheap enough to be asked every second."""
    jobs = SubmittedJob.read(run.paths.jobs)
    try:
        queued = queue.states([job.job for job in jobs])
    except queue.NoAnswer:
        queued = {job.job: "unknown (squeue failed)" for job in jobs}
    newest = {job.name: job.job for job in jobs}
    waiting = [stage.name for stage in run.stages if not run.paths.stage(stage.name).done.exists()]
    here = waiting[0] if waiting and folder.holder(run.paths) is not None else None
    stages = [_stage(run, stage, newest.get(stage.name), queued, stage.name == here) for stage in run.stages]
    names = {stage.name for stage in run.stages}
    return Status(stages, {name: queued[job] for name, job in newest.items() if name not in names and job in queued})


def table(status: Status) -> str:
    """A line per stage."""
    rows = [["stage", "state", "job", "step", "loss", "samples/s", "left", "checkpoint", "restarts"]]
    for stage in status.stages:
        speed = "" if stage.samples_per_s is None else f"{stage.samples_per_s:.1f}"
        checkpoint = "" if stage.checkpoint is None else f"{stage.checkpoint:,}"
        restarts = f"{stage.restarts} ({stage.reason})" if stage.restarts else ""
        loss = "" if stage.loss is None else f"{stage.loss:.4f}"
        left = "" if stage.left is None else str(stage.left)
        progress = f"{stage.step:,}/{stage.steps:,}"
        rows += [[stage.name, stage.state, stage.job or "", progress, loss, speed, left, checkpoint, restarts]]
    rows += [[name, state, *[""] * 7] for name, state in status.others.items()]
    used = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in used]
    lines = zip(*used, strict=True)
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def stop(run: Run, *, now: bool) -> list[str]:
    """Ask what runs to save and end, or with `now` end it at once; what has not started is taken out of the queue.

    Returns:
        What was done, in sentences.

    Raises:
        UserError: nothing of the run is running or queued, Slurm does not answer, or the run's folder cannot be written.
    """
    queued = queue.states([job.job for job in SubmittedJob.read(run.paths.jobs)])
    launcher = folder.holder(run.paths)
    if not queued and launcher is None:
        raise UserError(f"nothing of {run.folder} is running or queued")
    running = [job for job, state in queued.items() if not state.startswith("PENDING")]
    cancelled = list(queued) if now else [job for job in queued if job not in running]
    done = []
    # First those that wait: an ended job must not start them.
    if cancelled:
        queue.cancel(cancelled)
        done += [f"cancelled job{'s' * (len(cancelled) > 1)} {', '.join(cancelled)}"]
    if now and launcher is not None:
        os.kill(launcher, signal.SIGTERM)
        done += [f"ended the launch (process {launcher})"]
    if not now and (running or launcher is not None):
        try:
            run.paths.stop.touch()
        except OSError as error:
            raise UserError(f"{run.paths.stop} cannot be written: {error.strerror}") from None
        what = f"job{'s' * (len(running) > 1)} {', '.join(running)}" if running else f"the launch (process {launcher})"
        done += [f"asked {what} to save and end after the step in work"]
    return done


def log_of(run: Run, stage: str | None, rank: int | None) -> Path:
    """The newest log of a stage (of the newest one by default): a rank's, or the output of the stage's job, or else rank 0's.

    Raises:
        UserError: there is none.
    """
    names = [stage.name for stage in run.stages] if stage is None else [run.stage(stage).name]
    patterns = ["job_*.log", "rank_0.log"] if rank is None else [f"rank_{rank}.log"]
    for pattern in patterns:
        found = [path for name in names for path in run.paths.stage(name).logs.glob(pattern)]
        if found:
            return max(found, key=lambda path: path.stat().st_mtime)
    raise UserError(f"there is no {' or '.join(patterns)} in {run.folder}/{stage or 'STAGE'}/logs")


def _stage(run: Run, stage: Stage, job: str | None, queued: Mapping[str, str], here: bool) -> StageStatus:
    paths = run.paths.stage(stage.name)
    attempts = [attempt for attempt in Attempt.read(paths.attempts) if attempt.job == job]
    rows = _tail(paths.metrics)
    seconds = [after["time"] - before["time"] for before, after in pairwise(rows)]
    step_s = statistics.median(seconds) if seconds else 0.0
    step = rows[-1]["step"] if rows else 0
    live = here or (job in queued and not queued[str(job)].startswith("PENDING"))
    starts = sum(attempt.outcome == Outcome.STARTED for attempt in attempts)
    return StageStatus(
        name=stage.name,
        state=_state(paths.done.exists(), queued.get(job or ""), here, attempts),
        job=job,
        step=step,
        steps=stage.steps,
        loss=rows[-1]["loss"] if rows else None,
        samples_per_s=stage.batch.global_samples / step_s if step_s > 0 else None,
        left=timedelta(seconds=round((stage.steps - step) * step_s)) if live and step_s > 0 else None,
        checkpoint=next(reversed(paths.checkpoints.published()), None),
        restarts=max(starts - 1, 0),
        reason=_reason(attempts),
    )


def _state(done: bool, queued: str | None, here: bool, attempts: Sequence[Attempt]) -> str:
    if done:
        return "done"
    if queued is not None:
        return queued.lower()
    if here:
        return "running"
    if not attempts:
        return "not started"
    last = attempts[-1].outcome
    return "ended by Slurm" if last in (Outcome.STARTED, Outcome.FAILED, Outcome.TIME_LIMIT) else last.value


def _reason(attempts: Sequence[Attempt]) -> str:
    """Why the newest attempt was not the first."""
    for before, after in reversed(list(pairwise(attempts))):
        if after.outcome == Outcome.STARTED:
            when = datetime.fromtimestamp(after.time).strftime("%Y-%m-%d %H:%M")
            what = "cut off by Slurm" if before.outcome == Outcome.STARTED else before.outcome.value
            return f"{what}{f', code {before.code}' if before.code else ''}, {when}"
    return ""


def _tail(metrics: Path) -> list[dict[str, Any]]:
    """The last whole lines of a stage's metrics."""
    if not metrics.exists():
        return []
    with metrics.open("rb") as file:
        file.seek(max(metrics.stat().st_size - _TAIL_BYTES, 0))
        cut = file.tell() > 0
        lines = file.read().split(b"\n")[int(cut) : -1]
    rows = [json.loads(line) for line in lines[-_LONGEST - 1 :]]
    return [row for row in rows if "time" in row]
