"""YAML -> Run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megadiff.config.deepspeed import load_deepspeed, resolve_run
from megadiff.config.errors import ConfigError
from megadiff.config.load import dump_run, load_run, merge
from megadiff.config.schema import PowerEma, Run
from tests.minimal import minimal_run, tree, write_yaml

ROOT = Path(__file__).parents[2]


def load(folder: Path, *overrides: str, **changes: Any) -> Run:
    return load_run(write_yaml(folder / "run.yaml", tree(**changes)), overrides)


def fault(folder: Path, *overrides: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, *overrides, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


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


def test_a_stage_in_which_nothing_is_ever_scored_is_refused(tmp_path: Path) -> None:
    given = {"conditioning": {"clean": 0.6, "absent": 0.4}}
    stages = [{"name": "only", "modalities": {"text": {"loss_weight": 0.0}, "image": given}}]
    assert "every modality with a loss is a condition in all samples" in fault(tmp_path, stages=stages)
    assert load(tmp_path, stages=[{"name": "only", "modalities": {"image": given}}]).stages[0].modalities["text"].scored


def test_parts_that_disagree_are_said_at_once_with_numbers_and_a_way_out(tmp_path: Path) -> None:
    stages = [
        {"name": "first", "batch": {"global_samples": 20}, "initialise": {"source": "previous"}},
        {"name": "first", "freeze": ["joynt"]},
    ]
    message = fault(tmp_path, stages=stages)
    assert "batch.global_samples (20) must be a multiple of data.lanes (8); nearest: 16 or 24" in message
    assert "initialise.source is `previous`, but this is the first stage" in message
    assert "freeze names joynt; known parts: joint, text, image" in message
    assert "stage names must differ" in message


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
    run = load_run(run_path)
    for ranks in (1, 2, 8):
        for accelerator in (False, True):
            if run.data.lanes % ranks == 0 and all(
                s.batch.global_samples % (s.batch.micro_batch * ranks) == 0 for s in run.stages
            ):
                resolved = resolve_run(load_deepspeed(json_path), run, data_ranks=ranks, accelerator=accelerator)
                assert list(resolved) == [stage.name for stage in run.stages]


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


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("folder=s3://bucket/run", "must be a path on a file system"),
        ("stages.*.optimizer.betas=[0.9, 1.5]", "betas.1 is 1.5"),
        ("stages.*.optimizer.learning_rate=.inf", "learning_rate is inf"),
        ("data.fields.image={kind: caption, tokenizer: t.json}", "is caption, which cannot fill a grid space"),
        ("model.modalities.image.space.channels=4", "pixels, which fill 1 or 3 channels, and its grid has 4"),
    ],
)
def test_what_only_the_ranks_would_find_is_found_here(override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason.replace("(", "\\(")) as caught:
        load_run(ROOT / "configs/run/quickstart.yaml", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["base: 5", "stages: 5", "stages: [{name: a, base: [x.yaml]}]", "stage_defaults: 5"])
def test_a_key_of_another_form_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(path) in str(caught.value)


LATENTS = {"kind": "latents"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"stage_defaults__samples": {"every_steps": 5}},
            "stage first: samples shows image, which needs data.fields.image.autoencoder",
        ),
        ({"showcase": {}}, "showcase shows image, which needs data.fields.image.autoencoder"),
    ],
)
def test_latents_without_an_autoencoder_cannot_be_shown(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    content = tree(data__fields__image=LATENTS, **changes)
    with pytest.raises(ConfigError, match=sentence):
        load_run(write_yaml(tmp_path / "run.yaml", content))
    content["data"]["fields"]["image"] = {**LATENTS, "autoencoder": "vae"}
    load_run(write_yaml(tmp_path / "run.yaml", content))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model__modalities__image__process": {"kind": "gaussian", "schedule": "vp", "shift": 2.0}}, "shift belongs to"),
        ({"model__modalities__image__process": {"kind": "gaussian", "loss_weight": "min_snr"}}, "use logit_normal times"),
        ({"model__modalities__text__process": {"kind": "masked", "mask_class": True}}, "mask_class is part of the plain loss"),
        ({"model__modalities__text__process": {"kind": "gaussian"}}, "a tokens space takes a masked or uniform process"),
        ({"data__fields__image": {"kind": "number", "column": "a", "columns": "c.json"}}, "which fills a grid of 1 x 1 x 1"),
        ({"data__fields__text": {"kind": "class", "column": "a", "columns": "c.json"}}, "a token space of length 1"),
        ({"stage_defaults__alignment": {"modality": "sound", "block": 0, "features": 4}}, "alignment.modality is sound"),
        (
            {"stage_defaults__alignment": {"modality": "image", "block": 0, "features": 4}},
            "name their member under data.features",
        ),
        ({"stage_defaults__alignment": {"modality": "image", "block": 9, "features": 4}}, "the joint blocks are 0 to 1"),
        ({"stage_defaults__samples": {"every_steps": 5, "sampling": {"order": "threshold"}}}, "must make equal calls"),
        ({"stage_defaults__samples": {"every_steps": 5, "sampling": {"autoguidance": 2}}}, "needs a second network"),
        ({"showcase": {"sampling": {"remask": "cap", "order": "entropy"}}}, "remask goes with the ancestral order"),
        ({"showcase": {"sampling": {"order_noise": 1, "order": "threshold"}}}, "order_noise goes with the confidence"),
        ({"showcase": {"sampling": {"autoguidance": 2}}}, "needs a second network, which a showcase has not"),
        ({"model__modalities__text__process": {"kind": "masked", "padding": "pad_id"}}, "and the space has no pad_id"),
        ({"data__features": {"sound": "a.npy"}}, "data.features names sound; the model's modalities are text, image"),
        (
            {
                "model__modalities__text__process": {"kind": "uniform"},
                "stage_defaults__samples": {"every_steps": 5, "sampling": {"order": "entropy"}},
            },
            "stage first: samples: text has no mask state, which entropy needs; take ancestral or tau_leaping",
        ),
        (
            {"model__modalities__text__process": {"kind": "uniform"}, "showcase": {"sampling": {"remask": "cap"}}},
            "showcase: text has no mask state, which remask: cap needs",
        ),
        ({"model__modalities__text__space__start_id": 50}, r"start_id \(50\) must be below vocabulary"),
    ],
)
def test_options_of_processes_fields_and_samplers_that_do_not_fit(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_run(write_yaml(tmp_path / "run.yaml", tree(**changes)))


def test_the_run_file_in_a_runs_folder_is_of_that_folder_wherever_it_was_moved(tmp_path: Path) -> None:
    run = minimal_run(tmp_path)
    moved = tmp_path / "moved"
    (moved / "first").mkdir(parents=True)
    (moved / "run.yaml").write_text(dump_run(run))
    assert load_run(moved / "run.yaml") == run, "a file that happens to have the name"
    (moved / ".lock").touch()
    assert load_run(moved / "run.yaml").folder == str(moved)
    assert load_run(moved / "run.yaml", ["folder=runs/new"]).folder == "runs/new"
