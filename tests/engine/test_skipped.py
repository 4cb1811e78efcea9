"""A step whose loss or gradient is not finite on one rank changes nothing on any, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megadiff.config.run_folder import CheckpointsFolder
from megadiff.weights.checkpoint import MOMENTS, CheckpointReader
from tests.engine.layouts import CLIPPED, CURVES, TOLERANCE, WORKER
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS, POISONED = 4, 3
LAYOUTS = {
    "ZeRO-0": {"deepspeed": "ds_configs/zero0.json"},
    "ZeRO-1": {"deepspeed": "ds_configs/zero1.json"},
    "ZeRO-2": {"deepspeed": "ds_configs/zero2.json"},
    "ZeRO-3": {"deepspeed": "ds_configs/zero3.json"},
    "pipeline, ZeRO-0": {"deepspeed": "ds_configs/pipeline.json", "zero_options": {"stage": 0}},
    "pipeline, ZeRO-1": {"deepspeed": "ds_configs/pipeline.json"},
    "tensor, ZeRO-0": {"deepspeed": "ds_configs/tensor_zero1.json", "zero_options": {"stage": 0}},
    "tensor, ZeRO-1": {"deepspeed": "ds_configs/tensor_zero1.json"},
}
OFTEN = ("ZeRO-0", "ZeRO-3", "pipeline, ZeRO-1", "tensor, ZeRO-1")
"""Whose ways of skipping differ; the others are slow tests."""


def train(folder: Path, layout: dict[str, Any], ranks: int, kind: str, *overrides: str) -> list[dict[str, Any]]:
    request = {
        "folder": str(folder),
        "stages": ["first"],
        "poison": [POISONED, kind],
        "overrides": [
            f"stages.*.steps={STEPS}",
            CLIPPED,
            "stages.*.checkpoint={every_steps: 1, keep: 9}",
            *overrides,
        ],
        **layout,
    }
    return run_ranks(WORKER, ranks, request)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("one"), LAYOUTS["ZeRO-0"], 1, "gradient")[0]


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *(("gradient", layout) for layout in OFTEN),
        ("loss", "ZeRO-0"),
        *(pytest.param("gradient", layout, marks=pytest.mark.slow) for layout in LAYOUTS if layout not in OFTEN),
        *(pytest.param("loss", layout, marks=pytest.mark.slow) for layout in ("ZeRO-3", "pipeline, ZeRO-1")),
    ],
)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(
    kind: str, layout: str, one_rank: dict[str, Any], tmp_path: Path
) -> None:
    for report in train(tmp_path, LAYOUTS[layout], 2, kind):
        assert "error" not in report, report
        assert report["applied"] == [step != POISONED for step in range(1, STEPS + 1)]
        for curve in CURVES:
            for step in {*range(STEPS)} - {POISONED - 1}:
                assert abs(report[curve][step] / one_rank[curve][step] - 1) < TOLERANCE
    before, after = (CheckpointReader(CheckpointsFolder(tmp_path / "first/checkpoints").step(POISONED - n)) for n in (1, 0))
    for name, (_, trained) in before.manifest.parameters.items():
        for kind_of in ("weight", "ema.main", *(MOMENTS if trained else ())):
            assert torch.equal(before.read_whole(kind_of, name), after.read_whole(kind_of, name)), (kind_of, name)
    for counter in ("adam_steps", "ema_updates"):
        assert before.manifest.progress[counter] == after.manifest.progress[counter] == POISONED - 1
    incidents = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert [(each["kind"], each["step"]) for each in incidents] == [("start", 0), ("skipped", POISONED)]
    replicas = 2 if layout.startswith("ZeRO") else 1
    assert incidents[1]["detail"].partition("; samples of ")[2].count("rank ") == replicas


@pytest.mark.parametrize(
    "layout", ["ZeRO-2", *(pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS if layout != "ZeRO-2")]
)
def test_in_bfloat16_a_step_is_skipped_likewise_and_the_losses_stay_near_float32(
    layout: str, one_rank: dict[str, Any], tmp_path: Path
) -> None:
    for report in train(tmp_path, LAYOUTS[layout], 2, "gradient", "stages.*.precision=bf16"):
        assert report["applied"] == [step != POISONED for step in range(1, STEPS + 1)]
        assert report["loss"] != one_rank["loss"]
        assert report["loss"] == pytest.approx(one_rank["loss"], rel=0.02)


def test_too_many_skipped_steps_stop_all_ranks_with_one_sentence(tmp_path: Path) -> None:
    reports = train(tmp_path, LAYOUTS["ZeRO-0"], 2, "gradient", "safeguards={skipped_in_a_row: 1}")
    assert reports[0]["error"] == reports[1]["error"]
    assert reports[0]["error"].startswith(f"step {POISONED}: loss ")
    incidents = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert [each["kind"] for each in incidents] == ["start", "skipped", "error"]
