"""DeepSpeed's JSON against the stage."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megadiff.config.deepspeed import (
    BUCKET_MULTIPLE,
    KNOWN,
    KNOWN_ZERO,
    OWNED,
    REFUSED,
    REFUSED_ZERO,
    load_deepspeed,
    resolve,
    resolve_run,
    zero_stage,
)
from megadiff.config.errors import ConfigError
from megadiff.config.schema import Stage
from tests.minimal import ZERO3, minimal_run


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return minimal_run(tmp_path).stages[0]


def with_key(address: str, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(ZERO3)
    *blocks, key = address.split(".")
    node = tree
    for block in blocks:
        node = node.setdefault(block, {})
    node[key] = value
    return tree


def fault(tree: dict[str, Any], stage: Stage, *, data_ranks: int = 2, accelerator: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(tree, stage, data_ranks=data_ranks, accelerator=accelerator)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tree", [ZERO3, {"zero_optimization": {"stage": 3}}], ids=["auto", "left out"])
def test_what_the_json_leaves_open_comes_from_the_stage(stage: Stage, tree: dict[str, Any]) -> None:
    before = copy.deepcopy(tree)
    resolved = resolve(tree, stage, data_ranks=2, accelerator=False)
    assert resolved["train_batch_size"] == 16
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["gradient_clipping"] == stage.optimizer.gradient_clip
    assert resolved["bf16"] == {"enabled": False}
    assert tree == before


@pytest.mark.parametrize(
    ("precision", "accelerator", "bf16"),
    [("auto", True, True), ("auto", False, False), ("bf16", False, True), ("fp32", True, False)],
)
def test_auto_precision_is_bf16_on_an_accelerator_and_fp32_on_a_cpu(
    stage: Stage, precision: str, accelerator: bool, bf16: bool
) -> None:
    stage = stage.model_copy(update={"precision": precision})
    assert resolve(ZERO3, stage, data_ranks=2, accelerator=accelerator)["bf16"]["enabled"] is bf16


@pytest.mark.parametrize(
    ("address", "value", "owner"),
    [
        ("train_batch_size", 32, "stages.first.batch.global_samples"),
        ("train_micro_batch_size_per_gpu", 8, "stages.first.batch.micro_batch"),
        ("gradient_accumulation_steps", 1, "stages.first.batch"),
        ("gradient_clipping", 0.5, "stages.first.optimizer.gradient_clip"),
        ("bf16.enabled", True, "stages.first.precision"),
    ],
)
def test_a_number_with_two_owners_that_disagree_stops_the_run(stage: Stage, address: str, value: Any, owner: str) -> None:
    message = fault(with_key(address, value), stage)
    assert message.startswith(f"{address} is {json.dumps(value)} in the DeepSpeed JSON and ")
    assert owner in message


def test_all_disagreements_are_said_at_once(stage: Stage) -> None:
    message = fault({**ZERO3, "train_batch_size": 1, "gradient_clipping": 9}, stage)
    assert "train_batch_size" in message
    assert "gradient_clipping" in message


def test_a_number_that_agrees_may_stand_in_both_places(stage: Stage) -> None:
    assert resolve({**ZERO3, "train_batch_size": 16}, stage, data_ranks=2, accelerator=False)["train_batch_size"] == 16


def test_true_and_one_are_not_the_same(stage: Stage) -> None:
    assert "gradient_clipping is true" in fault({**ZERO3, "gradient_clipping": True}, stage)


@pytest.mark.parametrize("block", REFUSED)
def test_a_block_that_must_not_stand_there_is_refused_with_the_reason(stage: Stage, block: str) -> None:
    assert f"{block}: {REFUSED[block]}" in fault({**ZERO3, block: {}}, stage)


@pytest.mark.parametrize("key", REFUSED_ZERO)
def test_a_removed_zero_key_is_refused(stage: Stage, key: str) -> None:
    assert f"zero_optimization.{key}: " in fault(with_key(f"zero_optimization.{key}", 2), stage)


@pytest.mark.parametrize("address", ["bf16.check_grad_overflow", "zero_optimization.compute_grad_norm"])
def test_steps_that_are_not_finite_must_be_recognised(stage: Stage, address: str) -> None:
    assert f"{address} must be true" in fault(with_key(address, False), stage)
    assert resolve(with_key(address, True), stage, data_ranks=2, accelerator=False)


def test_fp16_is_refused_unless_it_is_off(stage: Stage) -> None:
    for enabled in (True, "auto"):
        assert "bf16 or fp32" in fault(with_key("fp16.enabled", enabled), stage)
    assert resolve(with_key("fp16.enabled", False), stage, data_ranks=2, accelerator=False)


@pytest.mark.parametrize(
    ("address", "value", "said"),
    [
        ("zero_optimisation", {}, "unknown key zero_optimisation; did you mean zero_optimization?"),
        ("zero_optimization.stages", 3, "unknown key zero_optimization.stages; did you mean zero_optimization.stage?"),
        ("zero_optimization.stage", 4, "zero_optimization.stage is 4; it must be 0, 1, 2 or 3"),
        ("zero_optimization.stage", True, "must be"),
        ("zero_optimization.overlap_comm", "yes", 'zero_optimization.overlap_comm is "yes"; it must be true or false'),
        ("zero_optimization.reduce_bucket_size", "big", "must be a number"),
        ("data_types.grad_accum_dtype", "bf16", 'data_types.grad_accum_dtype is "bf16"; it must be fp32, or be left out'),
        ("data_types", "fp32", 'data_types must be a block {...}, not "fp32"'),
        ("zero_optimization.offload_optimizer", "cpu", "must be a block {...}"),
        ("zero_optimization.reduce_bucket_size", "auto", 'zero_optimization.reduce_bucket_size is "auto", which only'),
        ("bf16", True, "bf16 must be a block {...}, not true"),
        ("gradient_allreduce_op", "sum", "gradient_allreduce_op must be mean"),
    ],
)
def test_a_wrong_key_or_value_is_named(stage: Stage, address: str, value: Any, said: str) -> None:
    assert said in fault(with_key(address, value), stage)


def test_offload_needs_a_zero_stage_that_shards_what_is_offloaded(stage: Stage) -> None:
    assert "needs stage 3, not 2" in fault({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, stage)
    assert "needs stage 1, 2 or 3" in fault({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, stage)


def test_offload_does_not_ask_for_deepspeeds_own_optimizer(stage: Stage) -> None:
    tree = with_key("zero_optimization.offload_optimizer", {"device": "cpu"})
    assert resolve(tree, stage, data_ranks=2, accelerator=True)["zero_force_ds_cpu_optimizer"] is False
    assert "must be false" in fault({**tree, "zero_force_ds_cpu_optimizer": True}, stage)


def test_a_batch_or_lanes_that_do_not_divide_are_said_once_for_all_stages(tmp_path: Path) -> None:
    run = minimal_run(tmp_path)
    with pytest.raises(ConfigError) as caught:
        resolve_run(ZERO3, run, ranks=3, accelerator=False)
    assert str(caught.value).count("data.lanes (8)") == 1
    assert "stage first: batch.global_samples (16)" in str(caught.value)
    assert "stage second: batch.global_samples (16)" in str(caught.value)


def test_zero_stage_is_read_and_defaults_to_0() -> None:
    assert zero_stage(ZERO3) == 3
    assert zero_stage({}) == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        ('{\n  "a": 1,\n}', "line 3, column 1 is not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"bf16": {}, "bf16": {}}', "the key bf16 stands twice"),
        ('{"optimizer": {}}', "the stage YAML owns the optimizer"),
    ],
)
def test_a_file_that_cannot_be_used_is_said_in_one_sentence(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_deepspeed(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)


def test_the_known_zero_keys_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    theirs = set(fields) | {field.alias for field in fields.values() if field.alias}
    ours = {*KNOWN_ZERO, *REFUSED_ZERO}
    removed = {"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"}
    assert ours - removed == theirs
    assert {key for key, kind in KNOWN_ZERO.items() if kind == "flag"} == {
        key for key in KNOWN_ZERO if "bool" in str(annotation_of(fields, key))
    }


def annotation_of(fields: dict[str, Any], key: str) -> Any:
    return next(field.annotation for name, field in fields.items() if key in (name, field.alias))


def test_owned_and_refused_keys_are_apart() -> None:
    assert not set(KNOWN) & set(REFUSED)
    assert {key.split(".")[0] for key in OWNED} <= set(KNOWN)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_itself_accepts_every_json_that_ships(path: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    config = DeepSpeedConfig(resolve(load_deepspeed(path), stage, data_ranks=1, accelerator=False))
    named = re.search(r"zero(\d)", path.stem)
    assert config.zero_optimization_stage == (int(named[1]) if named else 1)
    assert config.gradient_accumulation_steps == 4


def test_buckets_are_no_larger_than_the_gradients(tmp_path: Path) -> None:
    run = minimal_run(tmp_path)
    tree = with_key("zero_optimization.allgather_bucket_size", 100)
    zero = resolve_run(tree, run, ranks=2, accelerator=False)["first"]["zero_optimization"]
    assert zero["allgather_bucket_size"] == 100
    assert 0 < zero["reduce_bucket_size"] < 1_000_000, "DeepSpeed's default is 500,000,000"
    assert zero["reduce_bucket_size"] % BUCKET_MULTIPLE == 0, "ZeRO-1 and 2 refuse odd ones, and some models have odd numbers"
    assert "reduce_bucket_size" not in tree["zero_optimization"]
