"""Tensor parallelism over real processes: the curve, the weights and the samples of one rank."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megadiff.config.deepspeed import load_deepspeed
from megadiff.config.errors import ConfigError
from megadiff.config.load import load_run
from megadiff.distributed.ranks import Ranks
from megadiff.engine.build import build_engine
from megadiff.models.mmdit import build_model
from megadiff.models.tensor_plan import splits
from megadiff.weights.loading import load
from tests.engine import layouts
from tests.engine.layouts import (
    CLIPPED,
    HELD_OUT,
    PARTITION_ALL,
    RECOMPUTED,
    SHORT,
    STAGES,
    STEPS,
    WORKER,
    assert_idle_weights_stay,
    assert_same_curve,
    assert_same_held_out,
    newest,
)
from tests.engine.worker import text_readouts
from tests.ranks import ROOT, run_ranks

pytestmark = pytest.mark.distributed


def train(folder: Path, world: int, zero: int, *overrides: str, **request: Any) -> list[dict[str, Any]]:
    """By rank, the reports of its stages."""
    request = {"stages": list(STAGES), "overrides": [SHORT, CLIPPED, RECOMPUTED, *overrides], **request}
    reports = run_ranks(WORKER, world, {"folder": str(folder), "deepspeed": f"ds_configs/zero{zero}.json", **request})
    assert all("error" not in report for report in reports)
    return [report["by_stage"] for report in reports]


@pytest.fixture(scope="module")
def tensor_zero1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tensor_zero1")
    return {"folder": folder, "ranks": layouts.train("tensor x 2", folder, SHORT, HELD_OUT)}


@pytest.fixture(scope="module")
def tensor_zero3(one_rank: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last stage alone."""
    folder = tmp_path_factory.mktemp("tensor_zero3")
    shutil.copytree(one_rank["folder"] / "second", folder / "second")
    return {"folder": folder, "ranks": train(folder, 2, 3, HELD_OUT, tensor=2, stages=["third"])}


@pytest.mark.parametrize(("run", "stage"), [*(("tensor_zero1", stage) for stage in STAGES), ("tensor_zero3", "third")])
def test_two_tensor_ranks_follow_the_curve_of_one_rank(
    run: str, stage: str, one_rank: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    for report in request.getfixturevalue(run)["ranks"]:
        assert_same_curve(report[stage], one_rank[stage])
        assert_same_held_out(report, one_rank, stage)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "zero"), [(2, 0), (2, 2), (2, 3), (4, 1), (4, 3)])
def test_other_zero_stages_with_two_tensor_ranks_follow_the_curve_of_one_rank(
    world: int, zero: int, one_rank: dict[str, Any], tmp_path: Path
) -> None:
    options = PARTITION_ALL if zero == 3 else {}
    for report in train(tmp_path, world, zero, tensor=2, zero_options=options):
        for stage in STAGES:
            assert_same_curve(report[stage], one_rank[stage])
    assert_idle_weights_stay(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "process",
    ["{kind: masked, loss: plain, mask_class: true}", "{kind: uniform, loss: nelbo}"],
    ids=["the mask state's class", "all logits"],
)
def test_other_layers_follow_the_curve_of_one_rank_as_well(process: str, tmp_path: Path) -> None:
    """GELU, biases in attention, no gains, learned positions, and losses that read the head in other ways."""
    overrides = [
        "model.mlp=gelu",
        "model.attention_bias=true",
        "model.qk_norm=false",
        "model.modalities.text.positions=learned",
        f"model.modalities.text.process={process}",
    ]
    reference = train(tmp_path / "one", 1, 0, *overrides, stages=["first", "second"])[0]
    for report in train(tmp_path / "two", 2, 1, *overrides, stages=["first", "second"], tensor=2):
        assert_same_curve(report["first"], reference["first"])
        assert_same_curve(report["second"], reference["second"])


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_in_bf16_the_curve_is_that_of_one_rank_but_for_rounding(zero: int, tmp_path: Path) -> None:
    reference = train(tmp_path / "one", 1, 1, "stages.*.precision=bf16", stages=["first"])[0]
    for report in train(tmp_path / "two", 2, zero, "stages.*.precision=bf16", stages=["first"], tensor=2):
        for curve in ("loss", "grad_norm"):
            assert report["first"][curve] == pytest.approx(reference["first"][curve], rel=5e-3)


