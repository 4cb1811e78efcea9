"""The alignment loss: what it compares, what it trains, and that it leaves everything else alone."""

from __future__ import annotations

import pytest
import torch

from megadiff.config.errors import UserError
from megadiff.config.parameters import model_parameters
from megadiff.config.schema import Alignment
from megadiff.models.mmdit import build_model
from megadiff.models.names import part_of
from megadiff.types import ALIGNMENT, Aligned, Dense
from tests.models.small import small_config, small_noised

CONFIG = small_config()
RULE = Alignment(modality="picture", block=0, features=7)


def aligned_model(rule: Alignment = RULE):
    torch.manual_seed(0)
    model = build_model(CONFIG, ["words", "picture"], rule)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def test_the_loss_is_one_minus_the_cosine_of_projected_tokens_and_features():
    model, noised, features = aligned_model(), small_noised(), torch.randn(3, 6, 7)
    found = model(noised, {ALIGNMENT: Aligned(features)})[ALIGNMENT]
    tokens = model.joint[0](model.embed(noised)).dense("picture")
    first, second, third = model.alignment.layers
    projected = third(torch.nn.functional.silu(second(torch.nn.functional.silu(first(tokens)))))
    cosine = (projected * features).sum(-1) / (projected.norm(dim=-1) * features.norm(dim=-1))
    torch.testing.assert_close(found, 1 - cosine.mean(1))


def test_it_trains_the_projection_and_the_blocks_before_it_only():
    model = aligned_model()
    model(small_noised(), {ALIGNMENT: Aligned(torch.randn(3, 6, 7))})[ALIGNMENT].sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert any(name.startswith("alignment.") for name in trained)
    assert any(name.startswith("joint.0.") for name in trained)
    assert not any(name.startswith(("joint.1.", "towers.", "heads.")) for name in trained)


def test_predictions_do_not_depend_on_it_and_it_is_a_part_of_its_own():
    model, noised = aligned_model(), small_noised()
    both = model(noised, {"picture": Dense(), ALIGNMENT: Aligned(torch.randn(3, 6, 7))})
    torch.testing.assert_close(both["picture"], model(noised, {"picture": Dense()})["picture"])
    parts = {part_of(name) for name, _ in model.named_parameters()}
    assert parts == {"joint", "words", "picture", "alignment"}


def test_it_is_a_layer_after_its_block_and_what_it_taps_travels_to_the_last_one():
    model, noised, features = aligned_model(), small_noised(), torch.randn(3, 6, 7)
    embed, *between, heads = model.layers()
    assert between.index(model.alignment) == between.index(model.joint[RULE.block]) + 1
    assert model.alignment not in model.layers(["picture", "words"])
    stream = embed(noised)
    for layer in between:
        stream = layer(stream)
    readout = {"picture": Dense(), ALIGNMENT: Aligned(features)}
    for name, output in model(noised, readout).items():
        assert torch.equal(heads(stream, readout)[name], output)


def test_a_model_without_it_has_nothing_to_compare():
    with pytest.raises(UserError, match="no head for alignment"):
        build_model(CONFIG, ["picture"])(small_noised(), {ALIGNMENT: Aligned(torch.randn(3, 6, 7))})


@pytest.mark.parametrize("features", [1, 7])
def test_the_derived_count_of_its_parameters_is_the_models(features):
    rule = Alignment(modality="picture", block=1, features=features)
    model = build_model(CONFIG, ["picture"], rule)
    held = sum(parameter.numel() for name, parameter in model.named_parameters() if part_of(name) == "alignment")
    assert model_parameters(CONFIG, ["picture"], rule).alignment == held
    assert model_parameters(CONFIG, ["picture"], rule).total == sum(parameter.numel() for parameter in model.parameters())
