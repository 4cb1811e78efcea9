"""A stage's preflight, from the command line: what it refuses is one sentence, an incident, and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.small import TOKENIZER, sample, write_source
from tests.ranks import fork_megadiff

pytestmark = pytest.mark.distributed


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    write_source(tmp_path / "source", [16, 16], {5: sample(1)})
    data = [f"data.train={tmp_path}/source", "data.block_shards=1", f"data.fields.text.tokenizer={TOKENIZER}"]
    run = [f"folder={tmp_path}/run", "stages.first.steps=1", "preflight.enabled=true", *data]
    return ["train", "tests/tiny.yaml", *run, "--stage", "first", "--deepspeed", "ds_configs/zero1.json"]


def test_a_full_disk_and_missing_data_stop_the_stage_before_it_is_built(command: list[str], tmp_path: Path) -> None:
    ended = fork_megadiff(*command, f"preflight.free_bytes={2**60}", f"data.held_out={tmp_path}/nowhere", world=2)
    assert ended.returncode == 2
    (said,) = [line for line in ended.stderr.splitlines() if "preflight: " in line]
    assert f" gets no data.held_out: {tmp_path}/nowhere/manifest.json cannot be read: No such file" in said
    assert f"left in {tmp_path}/run, and needs 1073741824.0" in said
    (incident,) = map(json.loads, (tmp_path / "run/incidents.jsonl").read_text().splitlines())
    assert (incident["kind"], incident["stage"], incident["step"]) == ("preflight", "first", 0)
    assert said.endswith(incident["detail"].removeprefix("PreflightError: "))
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_stage_whose_nodes_are_sound_is_trained(command: list[str], tmp_path: Path) -> None:
    ended = fork_megadiff(*command, world=2)
    assert ended.returncode == 0, ended.stderr
    assert "preflight: 2 ranks on " in (tmp_path / "run/first/logs/rank_1.log").read_text()
    assert (tmp_path / "run/first/DONE").exists()
