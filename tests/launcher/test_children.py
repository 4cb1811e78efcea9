"""Processes that a launcher starts end with it, whatever ends it. The processes and signals are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megadiff.config.errors import UserError
from megadiff.launcher import children
from megadiff.launcher.children import Command, Signals
from tests.ranks import finish, start_python, wait_until

pytestmark = pytest.mark.distributed

# A launcher of two, each of which has a rank below it that only watches the launcher, as under DeepSpeed's launcher.
RANK = """
import pathlib, os, sys, time
from megadiff.launcher.children import end_with_launcher
end_with_launcher()
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(100)
"""
RUNNER = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, *sys.argv[1:]], start_new_session=True).returncode)"
LAUNCHER = """
import sys
from megadiff.launcher.children import Command, Signals, run
with Signals() as signals:
    commands = [Command([sys.executable, "-c", sys.argv[1], "-c", sys.argv[2], place], {}) for place in sys.argv[3:]]
    print(run(commands, signals), signals.received)
"""


def runs(pid: int) -> bool:
    return children.process_start(pid) != ""


def wait_for_end(pids: list[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(runs, pids))


@pytest.fixture
def launcher(tmp_path: Path) -> tuple[subprocess.Popen[str], list[int]]:
    places = [tmp_path / "first", tmp_path / "second"]
    started = start_python("-c", LAUNCHER, RUNNER, RANK, *map(str, places))
    wait_until(lambda: all(place.exists() and place.read_text() for place in places), started)
    return started, [int(place.read_text()) for place in places]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_ranks_end_within_five_seconds_of_their_launcher(
    launcher: tuple[subprocess.Popen[str], list[int]], number: signal.Signals
) -> None:
    started, ranks = launcher
    assert all(map(runs, ranks))
    started.send_signal(number)
    assert wait_for_end(ranks, 5)
    ended = finish(started)
    if number != signal.SIGKILL:
        assert ended.stdout.split() == [f"[{-signal.SIGTERM},", f"{-signal.SIGTERM}]", str(int(number))]


def test_a_rank_whose_launcher_has_gone_before_it_starts_ends_at_once(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    start = children.process_start(gone.pid)
    gone.wait()
    rank = start_python("-c", RANK, str(tmp_path / "place"), **{children.LAUNCHER: f"{gone.pid} {start}"})
    assert finish(rank).returncode == 143
    assert not (tmp_path / "place").exists()


def test_a_process_of_the_same_number_is_not_the_launcher() -> None:
    assert children.process_start(os.getpid()) not in ("", "1")
    assert not runs(2**22 + 1)


def test_one_that_fails_ends_the_others() -> None:
    sleeps, fails = "import time; time.sleep(100)", "import sys; sys.exit(3)"
    before = time.monotonic()
    with Signals() as signals:
        codes = children.run([Command([sys.executable, "-c", script], {}) for script in (sleeps, fails)], signals)
    assert codes == [-signal.SIGTERM, 3]
    assert time.monotonic() - before < 30


def test_a_verb_of_several_processes_ends_with_its_signal(tmp_path: Path) -> None:
    """`sample`, `data pack`, `data encode` and `launch -- VERB` start their processes so."""
    script = (
        "import sys\nfrom megadiff.launcher import children\n"
        f"children.sys.executable = {str(tmp_path / 'python')!r}\nsys.exit(children.several(2, ['verb']))"
    )
    (tmp_path / "python").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/rank_$RANK\nsleep 100\n")
    (tmp_path / "python").chmod(0o755)
    started = start_python("-c", script)
    places = [tmp_path / "rank_0", tmp_path / "rank_1"]
    wait_until(lambda: all(place.exists() and place.read_text().strip() for place in places), started)
    started.terminate()
    ended = finish(started)
    assert (ended.returncode, ended.stderr) == (143, "megadiff: interrupted\n")
    assert wait_for_end([int(place.read_text()) for place in places], 5)


def test_a_signal_is_heard_while_processes_are_started(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom megadiff.launcher.children import Command, Signals, run\n"
        "with Signals() as signals:\n"
        "    print(len(run([Command(['sleep', '100'], {}) for _ in range(100_000)], signals)), signals.received)"
    )
    started = start_python("-c", script)
    time.sleep(2)
    started.terminate()
    assert finish(started, 60).stdout.split() == ["100000", str(int(signal.SIGTERM))]


def test_more_processes_than_a_machine_can_hold_are_refused() -> None:
    with pytest.raises(UserError, match=r"--processes 100000 is too many for .* cores; give at most"):
        children.several(100_000, ["data", "pack"])