@pytest.mark.slow
def test_tensor_ranks_that_score_no_token_run_the_same_backward(tmp_path: Path) -> None:
    nothing_scored = [
        "stages.first.modalities.text.predicted=true",
        "stages.first.modalities.text.conditioning={clean: 1.0, absent: 0.0}",
        "stages.first.modalities.image.conditioning={clean: 0.0, absent: 0.0}",
    ]
    for report in train(tmp_path, 2, 3, *nothing_scored, stages=["first"], tensor=2):
        assert report["first"]["text_losses"] == [None] * STEPS
        assert all(loss > 0 for loss in report["first"]["loss"])


def test_layers_are_megatrons_and_hold_this_ranks_part(tensor_zero1: dict[str, Any], tensor_zero3: dict[str, Any]) -> None:
    run = load_run(ROOT / "tests/tiny.yaml")
    model = build_model(run.model, list(run.model.modalities))
    part = "joint.0.parts.text"
    for report in (tensor_zero1["ranks"][1]["third"], tensor_zero3["ranks"][1]["third"]):
        whole = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        expected = whole | {name: split.local for name, split in splits(model, 2, 1).items()}
        assert {name: tuple(shape) for name, shape in report["local_shapes"].items()} == expected
        assert report["megatron"]["embed.states.text"] == "VocabParallelEmbedding"
        assert report["megatron"][f"{part}.projection.linear"] == "ColumnParallelLinear"
        assert report["megatron"][f"{part}.output"] == "RowParallelLinear"
        assert report["megatron"][f"{part}.mlp.up"] == "ColumnParallelLinear"
        assert report["megatron"][f"{part}.mlp.down"] == "RowParallelLinear"
        assert report["megatron"][f"{part}.modulation"] == "RowParallelLinear"


def test_replicated_parameters_stay_equal_to_the_bit(tensor_zero1: dict[str, Any]) -> None:
    run = load_run(ROOT / "tests/tiny.yaml")
    split = splits(build_model(run.model, list(run.model.modalities)), 2, 0)
    first, second = (report["third"]["digests"] for report in tensor_zero1["ranks"])
    replicated = [name for name in first if name not in split]
    assert "joint.0.parts.text.modulation.bias" in replicated
    assert [first[name] for name in replicated] == [second[name] for name in replicated]


def test_idle_parts_of_split_parameters_are_neither_stepped_nor_decayed(tensor_zero1: dict[str, Any]) -> None:
    assert_idle_weights_stay(tensor_zero1["folder"])


@pytest.mark.parametrize("run", ["tensor_zero1", "tensor_zero3"])
def test_both_ranks_draw_the_tokens_that_one_process_draws(run: str, request: pytest.FixtureRequest) -> None:
    trained = request.getfixturevalue(run)
    with torch.no_grad():
        expected = text_readouts(load(str(newest(trained["folder"] / "third")), "raw").module)
    for report in trained["ranks"]:
        assert report["third"]["masters_restored"]
        assert report["third"]["ids"] == expected["ids"]
        for key in ("logs", "logits"):
            torch.testing.assert_close(torch.tensor(report["third"][key]), torch.tensor(expected[key]), rtol=1e-4, atol=1e-5)


def test_a_model_that_does_not_divide_is_refused_before_ranks_meet() -> None:
    run = load_run(ROOT / "tests/tiny.yaml", ["model.heads=3"])
    tree = load_deepspeed("ds_configs/tensor_zero1.json")
    with pytest.raises(ConfigError, match=r"model.heads \(3\) must be a multiple of the tensor-parallel ranks \(2\)"):
        build_engine(run.model, run.stage("first"), tree, seed=0, ranks=Ranks(0, 2, 0))
