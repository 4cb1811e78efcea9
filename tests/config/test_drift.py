"""Which changes between two starts of a run are told, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadiff.config.drift import FREE, drift
from megadiff.config.errors import UserError
from megadiff.config.schema import Run
from tests.minimal import load


def test_keys_that_differ_are_lines_in_order_and_sorted_by_what_they_change(tmp_path: Path) -> None:
    before = load(tmp_path)
    after = load(
        tmp_path,
        "seed=1",
        "stages.*.optimizer.learning_rate=0.001",
        "stages.second.checkpoint.every_steps=7",
        "stages.*.batch={global_samples: 32, micro_batch: 8}",
        "data.workers=0",
        "safeguards.spikes=null",
    )
    found = drift(before, after)
    rate = "optimizer.learning_rate: 0.0002 -> 0.001"
    assert found.training == (
        "seed: 0 -> 1",
        *(f"stages.{stage}.{line}" for stage in ("first", "second") for line in ("batch.global_samples: 16 -> 32", rate)),
    )
    assert found.free[0] == "data.workers: 2 -> 0"
    assert "stages.second.checkpoint.every_steps: 1000 -> 7" in found.free
    assert "stages.first.batch.micro_batch: 4 -> 8" in found.free
    assert found.free[-1] == 'safeguards.spikes: {"deviations": 8.0, "steps": 10, "window": 100, "most": 3} -> null'
    assert drift(before, before) == drift(after, after)
    assert not drift(before, before).training + drift(before, before).free


def test_what_is_of_another_stage_can_be_left_out(tmp_path: Path) -> None:
    before, after = load(tmp_path), load(tmp_path, "stages.second.steps=9")
    assert drift(before, after, "first").training == ()
    assert drift(before, after, "second").training == ("stages.second.steps: 4 -> 9",)


def test_only_changes_of_the_training_are_refused_and_many_are_counted(tmp_path: Path) -> None:
    before, cadence = load(tmp_path), load(tmp_path, "stages.*.log_every_steps=1")
    lines = drift(before, cadence).accepted("runs/a", allowed=False)
    assert lines == tuple(f"stages.{stage}.log_every_steps: 10 -> 1" for stage in ("first", "second"))
    many = ("seed=1", "stages.*.precision=fp32", "data.lanes=4", "stages.*.steps=5", "data.block_shards=1")
    changed = drift(before, load(tmp_path, *many))
    with pytest.raises(UserError, match=r"^runs/a holds a run of another configuration: seed: 0 -> 1; .* and 1 more; name"):
        changed.accepted("runs/a", allowed=False)
    assert len(changed.accepted("runs/a", allowed=True)) == 7


def test_every_free_key_is_a_key_of_a_run(tmp_path: Path) -> None:
    tree = load(tmp_path).model_dump(mode="json")
    for key in FREE:
        node = tree
        for part in key.split("."):
            node = node[0] if part == "*" else node[part]


def test_stages_are_matched_by_name(tmp_path: Path) -> None:
    before = load(tmp_path)
    alone = Run.model_validate({**before.model_dump(), "stages": [before.stages[0].model_dump()]})
    assert [line.partition(":")[0] for line in drift(before, alone).training] == ["stages.second", "stages.(order)"]
