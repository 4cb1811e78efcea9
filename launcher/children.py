"""Child processes: they get this one's signals, fail together, and end when it ends, even if it is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megadiff.config.errors import UserError

ERROR_FILE = "MEGADIFF_ERROR_FILE"
"""Variable with the file that a process writes its sentence to when it stops for a user's mistake; it is printed once."""
LAUNCHER = "MEGADIFF_LAUNCHER"
"""Variable with the process that children end with, as `pid start`: see `end_with_launcher`."""
GRACE_S = 45.0
"""Seconds between asking children to end and killing them; DeepSpeed's launcher gives its ranks 30 s after SIGTERM."""

MOST_PER_CORE = 8
"""Most processes of a verb per core: they may wait for an object store, but each takes memory."""

_WATCH_S = 1.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Command:
    """What to run.

    Attributes:
        environment: variables added to this process's.
        quiet: standard output is discarded.
    """

    arguments: Sequence[str]
    environment: Mapping[str, str]
    quiet: bool = False


class Signals:
    """While entered, SIGINT, SIGTERM and SIGHUP end what `run` runs; a second one kills it."""

    def __init__(self) -> None:
        self.received = 0
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Signals:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received:
            for process in self.processes:
                _kill(process)
        self.received = number


def run(commands: Sequence[Command], signals: Signals, *, keep: Sequence[int] = ()) -> list[int]:
    """Run processes side by side. After a failure or a signal all are asked to end, and killed after GRACE_S.

    Args:
        keep: file descriptors that the children inherit.

    Returns:
        Exit codes, negative for a signal; 1 for a process that was not started or had to be killed.
    """
    if signals.received:
        return [1] * len(commands)
    with ExitStack() as stack:
        processes = signals.processes = []
        for command in commands:
            if not signals.received:
                processes.append(stack.enter_context(_running(command, keep)))
        terminated = False
        deadline = float("inf")
        while None in (codes := [process.poll() for process in processes]) and time.monotonic() < deadline:
            if not terminated and (signals.received or any(codes)):
                terminated, deadline = True, time.monotonic() + GRACE_S
                for process in processes:
                    _send(process, signal.SIGTERM)
            time.sleep(0.1)
        signals.processes = []
    return [1 if code is None else code for code in codes] + [1] * (len(commands) - len(codes))


def several(processes: int, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run a command line of megadiff as several processes, which share the cores of this machine.

    Args:
        environment: variables added for each process.

    Returns:
        0, the exit code of the first process that failed, or 128 + n where signal n ended them.

    Raises:
        UserError: a process reported a user's mistake.
    """
    cores = len(os.sched_getaffinity(0))
    if processes > MOST_PER_CORE * cores:
        raise UserError(f"--processes {processes} is too many for {cores} cores; give at most {MOST_PER_CORE * cores}")
    own = max(cores // processes, 1)
    variable = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(int(variable), own) if variable.isdigit() and int(variable) else own
    with tempfile.TemporaryDirectory() as folder, Signals() as signals:
        error = Path(folder) / "error"
        common = {"WORLD_SIZE": str(processes), "OMP_NUM_THREADS": str(threads), ERROR_FILE: str(error), **(environment or {})}
        command = [sys.executable, "-m", "megadiff", *arguments]
        ranks = [
            Command(command, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, quiet=rank > 0)
            for rank in range(processes)
        ]
        codes = run(ranks, signals)
        if signals.received:
            print("megadiff: interrupted", file=sys.stderr, flush=True)
            return 128 + signals.received
        # On a full disk the file may exist and be empty.
        if message := error.read_text(encoding="utf-8").strip() if error.exists() else "":
            raise UserError(message)
        return next((abs(code) for code in codes if code), 0)


def end_with_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """End this process within about a second of the end of the one that launched it, if LAUNCHER names one.

    A SIGKILL gives a launcher no time to tell its ranks, and processes of DeepSpeed's stand between them.
    """
    pid, _, start = environment.get(LAUNCHER, "").partition(" ")
    if not pid.isdigit():
        return

    def watch() -> None:
        while process_start(int(pid)) == start:
            time.sleep(_WATCH_S)
        os._exit(128 + signal.SIGTERM)

    if process_start(int(pid)) != start:
        os._exit(128 + signal.SIGTERM)
    threading.Thread(target=watch, name="end with launcher", daemon=True).start()


def process_start(pid: int) -> str:
    """When a process started, in clock ticks since the machine did; empty if it has ended, whether or not it was reaped."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


@contextmanager
def _running(command: Command, keep: Sequence[int]) -> Iterator[subprocess.Popen[bytes]]:
    """A child with a process group of its own; nothing of it is left afterwards."""
    process = subprocess.Popen(
        list(command.arguments),
        env={**os.environ, LAUNCHER: f"{os.getpid()} {process_start(os.getpid())}", **command.environment},
        stdout=subprocess.DEVNULL if command.quiet else None,
        start_new_session=True,
        pass_fds=keep,
        preexec_fn=_die_with_parent,
    )
    try:
        yield process
    finally:
        _kill(process)
        process.wait()


def _die_with_parent() -> None:
    """In the child, before its program starts: Linux kills it when the parent ends."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill(process: subprocess.Popen[bytes]) -> None:
    _send(process, signal.SIGKILL)


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    """A signal to a child and all that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
