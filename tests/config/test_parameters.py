"""Parameters: as many as the built model holds."""

from __future__ import annotations

import pytest
import torch

from megadiff.config import parameters
from megadiff.models.mmdit import build_model
from megadiff.models.names import part_of
from tests.config.small import MODELS, small, stage


def test_the_paper_model_has_578_33_million_parameters():
    total = parameters.model_parameters(MODELS["paper"], ["text", "image"]).total
    assert f"{total / 1e6:.2f}" == "578.33"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("predicted", [("text", "image"), ("image",), ()])
def test_parameters_equal_those_of_the_built_model(name, predicted):
    with torch.device("meta"):
        model = build_model(MODELS[name], predicted)
    built: dict[str, int] = {}
    for key, parameter in model.named_parameters():
        assert parameter.is_meta
        kind, owner = key.split(".")[0], key.split(".")[1]
        entry = {"embed": f"embed.{key.split('.')[2]}", "joint": "joint", "trunk_norm": "joint"}.get(kind, f"{kind}.{owner}")
        built[entry] = built.get(entry, 0) + parameter.numel()
    counted = parameters.model_parameters(MODELS[name], predicted)
    flat = {f"embed.{key}": count for key, count in counted.embeddings.items()}
    flat |= {"joint": counted.joint}
    flat |= {f"towers.{key}": count for key, count in counted.towers.items()}
    flat |= {f"heads.{key}": count for key, count in counted.heads.items()}
    assert built == {key: count for key, count in flat.items() if count}
    parts = {part: sum(p.numel() for k, p in model.named_parameters() if part_of(k) == part) for part in counted.parts}
    assert parts == counted.parts
    assert counted.total == sum(built.values())


def test_trainable_leaves_out_frozen_parts_and_parts_that_do_not_exist():
    model = MODELS["rope and swiglu"]
    parts = parameters.model_parameters(model, ["text", "image"]).parts
    assert parameters.trainable(model, stage()) == sum(parts.values())
    assert parameters.trainable(model, stage(freeze=["joint", "image"])) == parts["text"]
    image_only = stage(modalities={"text": {"predicted": False}, "image": {}}, freeze=["text"])
    idle = sum(count.total for count in parameters.idle(model, image_only).values())
    assert parameters.trainable(model, image_only) == parts["joint"] + parts["image"] - idle


def test_in_the_papers_first_stage_as_much_is_idle_as_the_paper_freezes():
    """The text half of the last joint block: output, MLP, its modulation and both gates, the norm; here also the queries."""
    image_only = stage(modalities={"text": {"predicted": False}, "image": {}})
    output, mlp, norm, gates = 512 * 1024, 2 * 4 * 1024**2 + 5 * 1024, 2 * 1024 * 1025, 2 * 1024 * 1025
    (idle,) = parameters.idle(MODELS["paper"], image_only).values()
    assert idle.total == output + mlp + norm + gates + 1024 + (512 * 1024 + 512)
    assert parameters.idle(MODELS["paper"], stage(freeze=["joint"])) == parameters.idle(MODELS["paper"], stage()) == {}


@pytest.mark.parametrize("predicted", [("text", "image"), ("image",)])
def test_hidden_projections_are_counted_and_never_trained(predicted):
    model = small(hidden_projections={"text": 5, "image": 6}, widths=(None, 24))
    module = build_model(model, predicted)
    parts = parameters.model_parameters(model, predicted).parts
    assert parts["hidden_projections"] == 24 * 24 + 24 + 24 * 6 + 6 + (20 * 20 + 20 + 20 * 5 + 5) * ("text" in predicted)
    for part, count in parts.items():
        assert count == sum(p.numel() for name, p in module.named_parameters() if part_of(name) == part)
    chosen = stage(modalities={name: {"predicted": name in predicted} for name in ("text", "image")})
    at_rest = sum(count.total for count in parameters.idle(model, chosen).values())
    assert parameters.trainable(model, chosen) == sum(parts.values()) - parts["hidden_projections"] - at_rest


def test_swiglu_is_as_wide_as_costs_the_same_rounded_up_to_eight():
    assert parameters.mlp_hidden(small(mlp="gelu"), "text") == 80
    assert parameters.mlp_hidden(small(), "text") == 56
    assert parameters.mlp_hidden(MODELS["emoji32"], "image") == 344
    assert [parameters.mlp_hidden(MODELS["unequal widths"], name) for name in ("text", "image")] == [80, 112]
