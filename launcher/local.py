"""`megadiff launch` on this machine: a run's stages, one after the other, through DeepSpeed's launcher. No torch here."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from megadiff.config.errors import UserError
from megadiff.config.jobs import FAILED_AT
from megadiff.config.run_folder import Incident, IncidentKind
from megadiff.config.schema import Run, Stage
from megadiff.launcher import children, folder
from megadiff.launcher.children import ERROR_FILE, Command, Signals
from megadiff.launcher.job import Plan, missing_files

Say = Callable[[str], None]


def launch(plan: Plan, *, allow_changes: bool = False, say: Say = print) -> int:
    """Train every stage that is not done, from its newest checkpoint, then make the showcase.

    Returns:
        0, or the exit code of the child that failed (2: a rank reported a user's mistake; 128 + n: signal n).

    Raises:
        UserError: before anything is started.
    """
    run = plan.run
    absent = missing_files(run)
    if absent:
        raise UserError(f"not found: {'; '.join(absent)}; paths are relative to the folder where megadiff is started")
    with folder.locked(run) as lock:
        changes = folder.accepted_changes(run, allowed=allow_changes)
        folder.check_checkpoints(run)
        untouched = folder.untouched(run)
        folder.write(run, plan.deepspeed)
        run.paths.stop.unlink(missing_ok=True)  # of ranks that died before they saw it
        for line in changes:
            say(line)
        for name in untouched:
            if run.paths.stage(name).done.exists():
                say(f"stage {name} is done already: the changes do not reach it (delete {run.folder}/{name} to train it again)")
        if run.launch.processes not in ("accelerators", plan.processes):
            processes = run.launch.processes
            say(f"this machine has {plan.devices}: starting {plan.processes} of {processes} processes (the global batch stays)")
        say(f"run {run.name}: {plan}, folder {run.folder}")
        say(f"watch: {tensorboard_command(run)}")
        with Signals() as signals:
            return _stages(plan, lock, signals, say)


def tensorboard_command(run: Run) -> str:
    """The command that opens the run's log; it names the program beside this interpreter, so no environment need be active."""
    program = Path(sys.executable).parent / "tensorboard"
    command = os.path.relpath(program) if program.exists() else "tensorboard"
    return shlex.join([min(command, str(program), key=len), "--logdir", str(run.paths.tensorboard)])


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stages(plan: Plan, lock: int, signals: Signals, say: Say) -> int:
    run = plan.run
    for number, stage in enumerate(run.stages, 1):
        if run.paths.stage(stage.name).done.exists():
            say(f"stage {number} of {len(run.stages)}, {stage.name}: done already")
            continue
        say(f"stage {number} of {len(run.stages)}, {stage.name}: {stage.steps:,} steps")
        code = _train(plan, stage, lock, signals)
        if code:
            return code
    code = 0
    if run.showcase:
        say("samples")
        (code,) = children.run([Command(plan.showcase(), plan.showcase_environment())], signals, keep=[lock])
        if signals.received:
            _complain("interrupted while sampling; the same command starts it again")
            return 128 + signals.received
    say(f"log: {run.paths.tensorboard}; open it with: {tensorboard_command(run)}")
    return code


def _train(plan: Plan, stage: Stage, lock: int, signals: Signals) -> int:
    """Train one stage; on failure say in one sentence what happened and where to look."""
    paths = plan.run.paths.stage(stage.name)
    paths.root.mkdir(parents=True, exist_ok=True)
    paths.error.unlink(missing_ok=True)
    variables = {ERROR_FILE: str(paths.error), FAILED_AT: str(_failed_at(plan.run, stage))}
    ranks = Command(plan.command(stage, free_port()), {**plan.environment, **variables})
    (code,) = children.run([ranks], signals, keep=[lock])
    if signals.received:
        _complain(f"interrupted in stage {stage.name}; the same command goes on from its newest checkpoint")
        return 128 + signals.received
    if paths.error.exists():
        _complain(f"error: stage {stage.name}: {paths.error.read_text(encoding='utf-8').strip()}")
        return code or 2
    if not code and not paths.done.exists() and _was_asked_to_stop(plan.run, stage):
        _complain(f"stage {stage.name} has stopped as asked; the same command goes on from its newest checkpoint")
        return 1
    if code or not paths.done.exists():
        _complain(f"error: stage {stage.name} ended with {_ending(code)}; see {paths.logs}")
        return 128 - code if code < 0 else code or 1
    return 0


def _was_asked_to_stop(run: Run, stage: Stage) -> bool:
    """Whether ranks that have ended well ended before the stage did, by RUN/STOP."""
    last = Incident.newest(run.paths.incidents)
    return last is not None and (last.kind, last.stage) == (IncidentKind.STOP, stage.name)


def _failed_at(run: Run, stage: Stage) -> int:
    """The step at which the last ranks of a stage ended, unless they were asked to stop; 0 if there were none."""
    if _was_asked_to_stop(run, stage):
        return 0
    heartbeats = run.paths.stage(stage.name).heartbeats.glob("rank_*.json")
    return max((json.loads(path.read_text(encoding="utf-8"))["step"] for path in heartbeats), default=0)


def _complain(message: str) -> None:
    print(f"megadiff: {message}", file=sys.stderr, flush=True)


def _ending(code: int) -> str:
    for number in (-code, 256 - code):
        if 0 < number < 65:
            return f"signal {number} ({signal.Signals(number).name})" if number in set(signal.Signals) else f"signal {number}"
    return f"exit code {code}" if code else "exit code 0 before its last step"
