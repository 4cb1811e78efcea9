"""A run to give to the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.minimal import ZERO3, minimal_run, write_json


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    minimal_run(tmp_path)
    return str(tmp_path / "minimal.yaml")


@pytest.fixture
def json_file(tmp_path: Path) -> str:
    return str(write_json(tmp_path / "zero3.json", ZERO3))
