"""Rules between sections: each is said by the run that breaks it, and by whoever is later given what it is about."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megadiff.config import checks
from megadiff.config.errors import ConfigError
from megadiff.config.schema import Run
from tests.minimal import fault, load

UNIFORM = {"model__modalities__text__process": {"kind": "uniform"}}


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


def test_a_stage_named_like_a_folder_of_the_run_is_refused(tmp_path: Path) -> None:
    """Its checkpoints would lie among TensorBoard's logs."""
    message = fault(tmp_path, stages=[{"name": "tensorboard"}])
    assert "a stage cannot be named tensorboard: the run's folder keeps a tensorboard of its own" in message
    load(tmp_path, stages=[{"name": "tensorboard_two"}])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"data__fields__sound": {"kind": "pixels"}},
            "data.fields (text, image, sound) must name the model's modalities (text, image)",
        ),
        (
            {"data__fields__image": {"kind": "caption", "tokenizer": "t.json"}},
            "data.fields.image is caption, which cannot fill a grid space",
        ),
        ({"data__fields__text": {"kind": "pixels"}}, "data.fields.text is pixels, which cannot fill a tokens space"),
        (
            {"model__modalities__image__space__channels": 4},
            "data.fields.image is pixels, which fill 1 or 3 channels, and its grid has 4",
        ),
        (
            {"data__fields__image": {"kind": "number", "column": "a", "columns": "c.json"}},
            "is a number, which fills a grid of 1 x 1 x 1",
        ),
        (
            {"data__fields__text": {"kind": "class", "column": "a", "columns": "c.json"}},
            "is a class, which fills a token space of length 1",
        ),
        ({"data__features": {"sound": "a.npy"}}, "data.features names sound; the model's modalities are text, image"),
        ({"stage_defaults__mixture": {"web": 1}}, "stage first: mixture names web; data.train has train"),
        (
            {"stage_defaults__mixture": {"train": 0}},
            "stage first: every weight of the mixture is 0; give one source at least a share",
        ),
        (
            {"stage_defaults__held_out_loss": {"every_steps": 5}},
            "held_out_loss needs data.held_out, the manifest of shards that are never trained on",
        ),
        (
            {"stage_defaults__held_out_loss": {"every_steps": 5, "times": [0.1, 0.5, 0.1004]}},
            "times must differ by 0.001 or more: 0.100, 0.500, 0.100",
        ),
        (
            {"stage_defaults__batch__global_samples": 4},
            "batch.global_samples (4) must be a multiple of data.lanes (8); nearest: 8",
        ),
        (
            {"stage_defaults__alignment": {"modality": "sound", "block": 0, "features": 4}},
            "alignment.modality is sound; the model has text, image",
        ),
        (
            {"stage_defaults__alignment": {"modality": "image", "block": 0, "features": 4}},
            "name their member under data.features.image",
        ),
        (
            {"stage_defaults__alignment": {"modality": "image", "block": 9, "features": 4}},
            "alignment.block is 9; the joint blocks are 0 to 1",
        ),
        ({"stage_defaults__modalities__text": {"times": {"kind": "logit_normal"}}}, "text: logit-normal times are for grids"),
        (
            {"stage_defaults__modalities__image": {"predicted": False}},
            "stage first: no modality is predicted with a loss weight above 0",
        ),
        ({"stage_defaults__freeze": ["joint", "image"]}, "image: joint and image are frozen, so its loss trains nothing"),
    ],
)
def test_sections_that_do_not_fit_each_other(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    assert sentence in fault(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "section"),
    [({"stage_defaults__samples": {"every_steps": 5}}, "stage first: samples: "), ({"showcase": {}}, "run.yaml: showcase: ")],
)
def test_latents_without_an_autoencoder_cannot_be_shown(tmp_path: Path, changes: dict[str, Any], section: str) -> None:
    sentence = f"{section}data.fields.image.autoencoder is not set, and it takes an autoencoder to read or show pictures"
    assert sentence in fault(tmp_path, **changes, data__fields__image={"kind": "latents"})
    load(tmp_path, **changes, data__fields__image={"kind": "latents", "autoencoder": "vae"})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"stage_defaults__samples": {"every_steps": 5, "sampling": {"order": "entropy"}}},
            "stage first: samples: text has no mask state, which entropy needs; take ancestral or tau_leaping",
        ),
        ({"showcase": {"sampling": {"remask": "cap"}}}, "showcase: text has no mask state, which remask: cap needs"),
    ],
)
def test_an_order_that_needs_masks_is_refused_where_there_are_none(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    assert sentence in fault(tmp_path, **changes, **UNIFORM)
    load(tmp_path, **changes)


def test_a_run_that_is_built_without_a_file_gets_the_same_rules(tmp_path: Path) -> None:
    content = load(tmp_path).model_dump()
    content["data"]["lanes"] = 7
    with pytest.raises(ValueError, match=r"stage second: batch.global_samples \(16\) must be a multiple of data.lanes \(7\)"):
        Run.model_validate(content)


def test_required_rules_say_all_faults_in_one_error() -> None:
    checks.require([])
    with pytest.raises(
        ConfigError,
        match=r"^data.lanes \(8\) must .*; nearest: 6 or 9; batch.global_samples \(20\) must .*; nearest: 18 or 27$",
    ):
        checks.require([*checks.lanes_over_ranks(8, 3), *checks.batch_over_ranks(20, 3, 3)])


@pytest.mark.parametrize("first", ["megadiff.config.checks", "megadiff.config.schema", "megadiff.config.schema.run"])
def test_rules_and_schema_can_be_imported_in_any_order_without_torch(first: str) -> None:
    code = f"import sys, {first}, megadiff.config.checks, megadiff.config.schema; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
