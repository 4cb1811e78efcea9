"""Names of parameters: the model's own, whatever wraps it, and what follows from them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from megadiff.config.schema import Alignment
from megadiff.models.mmdit import build_model
from megadiff.models.names import decayed_names, named_parameters, part_of
from tests.models.small import small_config, small_model

PLAIN = small_config(("learned", "learned"), qk_norm=False, attention_bias=True, trunk_norm=True)
PAPER = small_config(("learned", "sincos"), mlp="gelu", gates="one", trunk_norm=True, head_modulation="scale", time_scale=1.0)


def whole_model():
    """Of every kind of parameter one; a modality is called as wrappers call what is in them."""
    config = small_config(trunk_norm=True, hidden_projections={"picture": 3})
    named = {"module": config.modalities["words"], "picture": config.modalities["picture"]}
    config = config.model_copy(update={"modalities": named})
    return build_model(config, ["module", "picture"], Alignment(modality="picture", block=0, features=2))


class Engine(nn.Module):
    """What DeepSpeed's engine and DistributedDataParallel do to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Stage(nn.Module):
    """What a pipeline does to names: layers under their numbers."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)


def recomputed(model: nn.Module) -> nn.Module:
    """Wrappers around whole blocks, and inside others."""
    model.joint[0] = checkpoint_wrapper(model.joint[0])
    part = model.joint[1].parts["module"]
    part.mlp = checkpoint_wrapper(part.mlp)
    return model


WRAPPERS = {
    "nothing": lambda model: model,
    "an engine": Engine,
    "two engines": lambda model: Engine(Engine(model)),
    "recomputation": recomputed,
    "recomputation of all": checkpoint_wrapper,
    "an engine over recomputation": lambda model: Engine(recomputed(model)),
    "a copy": lambda model: Engine(copy.deepcopy(model)),
    "the compiler": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_model_in_a_wrapper_keeps_the_names_and_the_order_of_its_parameters(wrapper):
    model = whole_model()
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    found = [(name, parameter.shape) for name, parameter in named_parameters(WRAPPERS[wrapper](model))]
    assert found == list(expected.items())
    assert {name.split(".")[0] for name in expected} == {
        *("embed", "joint", "trunk_norm", "towers", "heads", "hidden_projections", "alignment")
    }


@pytest.mark.parametrize("stages", [1, 3])
def test_layers_that_a_pipeline_holds_keep_their_names(stages):
    model = whole_model()
    layers = model.layers()
    size = -(-len(layers) // stages)
    held = {}
    for start in range(0, len(layers), size):
        held |= dict(named_parameters(Engine(Stage(layers[start : start + size]))))
    expected = {name: p for name, p in model.named_parameters() if part_of(name) != "hidden_projections"}
    assert held.keys() == expected.keys()
    assert all(held[name] is parameter for name, parameter in expected.items())


@pytest.mark.parametrize("wrapper", ["an engine", "recomputation"])
def test_weight_decay_is_for_the_same_names_in_any_wrapper(wrapper):
    model = whole_model()
    expected = decayed_names(model)
    assert decayed_names(WRAPPERS[wrapper](model)) == expected


def test_a_module_that_is_no_model_keeps_its_own_names():
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    assert [name for name, _ in named_parameters(Engine(other))] == ["0.weight", "0.bias", "1.weight"]


def test_parameters_belong_to_their_parts():
    assert part_of("towers.words.0.parts.words.mlp.up.weight") == "words"
    assert part_of("heads.picture.weight") == "picture"
    assert part_of("embed.states.words.weight") == part_of("joint.0.parts.words.output.weight") == "joint"
    assert part_of("trunk_norm.norms.words.gain") == "joint"


def test_weight_decay_is_for_linear_maps_only():
    decayed = set(decayed_names(small_model(PLAIN)))
    assert {"heads.words.weight", "embed.states.picture.projection.weight", "joint.0.parts.words.mlp.up.weight"} <= decayed
    kept = {"embed.states.words.weight", "embed.states.words.positions", "heads.words.bias", "joint.0.parts.words.mlp.up.bias"}
    assert not decayed & kept
    model = small_model(PAPER)
    assert decayed <= {name for name, _ in small_model(PLAIN).named_parameters()}
    assert not [name for name in decayed_names(model) if "gain" in name]
