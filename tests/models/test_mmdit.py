"""The MMDiT as a whole."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from megadiff.config.errors import ConfigError, UserError
from megadiff.config.schema import RESERVED_NAMES, Alignment
from megadiff.models.mmdit import build_model
from megadiff.models.names import part_of
from megadiff.types import CrossEntropy, Dense, RowLogits, TokenLosses
from tests.models.small import small_config, small_model, small_noised

BOTH = {"words": Dense(), "picture": Dense()}
VARIANTS = {
    "modern": small_config(("rope", "rope")),
    "paper": small_config(
        ("learned", "sincos"), mlp="gelu", gates="one", trunk_norm=True, head_modulation="scale", time_scale=1.0
    ),
    "plain": small_config(("learned", "learned"), qk_norm=False, attention_bias=True, trunk_norm=True),
    "no towers": small_config(depths=(0, 0)),
    "no joint blocks": small_config(joint_depth=0),
}


def losses(count=3):
    scored = torch.rand(count, 5) < 0.5
    scored[0, 0] = True
    return TokenLosses(torch.randint(11, (count, 5)), scored, torch.rand(count, 5))


def modules_run(model, readout):
    """Names of the modules that a forward runs, in order."""
    run = []
    hooks = [module.register_forward_pre_hook(lambda *_, name=name: run.append(name)) for name, module in model.named_modules()]
    model(small_noised(), readout)
    for hook in hooks:
        hook.remove()
    return run


def numbers_of(output):
    return output.weighted if isinstance(output, CrossEntropy) else output


def gradients(model, noised, readout):
    model.zero_grad()
    torch.manual_seed(1)
    outputs = [numbers_of(output) for output in model(noised, readout).values()]
    sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_readout_has_its_shape_and_is_float32(variant):
    model = small_model(VARIANTS[variant])
    noised = small_noised()
    words = {Dense(): (3, 5, 11), losses(): (3, 5), RowLogits(torch.tensor([14, 0])): (2, 11)}
    for readout, shape in words.items():
        prediction = model(noised, {"words": readout, "picture": Dense()})
        assert list(prediction) == ["words", "picture"]
        assert numbers_of(prediction["words"]).shape == shape
        assert prediction["picture"].shape == (3, 3, 4, 6)
        assert {numbers_of(output).dtype for output in prediction.values()} == {torch.float32}


def test_token_losses_are_the_cross_entropy_of_dense_logits_and_row_logits_their_rows():
    model, noised, wanted = small_model(), small_noised(), losses()
    dense = model(noised, {"words": Dense()})["words"]
    entropy = F.cross_entropy(dense.flatten(0, 1), wanted.targets.flatten(), reduction="none").view(3, 5)
    told = model(noised, {"words": wanted})["words"]
    assert torch.allclose(told.unweighted, entropy * wanted.scored, atol=1e-5)
    assert torch.equal(told.weighted, told.unweighted * wanted.weights)
    rows = torch.tensor([14, 0, 7])
    assert torch.allclose(model(noised, {"words": RowLogits(rows)})["words"], dense.flatten(0, 1)[rows], atol=1e-6)


def test_the_class_for_the_mask_state_adds_to_the_weighted_losses_alone():
    plain = small_config().modalities["words"].process.model_copy(update={"loss": "plain", "mask_class": True})
    config = small_config()
    words = config.modalities["words"].model_copy(update={"process": plain})
    model = small_model(config.model_copy(update={"modalities": {**config.modalities, "words": words}}))
    noised, wanted = small_noised(), losses()
    without, told = (model(noised, {"words": wanted._replace(mask_class=flag)})["words"] for flag in (False, True))
    assert torch.equal(told.unweighted, without.unweighted)
    hidden = model.heads["words"].normalised
    stream = noised
    for layer in model.layers(["words"])[:-1]:
        stream = layer(stream)
    head = model.heads["words"]
    mask_logit = F.linear(hidden(stream.tokens["words"], stream.conditioning["words"]), head.mask_weight, head.mask_bias)[  # type: ignore[attr-defined]
        ..., 0
    ]
    extra = F.softplus(mask_logit) * wanted.scored * wanted.weights
    torch.testing.assert_close(told.weighted, without.weighted + extra)


def test_a_modality_that_is_not_read_out_runs_neither_tower_nor_head():
    model = small_model()
    run = modules_run(model, {"picture": Dense()})
    assert not [name for name in run if part_of(name) == "words"]
    assert [name for name in run if part_of(name) == "picture"]
    both = model(noised := small_noised(), BOTH)
    assert torch.equal(model(noised, {"picture": Dense()})["picture"], both["picture"])


def test_the_same_modules_run_in_the_same_order_whatever_the_readout_asks_or_its_order():
    model = small_model()
    nothing = TokenLosses(torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.bool), torch.ones(3, 5))
    first = modules_run(model, {"words": losses(), "picture": Dense()})
    assert modules_run(model, {"picture": Dense(), "words": nothing}) == first
    assert modules_run(model, {"words": RowLogits(torch.tensor([], dtype=torch.int64)), "picture": Dense()}) == first


def test_the_four_parts_of_a_model_are_its_layers_in_order():
    model = small_model(VARIANTS["paper"])
    towers = [layer for tower in model.towers.values() for layer in tower]  # type: ignore[attr-defined]
    assert model.layers() == [model.embed, *model.trunk, *towers, model.heads]
    assert model.trunk == [*model.joint, model.trunk_norm]


def test_layers_run_in_order_give_what_forward_gives():
    model, noised = small_model(VARIANTS["paper"]), small_noised()
    embed, *blocks, heads = model.layers()
    stream = embed(noised)
    for block in blocks:
        stream = block(stream)
    for name, output in heads(stream, BOTH).items():
        assert torch.equal(output, model(noised, BOTH)[name])
    assert len(model.layers()) - len(model.layers(["words"])) == 2 + 1  # the picture's blocks and their norm


@pytest.mark.parametrize("variant", ["modern", "paper"])
def test_hidden_keys_do_not_influence_visible_outputs(variant):
    model, noised = small_model(VARIANTS[variant]), small_noised()
    before = model(noised, BOTH)
    noised.states["words"][0, 3:] = (noised.states["words"][0, 3:] + 1) % 12
    after = model(noised, BOTH)
    assert torch.allclose(before["picture"], after["picture"], atol=1e-6)
    assert torch.allclose(before["words"][0, :3], after["words"][0, :3], atol=1e-6)
    assert not torch.allclose(before["words"][0, 3:], after["words"][0, 3:], atol=1e-3)


def test_every_visible_state_and_every_clock_influences_both_outputs():
    model, noised = small_model(), small_noised()
    before = model(noised, BOTH)
    for field in ("states", "clocks"):
        for name in BOTH:
            changed = {**getattr(noised, field), name: getattr(noised, field)[name].flip(0)}
            after = model(noised._replace(**{field: changed}), BOTH)
            assert all(not torch.allclose(before[other], after[other], atol=1e-4) for other in BOTH), (field, name)


def test_an_all_true_mask_equals_no_mask():
    model, noised = small_model(), small_noised()
    everything = noised._replace(visible={"words": torch.ones(3, 5, dtype=torch.bool), "picture": None})
    nothing = noised._replace(visible={"words": None, "picture": None})
    for name, output in model(everything, BOTH).items():
        assert torch.allclose(output, model(nothing, BOTH)[name], atol=1e-6)


def test_permuting_the_batch_permutes_the_outputs():
    model, noised, order = small_model(), small_noised(), torch.tensor([2, 0, 1])
    permuted = type(noised)(*({k: v if v is None else v[order] for k, v in field.items()} for field in noised))
    outputs = model(permuted, BOTH)
    for name, output in model(noised, BOTH).items():
        assert torch.allclose(outputs[name], output[order], atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(variant):
    grads = gradients(small_model(VARIANTS[variant]), small_noised(), BOTH)
    assert not [name for name, gradient in grads.items() if gradient is None or not gradient.any()]


def test_a_readout_without_rows_still_gives_the_head_zero_gradients():
    nothing = TokenLosses(torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.bool), torch.ones(3, 5))
    grads = gradients(small_model(), small_noised(), {"words": nothing, "picture": Dense()})
    own = {name: gradient for name, gradient in grads.items() if part_of(name) == "words"}
    assert own
    assert all(gradient is not None and not gradient.any() for gradient in own.values())


@pytest.mark.parametrize("variant", ["modern", "paper"])
def test_activation_checkpointing_changes_neither_values_nor_gradients(variant):
    model, noised, readout = small_model(VARIANTS[variant]), small_noised(), {"words": losses(), "picture": Dense()}
    plain, outputs = gradients(model, noised, readout), model(noised, readout)
    model.activation_checkpointing = True
    runs = []
    model.joint[0].register_forward_pre_hook(lambda *_: runs.append(1))
    recomputed = gradients(model, noised, readout)
    assert len(runs) == 2
    assert all(torch.equal(numbers_of(output), numbers_of(outputs[name])) for name, output in model(noised, readout).items())
    assert all(torch.equal(gradient, plain[name]) for name, gradient in recomputed.items())


def test_checkpointing_keeps_gradients_when_the_joint_part_is_frozen():
    model, noised = small_model(), small_noised()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) == "words")
    plain = gradients(model, noised, {"words": Dense()})
    model.activation_checkpointing = True
    recomputed = gradients(model, noised, {"words": Dense()})
    assert {name for name, gradient in plain.items() if gradient is not None} == {
        name for name, _ in model.named_parameters() if part_of(name) == "words"
    }
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in plain.items() if gradient is not None)


def test_zero_gates_start_with_zero_outputs_and_blocks_that_change_nothing():
    model, noised = small_model(VARIANTS["modern"], random=False), small_noised()
    assert all(not output.any() for output in model(noised, BOTH).values())
    stream = model.embed(noised)
    for name, tokens in model.joint[0](stream).tokens.items():
        assert torch.equal(tokens, stream.tokens[name])


def test_one_gates_start_as_a_plain_transformer():
    model, noised = small_model(VARIANTS["paper"], random=False), small_noised()
    assert all(output.std() > 1e-3 for output in model(noised, BOTH).values())
    modulated = model.joint[0].parts["words"].modulation(torch.randn(2, 16))
    assert [float(slot.detach().mean()) for slot in modulated] == [0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("modulation", ["scale", "one_plus_scale"])
def test_a_zero_initialised_head_can_learn(modulation):
    model = small_model(small_config(gates="zero", head_modulation=modulation), random=False)
    grads = gradients(model, small_noised(), BOTH)
    assert grads["heads.words.weight"].any()
    assert grads["heads.picture.weight"].any()


def test_a_model_in_bfloat16_reads_float32_inputs_and_answers_in_float32():
    model, noised = small_model(VARIANTS["modern"]), small_noised()
    wanted = model(noised, BOTH)
    outputs = model.bfloat16()(noised, BOTH)
    for name, output in outputs.items():
        assert output.dtype == torch.float32
        assert (output - wanted[name]).norm() < 0.1 * wanted[name].norm()


def test_a_clock_of_one_thousandth_is_told_from_zero_in_bfloat16():
    model = small_model(VARIANTS["modern"]).bfloat16()
    clocks = model.embed.clocks["words"](torch.tensor([0.5, 0.501]))
    assert not torch.equal(clocks[0], clocks[1])


def test_only_predicted_modalities_have_a_tower_and_a_head():
    model = small_model(predicted=["picture"])
    assert {part_of(name) for name, _ in model.named_parameters()} == {"joint", "picture"}
    with pytest.raises(UserError, match="no head for words; it predicts picture"):
        model(small_noised(), {"words": Dense()})


def test_a_grid_refuses_a_readout_for_tokens():
    with pytest.raises(TypeError, match="head of picture cannot give TokenLosses"):
        small_model()(small_noised(), {"picture": losses()})


def of_torch(name: str) -> bool:
    """Whether torch gives its containers an attribute of that name; libraries that were imported give them more."""
    owner = getattr(getattr(nn.ModuleDict, name, None), "__module__", None)
    return owner is None or owner.startswith(("torch", "collections", "typing"))


def test_every_attribute_of_a_container_of_modalities_is_a_reserved_name():
    model = small_model(VARIANTS["paper"])
    containers = [module for module in model.modules() if isinstance(module, nn.ModuleDict)]
    taken = {name for container in containers for name in dir(container) if name not in container and of_torch(name)}
    assert len(containers) > 3
    assert {name for name in taken if re.fullmatch("[a-z][a-z0-9_]*", name)} <= RESERVED_NAMES


def test_every_part_that_is_no_modality_is_a_reserved_name():
    alignment = Alignment(modality="picture", block=0, features=4)
    config = small_config(hidden_projections={"words": 4})
    parts = {part_of(name) for name, _ in build_model(config, list(config.modalities), alignment).named_parameters()}
    assert parts - set(config.modalities) == {"joint", "alignment", "hidden_projections"} <= RESERVED_NAMES


def test_a_head_for_an_unknown_modality_is_refused():
    with pytest.raises(ConfigError, match="predicted names sound"):
        build_model(small_config(), ["sound"])


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_a_model_without_learned_positions_takes_grids_of_other_sizes(positions):
    """Turned by a quarter, a grid has other positions, so another output; its own size is not remembered."""
    model = small_model(small_config(("rope", positions)))
    noised = small_noised()
    readout = {"picture": Dense(), "words": Dense()}
    turned = noised._replace(states={**noised.states, "picture": torch.randn(3, 3, 8, 2)})
    first, other, again = (model(given, readout) for given in (noised, turned, noised))
    assert other["picture"].shape == (3, 3, 8, 2)
    assert torch.equal(first["picture"], again["picture"])
    square = noised._replace(states={**noised.states, "picture": noised.states["picture"].reshape(3, 3, 6, 4)})
    assert not torch.allclose(model(square, readout)["words"], first["words"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_readout_of_some_samples_gives_there_what_the_whole_one_gives(variant):
    model, noised = small_model(VARIANTS[variant]), small_noised()
    whole = model(noised, BOTH)
    some = {"words": torch.tensor([0, 2]), "picture": torch.tensor([1])}
    found = model(noised, {name: Dense(samples) for name, samples in some.items()})
    for name, samples in some.items():
        assert found[name].shape == whole[name].shape
        torch.testing.assert_close(found[name][samples], whole[name][samples])


def test_the_last_joint_block_finishes_no_modality_that_is_not_read():
    model = small_model(small_config(joint_depth=2))
    run = modules_run(model, {"picture": Dense()})
    assert "joint.0.parts.words.mlp" in run
    assert "joint.1.parts.words.projection" in run
    assert not {"joint.1.parts.words.output", "joint.1.parts.words.mlp"} & set(run)
