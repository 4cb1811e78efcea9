"""Processes for tests: a script run once per rank over gloo, and an end within a time for whatever a test started."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.forks import Forked, start_forked

ROOT = Path(__file__).parents[1]
Process = subprocess.Popen[str] | Forked
LAUNCH_S = 120.0
"""What a test started has ended by then, or the test fails with the stacks of its processes."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def descendants(parent: int) -> list[int]:
    """Process ids below one; DeepSpeed's launcher gives its ranks sessions of their own."""
    try:
        children = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(pid for child in children for pid in descendants(child))]


def signal_all(process: Process, number: int) -> None:
    """A signal to a process and all that it has started."""
    for pid in [process.pid, *descendants(process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def finish(process: Process, timeout_s: float = LAUNCH_S) -> subprocess.CompletedProcess[str]:
    """Wait for a process; what was piped of its output comes back.

    Raises:
        AssertionError: it runs on after `timeout_s`; says where all its Python processes stand (PYTHONFAULTHANDLER is set).
    """
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        signal_all(process, signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            out, err = process.communicate(timeout=10)
            raise AssertionError(
                f"{process.args} ran for more than {timeout_s:g} s:\n{(out or '')[-4000:]}\n{(err or '')[-12000:]}"
            ) from None
        raise AssertionError(f"{process.args} ran for more than {timeout_s:g} s, and could not be ended") from None
    finally:
        signal_all(process, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
    """This interpreter on this tree and the CPU, its outputs piped."""
    added = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, **added},
        cwd=cwd,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    )


def start_megadiff(*arguments: str, **how: Any) -> subprocess.Popen[str]:
    """A command line of this tree's megadiff."""
    return start_python("-m", "megadiff", *arguments, **how)


def run_megadiff(*arguments: str, timeout_s: float = LAUNCH_S, **how: Any) -> subprocess.CompletedProcess[str]:
    """`start_megadiff` to its end."""
    return finish(start_megadiff(*arguments, **how), timeout_s)


def kill_when(process: Process, ready: Callable[[], bool], number: int = signal.SIGKILL) -> None:
    """A signal to a command and all that it has started, as soon as something is so."""
    wait_until(ready, process)
    signal_all(process, number)
    finish(process)


def wait_until(ready: Callable[[], bool], process: Process, timeout_s: float = LAUNCH_S) -> None:
    """Raises AssertionError if a process ends before something is so, or it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            ended = finish(process, 1)
            raise AssertionError(f"it never came: exit code {ended.returncode}\n{ended.stdout or ''}\n{ended.stderr or ''}")
        time.sleep(0.01)


_runs = itertools.count()


def start_ranks(script: Path, world: int, request: dict[str, Any]) -> list[Forked]:
    """One process per rank; the script gets the request as JSON in its first argument."""
    return _fork_ranks([str(script), json.dumps(request)], world)


def fork_megadiff(*arguments: str, world: int = 1) -> subprocess.CompletedProcess[str]:
    """A command line of this tree's megadiff to its end, as one rank or several; a rank that failed, or else the first one."""
    ranks = _fork_ranks(["-m", "megadiff", *arguments], world)
    ended = [finish(rank) for rank in ranks]
    return next((one for one in ended if one.returncode), ended[0])


def _fork_ranks(arguments: list[str], world: int) -> list[Forked]:
    common = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first = next(_runs)  # neighbours among the ranks hash strings unlike, and so does one rank in two runs
    return [
        start_forked(arguments, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, turn=first + rank)
        for rank in range(world)
    ]


def run_ranks(script: Path, world: int, request: dict[str, Any], *, timeout_s: float = LAUNCH_S) -> list[Any]:
    """Run to the end; returns what each rank printed as JSON on its last line. A rank that fails fails the test."""
    processes = start_ranks(script, world, request)
    try:
        ended = [finish(process, timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for one in ended:
        assert one.returncode == 0, f"a rank ended with {one.returncode}:\n{one.stdout[-1000:]}\n{one.stderr[-4000:]}"
    return [json.loads(one.stdout.strip().splitlines()[-1]) for one in ended]
