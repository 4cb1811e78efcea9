"""A loss that rises and stays: back to the checkpoint from before, without the batches that did it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megadiff.config.run_folder import CheckpointsFolder
from megadiff.weights.checkpoint import CheckpointReader
from tests.engine.layouts import WORKER
from tests.ranks import run_ranks

STEPS = 14
SPIKE = (11, 13)


def train(folder: Path, zero: int, *overrides: str, **request: Any) -> dict[str, Any]:
    request = {
        "folder": str(folder),
        "stages": ["first"],
        "deepspeed": f"ds_configs/zero{zero}.json",
        "overrides": [
            f"stages.*.steps={STEPS}",
            "stages.*.checkpoint={every_steps: 4, keep: 9}",
            "safeguards.spikes={window: 10, steps: 2, most: 1}",
            *overrides,
        ],
        **request,
    }
    return run_ranks(WORKER, 2, request)[0]


def incidents(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "incidents.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "spike"]


@pytest.mark.distributed
@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_training_goes_back_and_leaves_out_the_batches_of_the_spike(zero: int, tmp_path: Path) -> None:
    report = train(tmp_path / "spiked", zero, spike=SPIKE)
    assert "error" not in report, report
    assert report["data_steps"] == [*range(13), 8, 9, 10, *range(13, 16)]
    assert report["steps"] == [*range(1, STEPS + 1)]
    if zero == 3:
        calm = train(tmp_path / "calm", zero)
        assert all(report[curve][:11] == calm[curve][:11] for curve in ("loss", "grad_norm"))
        assert incidents(tmp_path / "calm") == []
    (told,) = incidents(tmp_path / "spiked")
    assert told["step"] == 8
    assert "from step 12 on; back to step 8, without the batches 11 to 12; samples of rank 0: " in told["detail"]
    assert told["detail"].count(" and 8 more") == 2
    newest = CheckpointReader(CheckpointsFolder(tmp_path / "spiked/first/checkpoints").step(STEPS))
    assert newest.manifest.progress["skipped"] == [[11, 12]]
    assert newest.manifest.progress["data_step"] == STEPS + 2


@pytest.mark.distributed
@pytest.mark.slow
def test_a_stage_goes_back_a_few_times_only(tmp_path: Path) -> None:
    report = train(tmp_path, 1, spike=(11, 40))
    assert "after 1 rollbacks; lower optimizer.learning_rate" in report["error"]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_spike_without_a_checkpoint_from_before_it_is_told_of_only(tmp_path: Path) -> None:
    report = train(tmp_path, 1, "stages.*.checkpoint={every_steps: 13}", spike=SPIKE)
    assert report["data_steps"] == [*range(STEPS)]
    (told,) = incidents(tmp_path)
    assert "no checkpoint from before, so training goes on" in told["detail"]
