"""A stage that goes on with another configuration or other software: refused, or told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megadiff.config.errors import ConfigError, UserError
from megadiff.config.load import load_run
from megadiff.config.run_folder import MANIFEST, CheckpointsFolder
from megadiff.distributed.joining import software
from megadiff.training.resuming import changes_since
from megadiff.weights.checkpoint import read_manifest
from tests.ranks import fork_megadiff
from tests.weights.copied import published

WARMER = "stages.first.optimizer.warmup_steps=3"


def test_changes_of_the_training_are_refused_unless_allowed(tmp_path: Path) -> None:
    folder = published(CheckpointsFolder(tmp_path), 4)
    run = load_run("tests/tiny.yaml", [WARMER, "stages.first.log_every_steps=2", "stages.second.steps=9"])
    with pytest.raises(UserError, match=r"stages.first.optimizer.warmup_steps: 2 -> 3; name a new folder"):
        changes_since(folder, run, "first", {}, allowed=False)
    assert changes_since(folder, run, "first", {}, allowed=True) == (
        "stages.first.optimizer.warmup_steps: 2 -> 3",
        "stages.first.log_every_steps: 1 -> 2",
    )
    assert changes_since(folder, load_run("tests/tiny.yaml"), "first", {}, allowed=False) == ()


def test_a_configuration_of_a_version_with_other_keys_is_told_where_changes_are_allowed(tmp_path: Path) -> None:
    folder, run = published(CheckpointsFolder(tmp_path), 4), load_run("tests/tiny.yaml")
    path = folder / MANIFEST
    path.write_text(path.read_text().replace("lanes:", "tracks:"))
    with pytest.raises(ConfigError, match=r"unknown key data\.tracks"):
        changes_since(folder, run, "first", {}, allowed=False)
    (line,) = changes_since(folder, run, "first", {}, allowed=True)
    assert line.startswith("the configuration was another one: ")


def test_software_that_was_replaced_is_told(tmp_path: Path) -> None:
    folder, run = published(CheckpointsFolder(tmp_path), 4), load_run("tests/tiny.yaml")
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "software": {"torch": "2.12", "numpy": "2"}}))
    assert changes_since(folder, run, "first", {"torch": "2.13", "numpy": "2"}, allowed=False) == ("torch: 2.12 -> 2.13",)


@pytest.mark.distributed
def test_a_stage_goes_on_with_changes_only_if_told_to_and_records_them(tmp_path: Path) -> None:
    def train(*changes: str, steps: int = 1) -> str:
        run = [f"folder={tmp_path}/run", f"stages.first.steps={steps}", "stages.first.checkpoint.every_steps=1", *changes]
        ended = fork_megadiff("train", "tests/tiny.yaml", *run, "--stage", "first", "--deepspeed", "ds_configs/zero1.json")
        return "" if ended.returncode == 0 else ended.stderr

    assert train() == ""
    checkpoint = tmp_path / "run/first/checkpoints/step_00000001"
    assert read_manifest(checkpoint).software == software()
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["software"]["code of megadiff"] = "0123"
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert "another configuration: stages.first.steps: 1 -> 2; name a new folder" in train(steps=2)
    (tmp_path / "run/run.yaml").unlink()  # as on an empty disk, to which a copy of a checkpoint is downloaded
    assert "step_00000001 holds a run of another configuration: stages.first.steps: 1 -> 2" in train(steps=2)
    assert train("--allow-changes", "stages.first.log_every_steps=2", steps=2) == ""
    incidents = [json.loads(line) for line in (tmp_path / "run/incidents.jsonl").read_text().splitlines()]
    (told,) = [each for each in incidents if each["kind"] == "changed"]
    lines = told["detail"].split("; ")
    assert (told["step"], lines[:2]) == (1, ["stages.first.steps: 1 -> 2", "stages.first.log_every_steps: 1 -> 2"])
    assert lines[2:] == [f"code of megadiff: 0123 -> {software()['code of megadiff']}"]
    assert load_run(tmp_path / "run/run.yaml").stages[0].steps == 2
