"""The released network's configuration, and ours."""

from __future__ import annotations

import pytest
import yaml

from megadiff.config.errors import UserError
from megadiff.config.schema import Model
from megadiff.weights.official_config import config_from_model, config_from_tensors, model_from_config
from tests.ranks import ROOT
from tests.weights.released import PAPER, PROJECTING, SMALL, UNEQUAL, released_state


def test_the_released_configuration_is_paper_yaml():
    tree = yaml.safe_load((ROOT / "configs/model/paper.yaml").read_text())["model"]
    assert model_from_config(PAPER) == Model.model_validate(tree)
    assert config_from_model(Model.model_validate(tree)) == PAPER


def test_a_configuration_may_stand_under_a_key_with_others_beside_it():
    assert model_from_config({"net": SMALL, "license": "mit", "extra": {"depth": 99}}) == model_from_config(SMALL)


def test_a_configuration_follows_from_the_shapes():
    for changes in ({}, {"text_depth": 0}, UNEQUAL, PROJECTING, {**PROJECTING, "text_depth": 0}):
        config = {**SMALL, **changes}
        assert model_from_config(config_from_tensors(released_state(config))) == model_from_config(config)


def test_a_model_and_its_released_configuration_say_the_same():
    model = model_from_config(SMALL)
    assert model_from_config(config_from_model(model)) == model
    assert config_from_model(model, ["image"])["text_depth"] == 0
    for changes in (UNEQUAL, PROJECTING):
        assert config_from_model(model_from_config({**SMALL, **changes})) == {**SMALL, **changes}
    assert config_from_model(model_from_config({**SMALL, "project_hidden": False})) == SMALL


def test_widths_may_stand_with_the_model_or_with_a_modality():
    model = model_from_config({**SMALL, **UNEQUAL})
    text, image = (model.modalities[name].model_copy(update={"width": model.width_of(name)}) for name in ("text", "image"))
    same = model.model_copy(update={"width": 99, "modalities": {"text": text, "image": image}})
    assert config_from_model(same)["dim_modalities"] == [12, 20]


def test_a_configuration_that_lacks_keys_is_refused():
    config = {key: value for key, value in PAPER.items() if key not in ("depth", "context_len")}
    with pytest.raises(UserError, match="lacks context_len, depth"):
        model_from_config(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim_modalities": [16, 32]}, r"dim_modalities is \[16, 32\] and dim_conds \[16, 16\]"),
        ({"dim_modalities": [16], "dim_conds": [16]}, "the released network has two widths"),
        ({"patch_size": 4}, r"patch \(4\) must divide"),
        ({"depth": "many"}, "makes no network"),
    ],
)
def test_a_configuration_of_no_network_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        model_from_config({**SMALL, **changes})
