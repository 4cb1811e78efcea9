"""The samples of a step that may have done harm are named, so that they can be looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megadiff.cli import main as cli
from megadiff.config.jobs import FAILED_AT
from tests.data.small import TRAIN
from tests.ranks import fork_megadiff

pytestmark = pytest.mark.distributed


def test_the_step_at_which_the_start_before_ended_is_done_again_with_its_samples_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAILED_AT, "2")
    run = [f"folder={tmp_path}/run", "stages.first.steps=2", "stages.first.batch.global_samples=32"]
    ended = fork_megadiff("train", "tests/tiny.yaml", *run, "--stage", "first", "--deepspeed", "ds_configs/zero1.json", world=2)
    assert ended.returncode == 0, ended.stderr
    rows = map(json.loads, (tmp_path / "run/incidents.jsonl").read_text().splitlines())
    (told,) = [row for row in rows if row["kind"] == "suspect"]
    assert told["step"] == 2
    what, _, ranks = told["detail"].partition("; samples of ")
    assert what == "the start before this one ended here"
    for rank, text in enumerate(ranks.split("; ")):
        assert text.startswith(f"rank {rank}: ")
        first = text.removeprefix(f"rank {rank}: ").removesuffix(" and 8 more").split(", ")
        assert len(first) == 8
        log = (tmp_path / f"run/first/logs/rank_{rank}.log").read_text()
        assert log.count("data step 1 had sample ") == 16
        assert [name for name in first if f"data step 1 had sample {name}\n" in log] == first
    assert cli.main(["data", "show", str(TRAIN), "--samples", *first, "--out", str(tmp_path / "sheet.png")]) == 0
