"""The run's folder as the launcher sees it: the resolved run, what is done, and locks against a second launch."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megadiff.config.drift import drift, stored_run
from megadiff.config.errors import UserError
from megadiff.config.jobs import SubmittedJob
from megadiff.config.load import dump_run
from megadiff.config.run_folder import RunFolder
from megadiff.config.schema import Run
from megadiff.files import write_text
from megadiff.launcher import queue
from megadiff.launcher.children import process_start

WAIT_S = 10.0
"""Seconds that a launch waits for the processes of a killed launch, which end soon after it."""


def check_checkpoints(run: Run) -> None:
    """Check that finished stages still have the checkpoints that a later stage or the final samples start from.

    Raises:
        UserError: naming the stage whose checkpoints are gone.
    """
    reader = "the samples are drawn from it" if run.showcase else ""
    for stage in reversed(run.stages):
        paths = run.paths.stage(stage.name)
        there = paths.checkpoints.newest() is not None
        if paths.done.exists():
            if reader and not there:
                raise UserError(
                    f"stage {stage.name} is done, but its checkpoints are gone, and {reader}; put them back, "
                    f"or delete {paths.done} to train it again"
                )
            return
        reader = f"stage {stage.name} starts from it" if stage.initialise.from_previous and not there else ""


def accepted_changes(run: Run, *, allowed: bool) -> list[str]:
    """Where a run differs from what its folder holds, as sentences.

    Raises:
        UserError: that changes the training and is not allowed, naming keys and values.
    """
    stored = stored_run(run)
    changed = () if stored is None else drift(stored, run).accepted(run.folder, allowed=allowed)
    return [f"changed since the last launch: {line}" for line in changed]


def untouched(run: Run) -> list[str]:
    """Finished stages whose configuration, or the shared one, has changed: the changes do not reach them."""
    stored = stored_run(run)
    if stored is None:
        return []
    done = [stage.name for stage in run.stages if run.paths.stage(stage.name).done.exists()]
    return [name for name in done if drift(stored, run, name).training]


def write(run: Run, deepspeed: Mapping[str, Any]) -> None:
    """Keep the resolved run and the DeepSpeed JSON in the folder; a stage that now has more steps is no longer done.

    Raises:
        UserError: the folder cannot be written.
    """
    stored = stored_run(run)
    try:
        write_text(run.paths.run, dump_run(run))
        write_text(run.paths.deepspeed, json.dumps(deepspeed, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{run.folder} cannot be written: {error.strerror}; name another with folder=...") from None
    before = {stage.name: stage.steps for stage in stored.stages} if stored else {}
    for stage in run.stages:
        if before.get(stage.name, stage.steps) < stage.steps:
            run.paths.stage(stage.name).done.unlink(missing_ok=True)


@contextmanager
def locked(run: Run) -> Iterator[int]:
    """Hold the folder, once no rank of an earlier launch is left in it; yields the lock's file descriptor for the children.

    Raises:
        UserError: another launch holds it, its jobs run or wait, ranks stay for longer than WAIT_S, or it cannot be made.
    """
    descriptor = _open(run.paths.lock)
    try:
        deadline = time.monotonic() + WAIT_S
        while not _lock(descriptor, fcntl.LOCK_EX):
            holder = os.pread(descriptor, 32, 0).decode().strip()
            if _runs(holder) or time.monotonic() > deadline:
                who = f"process {holder or 'unknown'}"
                raise UserError(f"{run.folder} is in use by another launch ({who}); wait for it or end it")
            time.sleep(0.1)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        _check_not_queued(run)
        _wait_for_ranks(run.paths, deadline)
        yield descriptor
    finally:
        os.close(descriptor)


def holder(folder: RunFolder) -> int | None:
    """The process of this machine that launched what now runs in a folder; None if there is none."""
    try:
        text = folder.lock.read_text(encoding="utf-8").strip()
        descriptor = os.open(folder.lock, os.O_RDWR)
    except OSError:
        return None
    try:
        return int(text) if not _lock(descriptor, fcntl.LOCK_EX) and _runs(text) else None
    finally:
        os.close(descriptor)


def join(folder: RunFolder) -> int:
    """Keep new launches out of a run's folder while this process, a rank, lives; returns the lock's descriptor.

    Raises:
        UserError: the folder cannot be written.
    """
    descriptor = _open(folder.ranks_lock)
    with suppress(OSError):  # see _lock
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _check_not_queued(run: Run) -> None:
    """Raises UserError if jobs of the run run or wait on this cluster, or that cannot be known."""
    if queued := queue.states([job.job for job in SubmittedJob.read(run.paths.jobs)]):
        raise UserError(
            f"{run.folder} is in work by job{'s' * (len(queued) > 1)} {', '.join(queued)}; "
            f"wait, or give `megadiff stop {run.folder}` first"
        )


def _wait_for_ranks(folder: RunFolder, deadline: float) -> None:
    descriptor = _open(folder.ranks_lock)
    try:
        while not _lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{folder} is in use by ranks (megadiff train) that no launch watches; wait for them or end them"
                )
            time.sleep(0.1)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written: {error.strerror}; name another with folder=...") from None


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # Some network file systems have no locks (Lustre without its option flock): nobody is kept out there.
    return True


def _runs(pid: str) -> bool:
    """Whether the process that wrote its number into a lock still runs on this machine."""
    return pid.isdigit() and process_start(int(pid)) != ""
