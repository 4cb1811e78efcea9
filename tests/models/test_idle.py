"""What is called idle is what gets no gradient from a stage's losses, no more and no less."""

from __future__ import annotations

import pytest
import torch

from megadiff import rng
from megadiff.config import derived, parameters
from megadiff.config.schema import Model, Stage
from megadiff.diffusion.objective import DiffusionObjective
from megadiff.models.idle import idle_parameters
from megadiff.models.mmdit import MMDiT, build_model
from megadiff.models.names import part_of
from megadiff.types import Batch
from tests.models.small import small_config

FEATURES, SAMPLES = 3, 64
READ_ONLY = {"predicted": False}
LEARNT = {"conditioning": {"clean": 0.2, "absent": 0.2}}
PAPER = {"gates": "one", "block_modulation": "scale", "trunk_norm": True, "head_modulation": "scale", "time_scale": 1.0}
MODELS = {
    "modern": small_config(),
    "paper": small_config(mlp="gelu", **PAPER),
    "with biases": small_config(positions=("rope", "rope"), attention_bias=True, qk_norm=False, trunk_norm=True),
    "without towers": small_config(depths=(0, 0), trunk_norm=True),
    "without joint blocks": small_config(joint_depth=0, trunk_norm=True),
}


def stage(words: dict, picture: dict = LEARNT, **changes) -> Stage:
    tree = {
        "name": "some",
        "steps": 10,
        "modalities": {"words": words, "picture": picture},
        "batch": {"global_samples": SAMPLES, "micro_batch": SAMPLES},
        "ema": {"main": {"kind": "constant"}},
    }
    return Stage.model_validate({**tree, **changes})


def aligned(modality: str, block: int) -> dict:
    return {"alignment": {"modality": modality, "block": block, "features": FEATURES}}


STAGES = {
    "all": stage(LEARNT),
    "words are only read": stage(READ_ONLY),
    "the picture is only read": stage(LEARNT, READ_ONLY),
    "words have no loss": stage({"loss_weight": 0.0}),
    "words are always given": stage({"conditioning": {"clean": 1.0}}, {}),
    "words are always given and only read": stage({"predicted": False, "conditioning": {"clean": 1.0}}, {}),
    "words are never there": stage({"conditioning": {"absent": 1.0}}, {}),
    "words are given or not there": stage({"conditioning": {"clean": 0.3, "absent": 0.7}}, {}),
    "the picture is always given": stage({}, {"conditioning": {"clean": 1.0}}),
    "words are aligned in the last block": stage(READ_ONLY, **aligned("words", 1)),
    "words are aligned before it": stage(READ_ONLY, **aligned("words", 0)),
    "words are frozen": stage(READ_ONLY, freeze=["words"]),
    "all but words is frozen": stage(LEARNT, {"loss_weight": 0.0}, freeze=["joint", "picture"]),
    "the joint part is frozen": stage(READ_ONLY, freeze=["joint"]),
}
CASES = [
    (name, which)
    for name, model in MODELS.items()
    for which, chosen in STAGES.items()
    if chosen.alignment is None or chosen.alignment.block < model.joint_depth
]


def trained_model(model: Model, chosen: Stage) -> MMDiT:
    """With no parameter at a value that stops gradients, and frozen as the stage says."""
    module = build_model(model, parameters.predicted(chosen), chosen.alignment)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2).requires_grad_(part_of(name) not in chosen.freeze)
    return module


def back_propagate(module: MMDiT, model: Model, chosen: Stage) -> None:
    keys = rng.sample_keys(0, torch.arange(SAMPLES))
    states = {"words": torch.randint(11, (SAMPLES, 5)), "picture": torch.randn(SAMPLES, 3, 4, 6)}
    features = {name: torch.randn(SAMPLES, count, FEATURES) for name, count in derived.tokens(model).items()}
    ids = tuple(map(str, range(SAMPLES)))
    batch = Batch(states, keys, torch.arange(SAMPLES), torch.ones(SAMPLES), ids, 0, SAMPLES, features)
    objective = DiffusionObjective(model, chosen, seed=0)
    prepared = objective.prepare(batch)
    normaliser = {name: 1 / count.clamp_min(1.0) for name, count in prepared.counts.items()}
    objective.score(module(prepared.noised, prepared.readout), prepared, normaliser).total.backward()


@pytest.mark.parametrize(("name", "which"), CASES)
def test_idle_is_what_gets_no_gradient(name, which):
    model, chosen = MODELS[name], STAGES[which]
    module = trained_model(model, chosen)
    back_propagate(module, model, chosen)
    free = {key: parameter for key, parameter in module.named_parameters() if part_of(key) not in chosen.freeze}
    whole, partial = idle_parameters(model, chosen, free)
    for key, parameter in free.items():
        idle = torch.full(parameter.shape, key in whole)
        if key in partial:
            idle[partial[key]] = True
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert ((gradient == 0) == idle).all(), key


@pytest.mark.parametrize(("name", "which"), CASES)
def test_the_count_of_what_is_idle_is_that_of_the_built_model(name, which):
    model, chosen = MODELS[name], STAGES[which]
    free = {key: value for key, value in trained_model(model, chosen).named_parameters() if part_of(key) not in chosen.freeze}
    whole, partial = idle_parameters(model, chosen, free)
    counts: dict[str, parameters.IdleCount] = {}
    for key, parameter in free.items():
        before = counts.get(part_of(key), parameters.IdleCount())
        some = parameter[partial[key]].numel() if key in partial else 0
        counts[part_of(key)] = parameters.IdleCount(before.whole + parameter.numel() * (key in whole), before.partial + some)
    assert parameters.idle(model, chosen) == {part: count for part, count in counts.items() if count.total}
    assert parameters.trainable(model, chosen) == sum(map(torch.numel, free.values())) - sum(c.total for c in counts.values())
