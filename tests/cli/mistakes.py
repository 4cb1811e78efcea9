"""Command lines that must fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadiff.cli import main as cli


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What a command line that must fail says: one line, exit code 2, nothing on stdout."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("megadiff: error: ")
    assert len(err.splitlines()) == 1
    return err
