"""Real processes for tests: a script run once per rank over gloo, and an end within a time for whatever a test started."""

from __future__ import annotations

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

ROOT = Path(__file__).parents[1]
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


def signal_all(process: subprocess.Popen[str], number: int) -> None:
    """A signal to a process and all that it has started."""
    for pid in [process.pid, *descendants(process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def finish(process: subprocess.Popen[str], timeout_s: float = LAUNCH_S) -> subprocess.CompletedProcess[str]:
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


def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool], number: int = signal.SIGKILL) -> None:
    """A signal to a command and all that it has started, as soon as something is so."""
    wait_until(ready, process)
    signal_all(process, number)
    finish(process)


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = LAUNCH_S) -> None:
    """Raises AssertionError if a process ends before something is so, or it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            ended = finish(process, 1)
            raise AssertionError(f"it never came: exit code {ended.returncode}\n{ended.stdout or ''}\n{ended.stderr or ''}")
        time.sleep(0.01)


def start_ranks(script: Path, world: int, request: dict[str, Any]) -> list[subprocess.Popen[str]]:
    """One process per rank; the script gets the request as JSON in its first argument."""
    port = free_port()
    processes = []
    for rank in range(world):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, str(script), json.dumps(request)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
    return processes


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
