"""Parameters by layer: as many as each layer of the built model holds, trains and splits over tensor ranks."""

from __future__ import annotations

import math

import pytest
import torch

from megadiff.config import parameters
from megadiff.config.parameters import is_trained
from megadiff.config.schema import Alignment
from megadiff.models.idle import idle_parameters
from megadiff.models.mmdit import build_model
from megadiff.models.names import named_parameters, part_of
from megadiff.models.tensor_plan import splits
from tests.config.small import MODELS, small, stage

ALIGNED = {"alignment": Alignment(modality="image", block=1, features=5)}
READ_ONLY = {"modalities": {"text": {"predicted": False}, "image": {}}}
GIVEN = {"modalities": {"text": {"conditioning": {"clean": 1.0}}, "image": {}}}
DIVISIBLE = {"width": 32, "heads": 4, "head_dim": 8, "vocabulary": 36}

CASES = [
    *((name, MODELS[name], {}, 1) for name in MODELS),
    *((name, MODELS[name], {}, 2) for name in ("emoji32", "paper")),
    ("paper", MODELS["paper"], {}, 4),
    ("read only", MODELS["trunk norm with towers"], READ_ONLY, 1),
    ("read only, no joint blocks", MODELS["no joint blocks"], READ_ONLY, 1),
    ("given", MODELS["trunk norm with towers"], GIVEN, 1),
    ("joint frozen", MODELS["trunk norm with towers"], {"freeze": ["joint"]}, 1),
    ("alignment", MODELS["unequal widths and swiglu"], ALIGNED, 1),
    ("alignment frozen", MODELS["rope and swiglu"], {**ALIGNED, "freeze": ["alignment", "image"]}, 1),
    *(
        (f"{kind}, {what}", small(**DIVISIBLE, mlp=kind, attention_bias=kind == "gelu", qk_norm=kind != "gelu"), stages, tensor)
        for kind in ("gelu", "swiglu")
        for what, stages in (("all", ALIGNED), ("read only", READ_ONLY))
        for tensor in (2, 4)
    ),
]


@pytest.mark.parametrize(("model", "changes", "tensor"), [case[1:] for case in CASES], ids=[f"{c[0]} {c[3]}" for c in CASES])
def test_layers_hold_train_and_split_what_those_of_the_built_model_do(model, changes, tensor):
    chosen = stage(**changes)
    with torch.device("meta"):
        built = build_model(model, parameters.predicted(chosen), chosen.alignment)
    names = [name for name, _ in named_parameters(built)]
    idle = idle_parameters(model, chosen, names).whole
    counted = parameters.layers(model, chosen, tensor)
    layers = built.layers()
    assert len(counted) == len(layers)
    read = [name for name, modality in chosen.modalities.items() if modality.has_loss]
    run = built.layers(read if chosen.alignment is None else [*read, "alignment"])
    for rank in {0, tensor - 1}:
        parts = splits(built, tensor, rank)
        for layer, count in zip(layers, counted, strict=True):
            local = {
                name: math.prod(parts[name].local) if name in parts else parameter.numel()
                for name, parameter in named_parameters(layer)
            }
            trained = {name: size for name, size in local.items() if is_trained(part_of(name), chosen) and name not in idle}
            for sizes, expected in ((local, count.held), (trained, count.trained)):
                assert sum(size for name, size in sizes.items() if name in parts) == expected.split, count.name
                assert sum(size for name, size in sizes.items() if name not in parts) == expected.replicated, count.name
            assert count.runs == (layer in run)
    if tensor == 1:
        hidden = parameters.stage_parameters(model, chosen).hidden
        assert sum(count.held.total for count in counted) + hidden == parameters.stage_parameters(model, chosen).total
