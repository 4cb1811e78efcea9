"""`megadiff launch` on this machine: a run's stages, one after the other, through DeepSpeed's launcher. No torch here."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadiff.config.alignment import check_local_manifests
from megadiff.config.deepspeed import resolve_run
from megadiff.config.errors import UserError
from megadiff.config.schema import Run, Stage
from megadiff.launcher import children, folder
from megadiff.launcher.children import ERROR_FILE, Command, Signals
from megadiff.launcher.devices import Devices, find_devices, processes_for, threads_for

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a launch will do.

    Attributes:
        environment: what is added to the environment of every rank; OMP_NUM_THREADS is always in it.
    """

    run: Run
    deepspeed: Mapping[str, Any]
    devices: Devices
    processes: int
    environment: dict[str, str]

    def command(self, stage: Stage, port: int | str) -> list[str]:
        """The command that trains one stage on all processes."""
        chosen = self.devices.chosen
        # Without --include DeepSpeed's launcher overrides CUDA_VISIBLE_DEVICES and takes the first GPUs of the machine.
        ranks = ["--num_accelerators", str(self.processes)]
        if chosen is not None:
            ranks = ["--include", "localhost:" + ",".join(map(str, chosen[: self.processes]))]
        paths = self.run.paths
        return [
            *(sys.executable, "-m", "deepspeed.launcher.runner"),
            *("--hostfile", os.devnull),  # the default, /job/hostfile, may exist and would start ssh
            *ranks,
            *("--master_port", str(port), "--no_local_rank", "--log_level", "critical", "--module"),
            *("megadiff", "train", str(paths.run), "--stage", stage.name, "--deepspeed", str(paths.deepspeed)),
        ]

    def showcase_environment(self) -> dict[str, str]:
        """Samples are drawn by one process, which takes the threads of all ranks."""
        return {**self.environment, "OMP_NUM_THREADS": str(int(self.environment["OMP_NUM_THREADS"]) * self.processes)}

    def showcase(self) -> list[str]:
        """The command that makes the sheet of samples after the last stage."""
        return [sys.executable, "-m", "megadiff", "showcase", str(self.run.paths.run)]


def plan_launch(run: Run, deepspeed: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Plan:
    """Check everything that can be checked without torch and without reading shards.

    Raises:
        UserError: the DeepSpeed JSON, the batch, the devices or the manifests' buckets do not fit the run.
    """
    check_local_manifests(run)
    devices = find_devices(environment)
    processes = processes_for(run.launch, devices)
    resolve_run(deepspeed, run, data_ranks=processes, accelerator=devices.accelerated)
    added = {"OMP_NUM_THREADS": str(threads_for(run.launch, processes, environment))}
    if not devices.accelerated:
        added = {"DS_ACCELERATOR": "cpu", **added}
    return Plan(run, deepspeed, devices, processes, added)


def missing_files(run: Run) -> list[str]:
    """Local files that the run names and that are not there, as `key: path`."""
    train = run.data.train
    named: dict[str, str | None] = {"data.held_out": run.data.held_out}
    named |= {"data.train": train} if isinstance(train, str) else {f"data.train.{name}": at for name, at in train.items()}
    for name, source in run.data.fields.items():
        named |= {f"data.fields.{name}.{key}": getattr(source, key) for key in source.FILES}
    return [f"{key}: {path}" for key, path in named.items() if path and "://" not in path and not Path(path).exists()]


def describe(plan: Plan) -> str:
    """The exact commands, as a shell would take them."""
    lines = []
    for number, stage in enumerate(plan.run.stages, 1):
        state = " (done already)" if plan.run.paths.stage(stage.name).done.exists() else ""
        lines += [f"# stage {number} of {len(plan.run.stages)}, {stage.name}: {stage.steps:,} steps{state}"]
        if not state:
            lines += [f"{_shell(plan.environment)} {shlex.join(plan.command(stage, 'PORT'))}"]
    if plan.run.showcase:
        lines += ["# samples", f"{_shell(plan.showcase_environment())} {shlex.join(plan.showcase())}"]
    return "\n".join(lines)


def _shell(environment: Mapping[str, str]) -> str:
    return " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())


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
        if not allow_changes:
            folder.check_unchanged(run)
        folder.check_checkpoints(run)
        changed = folder.untouched(run)
        folder.write(run, plan.deepspeed)
        for name in changed:
            if run.paths.stage(name).done.exists():
                say(f"stage {name} is done already: the changes do not reach it (delete {run.folder}/{name} to train it again)")
        if run.launch.processes not in ("accelerators", plan.processes):
            wanted = run.launch.processes
            say(f"this machine has {plan.devices}: starting {plan.processes} of {wanted} processes (the global batch stays)")
        say(f"run {run.name}: {plan.processes} processes on {plan.devices}, folder {run.folder}")
        say(f"watch: {tensorboard_command(run)}")
        with Signals() as signals:
            return _stages(plan, lock, signals, say)


def tensorboard_command(run: Run) -> str:
    """How to open the run's log; the program beside this interpreter, so that no environment need be active."""
    program = Path(sys.executable).parent / "tensorboard"
    shown = os.path.relpath(program) if program.exists() else "tensorboard"
    return shlex.join([min(shown, str(program), key=len), "--logdir", str(run.paths.tensorboard)])


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
    ranks = Command(plan.command(stage, free_port()), {**plan.environment, ERROR_FILE: str(paths.error)}, relays=True)
    (code,) = children.run([ranks], signals, keep=[lock])
    if signals.received:
        _complain(f"interrupted in stage {stage.name}; the same command goes on from its newest checkpoint")
        return 128 + signals.received
    if paths.error.exists():
        _complain(f"error: stage {stage.name}: {paths.error.read_text(encoding='utf-8').strip()}")
        return code or 2
    if code or not paths.done.exists():
        # DeepSpeed's launcher ends with 0 when a signal has killed the process that watches the ranks.
        _complain(f"error: stage {stage.name} ended with {_ending(code)}; see {paths.logs}")
        return 128 - code if code < 0 else code or 1
    return 0


def _complain(message: str) -> None:
    print(f"megadiff: {message}", file=sys.stderr, flush=True)


def _ending(code: int) -> str:
    for number in (-code, 256 - code):
        if 0 < number < 65:
            return f"signal {number} ({signal.Signals(number).name})" if number in set(signal.Signals) else f"signal {number}"
    return f"exit code {code}" if code else "exit code 0 before its last step"
