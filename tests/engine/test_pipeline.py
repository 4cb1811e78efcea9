"""The pipeline engine over real processes: the curve of one rank, whatever the stages, the shapes and ZeRO."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megadiff.config.run_folder import CheckpointsFolder
from megadiff.weights.checkpoint import CheckpointReader
from megadiff.weights.loading import load
from tests.engine import layouts
from tests.engine.layouts import (
    CLIP,
    CLIPPED,
    HELD_OUT,
    RECOMPUTED,
    SHORT,
    STAGES,
    STEPS,
    assert_idle_weights_stay,
    assert_same_curve,
    assert_same_held_out,
    newest,
)
from tests.engine.test_zero import train
from tests.engine.worker import probe_input
from tests.ranks import ROOT, run_ranks

pytestmark = pytest.mark.distributed

WORKER = ROOT / "tests" / "engine" / "pipeline_worker.py"
HOW = [SHORT, CLIPPED, RECOMPUTED, "stages.*.batch.micro_batch=4"]
"""An accumulation of 4 on one replica."""


def train_drawn(world: int, pipeline: int, zero: int, **request: Any) -> list[dict[str, Any]]:
    """Every rank's report."""
    deepspeed = f"ds_configs/zero{zero}.json"
    request = {"heights": [32, 16, 16, 40], "overrides": HOW, **request}
    return run_ranks(WORKER, world, {"deepspeed": deepspeed, "pipeline": pipeline, **request})


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All three stages through a pipeline of two, with ZeRO-1."""
    folder = tmp_path_factory.mktemp("two_stages")
    return {"folder": folder, **layouts.train("pipeline x 2", folder, SHORT, HELD_OUT)[0]}


@pytest.mark.parametrize("stage", STAGES)
def test_two_pipeline_stages_follow_the_curve_of_one_rank(stage, one_rank, two_stages):
    assert_same_curve(two_stages[stage], one_rank[stage])
    assert_same_held_out(two_stages, one_rank, stage)
    assert min(one_rank[stage]["grad_norm"]) > CLIP  # so that every step was clipped
    assert two_stages[stage]["engine"] == "PipelineEngine"
    assert two_stages[stage]["engine_steps"] == STEPS


def test_what_no_loss_reaches_stays_as_it_was(two_stages):
    assert_idle_weights_stay(two_stages["folder"])


def test_each_rank_holds_and_saves_a_part_of_the_model(one_rank, two_stages):
    whole, ours = (CheckpointReader(newest(run["folder"] / "third")) for run in (one_rank, two_stages))
    assert ours.manifest.parameters == whole.manifest.parameters
    held = [set(file.extents) for file in ours.manifest.files]
    assert len(held) == 2
    assert all(held)
    assert not held[0] & held[1]
    assert held[0] | held[1] == set(whole.manifest.parameters)
    assert two_stages["third"]["whole"] < one_rank["third"]["whole"]


def test_averaged_weights_sample_alike_through_the_pipeline_and_in_one_process(two_stages):
    report = two_stages["third"]
    assert report["masters_restored"]
    noised, readout = probe_input()
    for weights, key in (("ema", "averaged"), ("raw", "trained")):
        module = load(str(newest(two_stages["folder"] / "third")), weights).module
        with torch.no_grad():
            expected = module(noised, readout)["image"].flatten()[:64]
        torch.testing.assert_close(torch.tensor(report[key]), expected, rtol=1e-4, atol=1e-5)
    assert report["averaged"] != report["trained"]


@pytest.mark.slow
def test_a_run_goes_on_from_a_pipeline_to_one_rank_and_back(one_rank, tmp_path):
    """Without ZeRO, a step each."""
    for steps, world in ((1, 2), (2, 1), (STEPS, 2)):
        (tmp_path / "first/DONE").unlink(missing_ok=True)
        overrides = [*HOW, f"stages.*.steps={steps}"]
        report = train(tmp_path, world, 0, overrides=overrides, **({"pipeline": 2} if world == 2 else {}))
        assert report.get("error") is None
    assert_same_curve(report, one_rank["first"])


def test_shapes_may_change_from_step_to_step_and_everything_is_predicted_on_all_ranks():
    hidden = {"overrides": [*HOW, "model.hidden_projections={image: 5}"]}
    (alone,) = train_drawn(1, 1, 0, **hidden)
    reports = train_drawn(2, 2, 0, **hidden)
    for report in reports:
        assert_same_numbers(report, alone, rel=1e-4)
    assert sorted(reports[0]["names"] + reports[1]["names"]) == sorted(alone["names"])
    assert "hidden_projections.image.up.weight" in reports[1]["names"]


def assert_same_numbers(report: dict[str, Any], reference: dict[str, Any], rel: float) -> None:
    """Of the steps and of the predictions, every kind of them."""
    assert report["loss"] == pytest.approx(reference["loss"], rel=rel)
    assert report["grad_norm"] == pytest.approx(reference["grad_norm"], rel=rel)
    for prediction, expected in zip(report["predictions"], reference["predictions"], strict=True):
        assert len(prediction) > 0
        assert prediction == pytest.approx(expected, rel=rel, abs=rel)


def test_bf16_has_fp32_masters_on_every_stage():
    how = {"overrides": [*HOW, "stages.*.precision=bf16"], "heights": [32, 32]}
    (alone,) = train_drawn(1, 1, 1, **how)
    for report in train_drawn(2, 2, 0, **how):
        assert report["optimizer"] == "DeepSpeedZeroOptimizer"
        assert report["dtype"] == "torch.bfloat16"
        assert report["masters"] == ["torch.float32"]
        assert report["applied"] == [True, True]
        assert report["loss"] == pytest.approx(alone["loss"], rel=0.02)
        assert report["grad_norm"] == pytest.approx(alone["grad_norm"], rel=0.02)
        assert report["predictions"][0] == pytest.approx(alone["predictions"][0], abs=0.05)


@pytest.mark.slow
def test_bf16_gradients_can_be_accumulated_in_fp32():
    overrides = [*HOW, "stages.*.precision=bf16"]
    options = {"data_types": {"grad_accum_dtype": "fp32"}}
    (alone,) = train_drawn(1, 1, 1, overrides=overrides)
    for report in train_drawn(2, 2, 1, overrides=overrides, options=options):
        assert report["optimizer"] == "BF16_Optimizer"
        assert report["masters"] == ["torch.float32"]
        assert report["grad_norm"] == pytest.approx(alone["grad_norm"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("pipeline", "zero", "micro_batch"), [(4, 0, 4), (4, 1, 2), (2, 0, 2)])
def test_four_ranks_follow_the_curve_of_one(pipeline, zero, micro_batch, one_rank, tmp_path):
    overrides = [SHORT, CLIPPED, RECOMPUTED, f"stages.*.batch.micro_batch={micro_batch}"]
    reports = train(tmp_path, 4, zero, stages=STAGES, overrides=overrides, pipeline=pipeline)["by_stage"]
    for stage in STAGES:
        assert_same_curve(reports[stage], one_rank[stage])


@pytest.mark.slow
@pytest.mark.parametrize(("world", "pipeline"), [(3, 3), (4, 2)])
def test_shapes_may_change_on_more_ranks(world, pipeline):
    (alone,) = train_drawn(1, 1, 0)
    for report in train_drawn(world, pipeline, 1):
        assert_same_numbers(report, alone, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1])
def test_a_last_stage_may_train_nothing(zero, tmp_path):
    overrides = [*HOW, "stages.third.freeze=[text, image]"]
    (alone,) = train_drawn(1, 1, 0, overrides=overrides)
    for report in train_drawn(3, 3, zero, overrides=overrides, checkpoints=str(tmp_path)):
        assert_same_numbers(report, alone, rel=1e-4)
    assert report["masters"] == []
    progress = CheckpointReader(CheckpointsFolder(tmp_path).newest()).manifest.progress
    assert progress["adam_steps"] == progress["optimizer_step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_tapped_tokens_cross_the_stages(world):
    alignment = "stages.third.alignment={modality: image, block: 0, features: 6, weight: 0.5}"
    overrides = [*HOW, "data.features={image: dino.npy}", alignment]
    (alone,) = train_drawn(1, 1, 0, overrides=overrides)
    for report in train_drawn(world, world, 0, overrides=overrides):
        assert_same_numbers(report, alone, rel=1e-4)
