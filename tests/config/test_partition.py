"""The cut into pipeline stages: every layer counted once, in the model's order, and no better cut."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from megadiff.config import derived
from megadiff.config.errors import ConfigError
from megadiff.config.partition import cut, partition
from megadiff.config.schema import Alignment
from megadiff.models.mmdit import build_model
from tests.config.small import MODELS, small, stage

STAGES = {
    "all": stage(),
    "text is only read": stage(modalities={"text": {"predicted": False}, "image": {}}),
    "text is not scored": stage(modalities={"text": {"loss_weight": 0}, "image": {}}),
    "joint frozen": stage(freeze=["joint"]),
}


def costliest(costs: list[float], bounds: list[int]) -> float:
    return max(sum(costs[start:stop]) for start, stop in pairwise(bounds))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("paper", "emoji32")])
@pytest.mark.parametrize("which", STAGES)
@pytest.mark.parametrize("aligned", [False, True])
def test_every_layer_of_the_model_has_its_flops_and_they_add_up(name, which, aligned):
    model, chosen = MODELS[name], STAGES[which]
    rule = Alignment(modality="image", block=0, features=6) if aligned and model.joint_depth else None
    chosen = chosen.model_copy(update={"alignment": rule})
    predicted = [key for key, modality in chosen.modalities.items() if modality.predicted]
    module = build_model(model, predicted, rule)
    costs = derived.layer_flops(model, chosen)
    assert len(costs) == len(module.layers())
    assert round(sum(costs)) == derived.flops_per_sample(model, chosen)
    read = [key for key, modality in chosen.modalities.items() if modality.has_loss] + (["alignment"] if rule else [])
    running = module.layers(read)
    for layer, cost in zip(module.layers(), costs, strict=True):
        norm = type(layer).__name__ == "StreamNorm"
        assert (cost > 0) == (layer in running and not norm), type(layer).__name__


def test_the_alignment_stands_after_its_block():
    model = small()
    aligned = stage().model_copy(update={"alignment": Alignment(modality="image", block=1, features=6)})
    costs = derived.layer_flops(model, aligned)
    assert costs[:3] + costs[4:] == derived.layer_flops(model, stage())
    width = model.width_of("image")
    assert costs[3] == 2 * 8 * (width * 2 * width + (2 * width) ** 2 + 2 * width * 6) * 3


@pytest.mark.parametrize("seed", range(20))
def test_no_cut_has_a_cheaper_costliest_stage(seed):
    drawn = random.Random(seed)
    costs = [drawn.choice([0.0, drawn.uniform(0, 10)]) for _ in range(drawn.randint(4, 9))]
    for stages in range(1, len(costs) + 1):
        bounds = cut(costs, stages)
        assert bounds[0] == 0
        assert bounds[-1] == len(costs)
        assert len(bounds) == stages + 1
        assert all(start < stop for start, stop in pairwise(bounds))
        every = [[0, *inner, len(costs)] for inner in combinations(range(1, len(costs)), stages - 1)]
        assert costliest(costs, bounds) == pytest.approx(min(costliest(costs, other) for other in every))


def test_frozen_layers_count_with_what_they_cost():
    """Joint blocks that run forward only cost a third, so more of them share a stage."""
    model = small(depths=(4, 4), joint_depth=6)
    whole, frozen = (partition(model, chosen, 2) for chosen in (stage(), stage(freeze=["joint"])))
    assert frozen[1] > whole[1]


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ConfigError, match=r"stage all has 8 layers .* for 9 pipeline stages; use at most 8"):
        partition(small(), stage(), 9)
