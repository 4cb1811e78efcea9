"""YAML -> Run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megadiff.config.deepspeed import load_deepspeed, resolve_run
from megadiff.config.errors import ConfigError
from megadiff.config.layouts import sizes
from megadiff.config.load import dump_run, load_run, merge
from megadiff.config.schema import PowerEma
from megadiff.config.tensor import refusals
from tests.minimal import fault, load, minimal_run, tree, write_yaml

ROOT = Path(__file__).parents[2]


def test_stage_defaults_lie_under_every_stage(tmp_path: Path) -> None:
    first, second = load(tmp_path).stages
    assert (first.steps, second.steps) == (4, 4)
    assert not first.modalities["text"].predicted
    assert second.modalities["text"].predicted


def test_a_dumped_run_is_read_back_equal(tmp_path: Path) -> None:
    run = minimal_run(tmp_path, stage_defaults__ema={"main": {"kind": "constant"}, "long": {"kind": "power", "length": 0.1}})
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_run(run), encoding="utf-8")
    assert load_run(path) == run


def test_a_later_base_wins_over_an_earlier_and_the_file_over_both(tmp_path: Path) -> None:
    write_yaml(tmp_path / "bases/one.yaml", {**tree(), "seed": 1, "name": "one", "folder": "one"})
    write_yaml(tmp_path / "bases/two.yaml", {"seed": 2, "name": "two"})
    path = write_yaml(tmp_path / "run.yaml", {"base": ["bases/one.yaml", "bases/two.yaml"], "seed": 3})
    run = load_run(path)
    assert (run.folder, run.name, run.seed) == ("one", "two", 3)


def test_a_base_may_have_a_base_relative_to_itself(tmp_path: Path) -> None:
    write_yaml(tmp_path / "a/deep/root.yaml", tree())
    write_yaml(tmp_path / "a/middle.yaml", {"base": "deep/root.yaml", "seed": 5})
    assert load_run(write_yaml(tmp_path / "run.yaml", {"base": "a/middle.yaml"})).seed == 5


def test_a_stage_may_have_a_base_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    write_yaml(tmp_path / "stage/slow.yaml", {"base": "slower.yaml", "name": "slow"})
    write_yaml(tmp_path / "stage/slower.yaml", {"steps": 77, "log_every_steps": 7})
    path = write_yaml(tmp_path / "runs/run.yaml", tree(stages=[{"base": "../stage/slow.yaml", "log_every_steps": 9}]))
    (stage,) = load_run(path).stages
    assert (stage.name, stage.steps, stage.log_every_steps) == ("slow", 77, 9)


@pytest.mark.parametrize("files", [{"a.yaml": "a.yaml"}, {"a.yaml": "b.yaml", "b.yaml": "a.yaml"}])
def test_a_base_chain_that_returns_to_itself_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    for name, base in files.items():
        write_yaml(tmp_path / name, {"base": base})
    with pytest.raises(ConfigError, match="comes back to itself"):
        load_run(tmp_path / "a.yaml")


def test_a_section_whose_kind_changes_is_replaced_not_merged(tmp_path: Path) -> None:
    stages = [{"name": "only", "ema": {"main": {"kind": "power", "length": 0.1}}}]
    (stage,) = load(tmp_path, stages=stages).stages
    assert stage.ema == {"main": PowerEma(length=0.1)}
    assert merge({"x": {"kind": "a", "old": 1}}, {"x": {"kind": "b"}}) == {"x": {"kind": "b"}}
    assert merge({"x": {"kind": "a", "old": 1}}, {"x": {"kind": "a", "new": 2}}) == {"x": {"kind": "a", "old": 1, "new": 2}}


def test_an_override_reaches_one_stage_by_name_or_all_at_once(tmp_path: Path) -> None:
    run = load(tmp_path, "stages.*.steps=10", "stages.second.steps=20", "stages.first.optimizer.betas=[0.8, 0.9]", "seed=7")
    assert [stage.steps for stage in run.stages] == [10, 20]
    assert run.stages[0].optimizer.betas == (0.8, 0.9)
    assert run.seed == 7


def test_an_override_of_a_section_is_merged_into_it(tmp_path: Path) -> None:
    run = load(tmp_path, "stages.first.batch={global_samples: 32}")
    assert (run.stages[0].batch.global_samples, run.stages[0].batch.micro_batch) == (32, 4)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "must look like a.b=value"),
        ("=3", "must look like a.b=value"),
        ("stages.third.steps=3", "no stage is called third; stages: first, second"),
        ("seed=[1", "is not a YAML value"),
        ("stages.first.stepps=3", "unknown key stages.0.stepps; did you mean steps?"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, said: str) -> None:
    assert said in fault(tmp_path, override)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sead": 3}, "unknown key sead; did you mean seed?"),
        ({"model__widht": 3}, "unknown key model.widht; did you mean width?"),
        ({"data__cache": {"foldr": "x"}}, "did you mean folder?"),
        ({"launch__qqqqq": 1}, "known here: processes, threads_per_process"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in fault(tmp_path, **changes)


def test_an_unknown_key_inside_a_kind_of_section_is_named(tmp_path: Path) -> None:
    stages = [{"name": "only", "modalities": {"image": {"times": {"kind": "logit_normal", "locatoin": 1.0}}}}]
    assert "did you mean location?" in fault(tmp_path, stages=stages)


def test_all_faults_are_said_at_once(tmp_path: Path) -> None:
    message = fault(tmp_path, sead=3, model__width=-1, data__lanes="many")
    assert all(part in message for part in ("sead", "model.width is -1", "data.lanes is 'many'"))


def test_a_missing_file_a_broken_one_and_one_that_is_no_mapping_are_said_plainly(tmp_path: Path) -> None:
    for content, said in (
        (None, "does not exist"),
        ("a: [1\nb: 2", "line 2 is not valid YAML"),
        ("- 1", "must hold a mapping"),
    ):
        path = tmp_path / "run.yaml"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match=said):
            load_run(path)


RUNS = sorted((ROOT / "configs/run").glob("*.yaml"))
JSONS = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("json_path", JSONS, ids=lambda path: path.stem)
@pytest.mark.parametrize("run_path", RUNS, ids=lambda path: path.stem)
def test_every_run_that_ships_goes_with_every_deepspeed_json(run_path: Path, json_path: Path) -> None:
    run, tree, checked = load_run(run_path), load_deepspeed(json_path), 0
    pipeline, tensor = sizes(tree)
    if refusals(run.model, tensor):
        with pytest.raises(ConfigError, match="numbers of ranks that fit the model: 1"):
            resolve_run(tree, run, ranks=pipeline * tensor, accelerator=False)
        return
    for ranks in (1, 2, 4, 8, 64):
        data_ranks = ranks // (pipeline * tensor)
        if ranks % (pipeline * tensor) or run.data.lanes % data_ranks:
            continue
        if any(stage.batch.global_samples % (stage.batch.micro_batch * data_ranks) for stage in run.stages):
            continue
        for accelerator in (False, True):
            resolved = resolve_run(tree, run, ranks=ranks, accelerator=accelerator)
            assert list(resolved) == [stage.name for stage in run.stages]
            checked += 1
    assert checked


def test_there_are_runs_and_jsons_to_check() -> None:
    assert {path.stem for path in RUNS} >= {"quickstart"}
    assert {path.stem for path in JSONS} >= {"zero0", "zero1", "zero2", "zero3", "zero3_offload"}


def test_the_image_frozen_variant_of_stage_2_trains_the_text_tower_alone(tmp_path: Path) -> None:
    stages = [{"name": "first", "modalities": {"text": {"predicted": False}}}, {"base": "2_text_tower_image_frozen.yaml"}]
    (ROOT / "configs/stage/2_text_tower.yaml").stat()
    path = write_yaml(
        tmp_path / "run.yaml", tree(stages=[stages[0], {"base": str(ROOT / "configs/stage" / stages[1]["base"])}])
    )
    stage = load_run(path).stages[1]
    assert stage.freeze == ("joint", "image")
    assert stage.modalities["image"].loss_weight == 0
    assert stage.modalities["text"].loss_weight > 0
    assert stage.initialise.new == ("text",)


@pytest.mark.parametrize("text", ["base: 5", "stages: 5", "stages: [{name: a, base: [x.yaml]}]", "stage_defaults: 5"])
def test_a_key_of_another_form_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(path) in str(caught.value)


def test_the_run_file_in_a_runs_folder_is_of_that_folder_wherever_it_was_moved(tmp_path: Path) -> None:
    run = minimal_run(tmp_path)
    moved = tmp_path / "moved"
    (moved / "first").mkdir(parents=True)
    (moved / "run.yaml").write_text(dump_run(run))
    assert load_run(moved / "run.yaml") == run, "a file that happens to have the name"
    (moved / ".lock").touch()
    assert load_run(moved / "run.yaml").folder == str(moved)
    assert load_run(moved / "run.yaml", ["folder=runs/new"]).folder == "runs/new"


def test_an_override_reaches_no_other_section_that_was_written_once_for_several(tmp_path: Path) -> None:
    run = load(tmp_path, "stages.first.checkpoint.keep=9", stage_defaults__checkpoint={"every_steps": 5})
    assert [stage.checkpoint.keep for stage in run.stages] == [9, 3]
    rule = {"kind": "constant", "decay": 0.9}
    run = load(tmp_path, "stages.first.ema.a.decay=0.5", stage_defaults__ema={"a": rule, "b": rule})
    assert any("&id" in path.read_text() for path in tmp_path.iterdir())  # the file has the rule once, under an anchor
    assert [[profile.model_dump()["decay"] for profile in stage.ema.values()] for stage in run.stages] == [
        [0.5, 0.9],
        [0.9, 0.9],
    ]
