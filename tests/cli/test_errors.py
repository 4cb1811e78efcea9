"""Errors of the machine and of the program: one sentence for what a user can mend, a traceback for the rest."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadiff.cli import check_config
from megadiff.cli import main as cli
from megadiff.cli.errors import enough_memory
from megadiff.config.errors import UserError
from tests.cli.mistakes import mistake

ROOT = Path(__file__).parents[2]


def test_a_rank_leaves_its_sentence_to_the_launcher_and_the_first_wins(
    run_file: str, json_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = tmp_path / "error.txt"
    monkeypatch.setenv("MEGADIFF_ERROR_FILE", str(error))
    for stage in ("third", "fourth"):
        assert cli.main(["train", run_file, "--stage", stage, "--deepspeed", json_file]) == 2
    assert capsys.readouterr().err == ""
    assert "third" in error.read_text()
    assert "fourth" not in error.read_text()


def test_an_interruption_exits_with_130_and_no_traceback(
    run_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megadiff.cli.check_config.load_run", interrupted)
    assert cli.main(["check-config", run_file]) == 130
    assert capsys.readouterr().err == "megadiff: interrupted\n"


def test_a_fault_of_the_program_keeps_its_traceback(run_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("megadiff.cli.check_config.load_run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["check-config", run_file])


@pytest.mark.parametrize("path", [None, "/there/file"])
def test_a_full_disk_is_one_sentence_whatever_was_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    def run(_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([path] if path else []))

    monkeypatch.setattr(check_config, "run", run)
    said = mistake(capsys, "check-config", "a.yaml")
    assert f"no room for {path or 'what it writes'}" in said
    assert "(No space left on device); make some, and give the command again" in said


def test_other_errors_of_files_are_not_taken_for_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(check_config, "run", run)
    with pytest.raises(OSError, match="Input/output error"):
        cli.main(["check-config", "a.yaml"])


def test_output_to_a_full_disk_is_one_sentence(run_file: str) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "megadiff", "check-config", run_file]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    ],
)
def test_what_takes_more_memory_than_there_is_is_one_sentence(error: Exception) -> None:
    with pytest.raises(UserError, match="not enough memory for this; take a smaller --batch"), enough_memory("--batch"):
        raise error


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), enough_memory("--batch"):
        raise RuntimeError("shapes do not fit")
