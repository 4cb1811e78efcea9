"""Derived numbers: equal to what the built model does."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megadiff.config import derived
from megadiff.config.errors import ConfigError
from megadiff.config.schema import Model
from megadiff.models.mmdit import build_model
from megadiff.models.names import part_of
from megadiff.types import Dense, Noised, TokenLosses
from tests.config.small import MODELS, run, small, stage

pytestmark = pytest.mark.thorough

# --------------------------------------------------------------------------------------------------------------- FLOPs


def counted_flops(model: Model, read: list[str], freeze: tuple[str, ...] = (), *, backward: bool) -> float:
    """What torch counts, per sample."""
    batch = 2
    module = build_model(model, list(model.modalities))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(part_of(name) not in freeze)
    spaces = {name: modality.space for name, modality in model.modalities.items()}
    length = spaces["text"].length
    states = {
        "text": torch.zeros(batch, length, dtype=torch.int64),
        "image": torch.randn(batch, spaces["image"].channels, spaces["image"].height, spaces["image"].width),
    }
    noised = Noised(states, {name: torch.rand(batch) for name in spaces}, dict.fromkeys(spaces))
    all_scored = TokenLosses(states["text"], torch.ones(batch, length, dtype=torch.bool), torch.ones(batch, length))
    readout = {name: all_scored if name == "text" else Dense() for name in read}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        prediction = module(noised, readout)
        if backward:
            sum((output if name == "image" else output.weighted).sum() for name, output in prediction.items()).backward()
    return counter.get_total_flops() / batch


FLOP_MODELS = [name for name in MODELS if name != "paper"]


@pytest.mark.parametrize("name", FLOP_MODELS)
@pytest.mark.parametrize("read", [["text", "image"], ["image"]])
def test_forward_flops_equal_what_torch_counts(name, read):
    model, shares = MODELS[name], dict.fromkeys(read, 1.0)
    towers = [flops for modality in read for flops in derived._tower_flops(model, modality, shares, ())]
    layers = [derived._embed_flops(model, shares, ()), *derived._trunk_flops(model, shares, ()), *towers]
    assert sum(layers) + derived._heads_flops(model, shares, ()) == counted_flops(model, read, backward=False)


STAGES = {
    "all": stage(),
    "text is only read": stage(modalities={"text": {"predicted": False}, "image": {}}),
    "joint frozen": stage(freeze=["joint"]),
    "only text trained": stage(modalities={"text": {}, "image": {"loss_weight": 0}}, freeze=["joint", "image"]),
    "image frozen": stage(freeze=["image"]),
}


@pytest.mark.parametrize("name", FLOP_MODELS)
@pytest.mark.parametrize("which", STAGES)
def test_training_flops_equal_what_torch_counts_within_one_percent(name, which):
    model, chosen = MODELS[name], STAGES[which]
    if model.modalities["text"].process.loss != "plain":
        text = model.modalities["text"]
        process = text.process.model_copy(update={"loss": "plain"})
        model = model.model_copy(
            update={"modalities": {**model.modalities, "text": text.model_copy(update={"process": process})}}
        )
    read = [key for key, modality in chosen.modalities.items() if modality.predicted and modality.loss_weight > 0]
    counted = counted_flops(model, read, chosen.freeze, backward=True)
    assert derived.flops_per_sample(model, chosen) == pytest.approx(counted, rel=0.01)


def test_the_nelbo_scores_half_of_the_positions_less_the_conditioning_samples():
    plain, nelbo = small(), small()
    text = nelbo.modalities["text"]
    process = text.process.model_copy(update={"loss": "nelbo"})
    nelbo = nelbo.model_copy(update={"modalities": {**nelbo.modalities, "text": text.model_copy(update={"process": process})}})
    head = 3 * 2 * 7 * 20 * 37
    assert derived.flops_per_sample(plain, stage()) - derived.flops_per_sample(nelbo, stage()) == head / 2
    conditioned = stage(modalities={"text": {"conditioning": {"clean": 0.2, "absent": 0.3}}, "image": {}})
    assert derived.flops_per_sample(plain, stage()) - derived.flops_per_sample(plain, conditioned) == pytest.approx(head / 2)


# --------------------------------------------------------------------------------------------------------------- batch


def test_accumulation_is_what_is_left_of_the_batch_equation():
    assert derived.accumulation(stage(), 4) == 4
    assert derived.accumulation(stage(), 16) == 1


@pytest.mark.parametrize(
    ("samples", "micro_batch", "ranks", "numbers"),
    [
        (1000, 8, 64, r"\(1000\) must be a multiple of micro_batch \(8\) x data ranks \(64\) = 512; nearest: 512 or 1024"),
        (100, 8, 64, r"\(100\) must be a multiple of micro_batch \(8\) x data ranks \(64\) = 512; nearest: 512$"),
    ],
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(samples, micro_batch, ranks, numbers):
    with pytest.raises(ConfigError, match=r"stage all: batch.global_samples " + numbers):
        derived.accumulation(stage(batch={"global_samples": samples, "micro_batch": micro_batch}), ranks)


def test_lanes_divide_over_the_ranks_or_the_nearest_numbers_are_named():
    whole = run(MODELS["emoji32"])
    assert derived.lanes_per_rank(whole, 2) == 4
    with pytest.raises(ConfigError, match=r"data.lanes \(8\) must be a multiple of the data ranks \(3\); nearest: 6 or 9"):
        derived.lanes_per_rank(whole, 3)
    with pytest.raises(ConfigError, match=r"data ranks \(16\); nearest: 16$"):
        derived.lanes_per_rank(whole, 16)
