"""Bytes held and sent: worked by hand, and of what autograd keeps counted; tests/engine/test_footprint.py counts on ranks."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megadiff.config import parameters
from megadiff.config.activations import activations, recomputed
from megadiff.config.footprint import Plan, bubble, bytes_per_rank, bytes_sent_per_step, imbalance
from megadiff.config.layout import Layout
from megadiff.config.parameters import token_count
from megadiff.config.schema import Alignment
from megadiff.models.mmdit import build_model
from megadiff.models.names import part_of
from megadiff.types import Aligned, Dense, Noised, Readout, TokenLosses
from tests.config.small import MODELS, small, stage

EMOJI = MODELS["emoji32"]
COUNT = parameters.model_parameters(EMOJI, ["text", "image"]).total
FROZEN = parameters.model_parameters(EMOJI, ["text", "image"]).parts["joint"]


def plan(zero: int, precision: str = "bf16", *, layout: Layout | None = None, model=EMOJI, options=None, **changes) -> Plan:
    return Plan(model, stage(**changes), layout or Layout(0, 4), zero, precision, options or {"reduce_bucket_size": 100})


# ---------------------------------------------------------------------------------------------------------------- held


def test_bytes_are_divided_over_the_ranks_as_far_as_the_zero_stage_says():
    sizes = {zero: bytes_per_rank(plan(zero))[0] for zero in range(4)}
    assert sizes[0] == sizes[1]
    kept = sizes[1]["activations"]
    assert sizes[1] == {
        "weights": 2 * COUNT,
        "gathered": 0,
        "gradients": 2 * (COUNT - 100) + 4 * COUNT / 4,  # all but those of the bucket, beside the part that is stepped
        "master": COUNT,
        "adam": 2 * COUNT,
        "ema": COUNT,
        "activations": kept,
        "buffers": 200,
        "total": 9 * COUNT + kept,
    }
    assert sizes[2]["gradients"] == 4 * COUNT / 4
    alone = bytes_per_rank(plan(2, layout=Layout()))[0]
    assert (alone["gradients"], alone["buffers"]) == (6 * COUNT, 0)
    assert (sizes[3]["weights"], sizes[3]["gathered"]) == (COUNT / 2, 2 * COUNT)


def test_fp32_keeps_no_masters_where_the_optimizer_steps_the_weights():
    full = bytes_per_rank(plan(0, "fp32"))[0]
    assert (full["weights"], full["master"], full["adam"]) == (4 * COUNT, 0, 8 * COUNT)
    stepped = bytes_per_rank(plan(3, "fp32"))[0]
    assert (stepped["weights"], stepped["master"]) == (COUNT, 0)


def test_frozen_parameters_have_a_master_and_nothing_else():
    partly = bytes_per_rank(plan(3, layout=Layout(), freeze=["joint"]))[0]
    trained = COUNT - FROZEN
    assert (partly["gradients"], partly["master"], partly["weights"]) == (6 * trained, 4 * COUNT, 2 * COUNT)
    assert (partly["adam"], partly["ema"], partly["gathered"]) == (8 * trained, 4 * trained, 0)


def test_zero_3_has_the_weights_whole_that_it_keeps_for_the_backward_pass_or_fetches_ahead():
    def gathered(distance: int, ahead: int, **changes) -> float:
        options = {"stage3_max_reuse_distance": distance, "stage3_prefetch_bucket_size": ahead}
        return bytes_per_rank(plan(3, options=options, **changes))[0]["gathered"] / 2

    assert gathered(0, 1000) == 1000
    assert gathered(2000, 1000) == 1000 + 1000
    assert gathered(10**9, 1000) == gathered(0, 10**9) == COUNT
    assert gathered(10**9, 1000, freeze=["joint"]) == COUNT - FROZEN + 1000


def test_pipeline_stages_share_the_layers_and_keep_the_micro_batches_in_flight():
    whole = bytes_per_rank(plan(1, layout=Layout()))[0]
    stages = bytes_per_rank(plan(1, layout=Layout(0, 4, pipeline=4)))
    for kind in ("weights", "adam", "ema", "master"):
        assert sum(held[kind] for held in stages) == whole[kind]
    flying = sum(held["activations"] / in_flight for held, in_flight in zip(stages, (4, 3, 2, 1), strict=True))
    assert flying == whole["activations"]
    one = bytes_per_rank(plan(1, layout=Layout(0, 4, pipeline=4), batch={"global_samples": 4, "micro_batch": 4}))
    assert sum(held["activations"] for held in one) == whole["activations"]


def test_hidden_projections_are_held_by_the_last_pipeline_stage():
    layout = Layout(0, 2, pipeline=2)
    with_them = bytes_per_rank(plan(1, layout=layout, model=small(hidden_projections={"text": 5})))
    without = bytes_per_rank(plan(1, layout=layout, model=small()))
    assert with_them[0] == without[0]
    assert with_them[1]["weights"] - without[1]["weights"] == 2 * (20 * 20 + 20 + 20 * 5 + 5)


ACTIVATION_STAGES = {
    "all": {},
    "joint frozen": {"freeze": ["joint"]},
    "image frozen": {"freeze": ["image"]},
    "read only": {"modalities": {"text": {"predicted": False}, "image": {}}},
    "alignment": {"alignment": Alignment(modality="image", block=1, features=24)},
}


ACTIVATION_CASES = [
    (name, which)
    for name, which in product(MODELS, ACTIVATION_STAGES)
    if name not in ("paper", "emoji32") and (name, which) != ("no joint blocks", "alignment")
]


@pytest.mark.parametrize(("name", "which"), ACTIVATION_CASES)
def test_activations_are_what_autograd_keeps_within_five_percent(name, which):
    model, chosen = MODELS[name], stage(**ACTIVATION_STAGES[which])
    counted = kept_by_autograd(model, chosen)
    assert sum(activations(model, chosen, parameters.layers(model, chosen), 1, "fp32")) == pytest.approx(counted, rel=0.05)


def kept_by_autograd(model, chosen) -> int:
    """Bytes of distinct storages that the backward pass of one micro-batch needs, without parameters."""
    batch, text, image = chosen.batch.micro_batch, model.modalities["text"].space, model.modalities["image"].space
    module = build_model(model, parameters.predicted(chosen), chosen.alignment)
    for parameter_name, parameter in module.named_parameters():
        parameter.requires_grad_(part_of(parameter_name) not in chosen.freeze)
    ids = torch.zeros(batch, text.length, dtype=torch.int64)
    states = {"text": ids, "image": torch.randn(batch, image.channels, image.height, image.width)}
    noised = Noised(states, {key: torch.rand(batch) for key in states}, dict.fromkeys(states))
    scored = TokenLosses(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones(ids.shape), ids.numel())
    read = [key for key, modality in chosen.modalities.items() if modality.has_loss]
    readout: dict[str, Readout] = {key: scored if key == "text" else Dense() for key in read}
    if chosen.alignment is not None:
        readout["alignment"] = Aligned(torch.randn(batch, token_count(image), chosen.alignment.features))
    own, kept = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        prediction = module(noised, readout)
        loss = sum((one if isinstance(one, torch.Tensor) else one.weighted).square().sum() for one in prediction.values())
    loss.backward()
    return sum(storage.nbytes() for storage in kept.values())


def test_checkpointing_keeps_the_blocks_inputs_and_recomputes_one_block_at_a_time():
    plain, saving = stage(), stage(activation_checkpointing=True)
    layers = parameters.layers(EMOJI, plain)
    whole, kept = (activations(EMOJI, chosen, layers, 1, "bf16") for chosen in (plain, saving))
    tokens = 4 * 2 * 128
    inputs = {"joint 0": 80 * tokens, "text 0": 16 * tokens, "image 0": 64 * tokens}
    for layer, before, after in zip(layers, whole, kept, strict=True):
        first = re.sub(r"joint \d", "joint 0", layer.name)
        assert after == inputs.get(first, before)
    assert not any(recomputed(EMOJI, plain, layers, 1, "bf16"))
    total = bytes_per_rank(plan(1, layout=Layout(), activation_checkpointing=True))[0]["activations"]
    assert total == sum(kept) + max(whole[1:5])


# ---------------------------------------------------------------------------------------------------------------- sent


def test_each_zero_stage_reduces_and_gathers_as_deepspeed_does():
    sent = {zero: bytes_sent_per_step(plan(zero, "fp32"))[0] for zero in range(4)}
    size, micro_batches = 4 * COUNT, 4
    none = {"all_reduce": 0, "all_gather": 0, "reduce_scatter": 0, "send": 0}
    assert sent[0] == {**none, "all_reduce": size, "total": size}
    assert sent[1] == {**none, "all_reduce": size, "all_gather": size, "total": 2 * size}
    assert (sent[2]["all_reduce"], sent[2]["all_gather"]) == (micro_batches * size, size)
    assert (sent[3]["reduce_scatter"], sent[3]["all_gather"]) == (micro_batches * size, micro_batches * size)


def test_without_reuse_zero_3_gathers_again_what_the_backward_pass_needs():
    options = {"stage3_max_reuse_distance": 0}
    assert bytes_sent_per_step(plan(3, options=options))[0]["all_gather"] == 2 * 4 * 2 * COUNT
    frozen = bytes_sent_per_step(plan(3, options=options, freeze=["joint"]))[0]
    assert frozen["all_gather"] == 4 * 2 * (COUNT + COUNT - FROZEN)


def test_one_rank_sends_nothing():
    for zero in range(4):
        assert bytes_sent_per_step(plan(zero, layout=Layout()))[0]["total"] == 0


def test_a_pipeline_sends_tokens_and_conditioning_forward_and_their_gradient_back():
    first, last = bytes_sent_per_step(plan(1, "fp32", layout=Layout(0, 2, pipeline=2)))
    floats = 4 * 4 * 128 * (80 + 2)
    assert first["send"] == 16 * (floats + 4 * 80 + 8 * (3 + 2 * 4))
    assert last["send"] == 16 * floats


def test_tensor_parallelism_adds_up_twice_forward_and_twice_backward_in_a_block():
    small_stage = {"batch": {"global_samples": 4, "micro_batch": 4}}
    sums = {
        freeze: bytes_sent_per_step(plan(0, "fp32", layout=Layout(0, 2, tensor=2), freeze=list(freeze), **small_stage))[0]
        for freeze in ((), ("joint",))
    }
    text, image, width = 16, 64, 128
    block = {count: 4 * count * width + 7 * width for count in (text, image)}
    embed, heads = text * width, 2 * 3 * width + text * width + 3 * text
    numbers = embed + 4 * (block[text] + block[image]) + block[text] + block[image] + heads
    assert sums[()]["all_reduce"] == 4 * 4 * numbers
    # Nothing flows back into the joint blocks, and no gradient is needed of the conditioning.
    saved = 4 * (2 * (text + image) + 2) * width + 2 * width + 2 * width
    assert sums[("joint",)]["all_reduce"] == 4 * 4 * (numbers - saved)


# --------------------------------------------------------------------------------------------------------------- waits


def test_the_bubble_shrinks_with_the_micro_batches():
    assert bubble(1, 5) == 0
    assert bubble(4, 1) == 0.75
    assert bubble(4, 9) == 0.25


def test_the_imbalance_is_the_costliest_stage_over_the_mean():
    assert imbalance(plan(1, layout=Layout())) == 1
    assert 1 < imbalance(plan(1, layout=Layout(0, 3, pipeline=3))) < 1.5
    assert replace(plan(1), layout=Layout(0, 2, pipeline=2)).bounds[0] == 0
