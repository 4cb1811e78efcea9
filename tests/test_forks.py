"""A forked child starts, speaks and ends as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from megadiff.launcher.children import process_start
from tests.forks import Forked, start_forked
from tests.ranks import descendants, finish, kill_when

pytestmark = pytest.mark.distributed

SCRIPT = """
import json, os, subprocess, sys, time
if sys.argv[1] == "tell":
    own = {"hash": hash("megadiff"), "session": os.getsid(0) == os.getpid(), "name": __name__}
    given = {"given": os.environ.get("GIVEN"), "arguments": sys.argv[1:], "path": sys.path[0], "cwd": os.getcwd()}
    print(json.dumps(own | given))
    sys.exit(3)
if sys.argv[1] == "fail":
    raise ValueError("it failed")
subprocess.Popen(["sleep", "100"])
open("ready", "w").close()
time.sleep(100)
"""


def start(folder: Path, *arguments: str, turn: int = 0) -> Forked:
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "GIVEN": "value"}
    return start_forked([str(folder / "script.py"), *arguments], cwd=folder, environment=environment, turn=turn)


def test_a_script_gets_its_own_arguments_environment_and_folder_and_its_exit_code_comes_back(tmp_path: Path) -> None:
    ended = [finish(start(tmp_path, "tell", "more", turn=turn)) for turn in range(3)]
    assert [one.returncode for one in ended] == [3, 3, 3]
    told = [json.loads(one.stdout) for one in ended]
    hashes = [one.pop("hash") for one in told]
    assert hashes[0] == hashes[2] != hashes[1]
    place = str(tmp_path)
    expected = {
        "session": True,
        "name": "__main__",
        "given": "value",
        "arguments": ["tell", "more"],
        "path": place,
        "cwd": place,
    }
    assert told == [expected] * 3


def test_a_traceback_comes_back(tmp_path: Path) -> None:
    ended = finish(start(tmp_path, "fail"))
    assert ended.returncode == 1
    assert ended.stderr.endswith("ValueError: it failed\n")


def test_a_kill_reaches_what_the_child_has_started(tmp_path: Path) -> None:
    child = start(tmp_path, "wait")
    below: list[int] = []

    def ready() -> bool:
        below[:] = descendants(child.pid)
        return (tmp_path / "ready").exists()

    kill_when(child, ready)
    assert child.returncode == -signal.SIGKILL
    assert below
    deadline = time.monotonic() + 5
    while any(map(process_start, below)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_that_runs_too_long_fails_with_its_stacks(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)ran for more than 0.5 s.*most recent call first.*script.py"):
        finish(start(tmp_path, "wait"), 0.5)
