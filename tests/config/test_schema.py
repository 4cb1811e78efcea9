"""Rules within a section."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megadiff.config.schema import RESERVED_NAMES
from tests.config.small import small
from tests.minimal import TREE, fault


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("folder=s3://bucket/run", "must be a path on a file system"),
        ("stages.*.optimizer.betas=[0.9, 1.5]", "betas.1 is 1.5"),
        ("stages.*.optimizer.learning_rate=.inf", "learning_rate is inf"),
    ],
)
def test_a_value_out_of_its_bounds_is_named(tmp_path: Path, override: str, reason: str) -> None:
    assert reason in fault(tmp_path, override)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model__modalities__image__process": {"kind": "gaussian", "schedule": "vp", "shift": 2.0}}, "shift belongs to"),
        ({"model__modalities__image__process": {"kind": "gaussian", "loss_weight": "min_snr"}}, "use logit_normal times"),
        ({"model__modalities__image__process": {"kind": "gaussian", "loss_weight": "velocity"}}, "belongs to target clean"),
        ({"model__modalities__text__process": {"kind": "masked", "mask_class": True}}, "mask_class is part of the plain loss"),
        ({"model__modalities__text__process": {"kind": "gaussian"}}, "a tokens space takes a masked or uniform process"),
        ({"model__modalities__text__process": {"kind": "masked", "padding": "pad_id"}}, "and the space has no pad_id"),
        ({"model__modalities__text__space__start_id": 50}, "start_id (50) must be below vocabulary"),
        ({"stage_defaults__samples": {"every_steps": 5, "sampling": {"order": "threshold"}}}, "must make equal calls"),
        (
            {"stage_defaults__samples": {"every_steps": 5, "sampling": {"autoguidance": 2}}},
            "a second network, which training has not",
        ),
        ({"showcase": {"sampling": {"autoguidance": 2}}}, "a second network, which a showcase has not"),
        ({"showcase": {"sampling": {"remask": "cap", "order": "entropy"}}}, "remask goes with the ancestral order"),
        ({"showcase": {"sampling": {"order_noise": 1, "order": "threshold"}}}, "order_noise goes with the confidence"),
    ],
)
def test_options_of_a_section_that_do_not_go_together(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    assert sentence in fault(tmp_path, **changes)


@pytest.mark.parametrize("name", ["joint", "alignment", "hidden_projections", "values", "children", "float"])
def test_a_name_that_no_module_or_part_can_have_is_refused(tmp_path: Path, name: str) -> None:
    assert name in RESERVED_NAMES
    modalities = {**TREE["model"]["modalities"], name: TREE["model"]["modalities"]["text"]}
    assert f"{name} cannot be the name of a modality; choose another" in fault(tmp_path, model__modalities=modalities)


def test_hidden_projections_are_of_the_models_modalities():
    with pytest.raises(ValueError, match="hidden_projections names sound; the modalities are text, image"):
        small(hidden_projections={"sound": 5})
