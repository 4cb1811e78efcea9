"""The released weights under our names: the same network, no bit lost, and what does not fit refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_model, save_file

from megadiff.config.errors import UserError
from megadiff.config.schema import Model
from megadiff.models.mmdit import build_model
from megadiff.types import Dense, Noised
from megadiff.weights.official import from_official, predicted_of, to_official
from megadiff.weights.official_config import config_from_model, model_from_config
from tests.ranks import ROOT
from tests.weights.released import (
    PAPER,
    PROJECTING,
    SMALL,
    UNEQUAL,
    as_modules,
    released_shapes,
    released_state,
    under_one_name,
)


def equal(first, second):
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


# ----------------------------------------------------------------------------------------------------- the same network


def apply(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def halves(state, name, condition):
    return apply(state, name, F.silu(condition))[:, None].chunk(2, -1)


def unit(x, gain):
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12) * x.shape[-1] ** 0.5 * gain


def clock(state, name, value):
    angles = value[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    features = torch.cat([angles.cos(), angles.sin()], -1)
    return apply(state, f"{name}_time_encoder.mlp.2", F.silu(apply(state, f"{name}_time_encoder.mlp.0", features)))


def block(state, prefix, config, tokens, conditions, visible):
    heads, size = config["heads"], config["dim_head"]
    triples = []
    for number, (x, condition) in enumerate(zip(tokens, conditions, strict=True)):
        gamma, beta = halves(state, f"{prefix}.attn_layernorms.{number}.to_cond.2", condition)
        normal = F.layer_norm(x, x.shape[-1:], eps=1e-5) * gamma + beta
        split = apply(state, f"{prefix}.joint_attn.to_qkv.{number}", normal).reshape(*x.shape[:2], 3, heads, size)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        gains = [state[f"{prefix}.joint_attn.{kind}_rmsnorms.{number}.gamma"] for kind in "qk"]
        triples.append((unit(query, gains[0]), unit(key, gains[1]), value))
    query, key, value = (torch.cat(parts, 2) for parts in zip(*triples, strict=True))
    scores = query @ key.transpose(-1, -2) / size**0.5
    attended = scores.masked_fill(~torch.cat(visible, 1)[:, None, None], -torch.inf).softmax(-1) @ value
    pieces = attended.transpose(1, 2).flatten(2).split([x.shape[1] for x in tokens], 1)
    result = []
    for number, (x, condition, piece) in enumerate(zip(tokens, conditions, pieces, strict=True)):
        gate, mlp_gate = halves(state, f"{prefix}.cond_dict.cond_linear_{number}", condition)
        x = x + apply(state, f"{prefix}.joint_attn.to_out.{number}", piece) * gate
        gamma, beta = halves(state, f"{prefix}.ff_layernorms.{number}.to_cond.2", condition)
        hidden = F.layer_norm(x, x.shape[-1:], eps=1e-5) * gamma + beta
        hidden = F.gelu(apply(state, f"{prefix}.feedforwards.{number}.ff.0.0", hidden))
        result.append(x + apply(state, f"{prefix}.feedforwards.{number}.ff.2", hidden) * mlp_gate)
    return result


def released_outputs(state, config, ids, time, image, deviation):
    """By modality: log-probabilities with the mask's entry last [B, L, V + 1], and the noise estimate [B, C, H, W]."""
    patch, side = config["patch_size"], config["img_resolution"] // config["patch_size"]
    embedded = F.conv2d(image, state["image_embedder.proj.weight"], state["image_embedder.proj.bias"], stride=patch)
    tokens = [
        state["text_embedder.weight"][ids] + state["text_pos_embed.weight"],
        embedded.flatten(2).transpose(1, 2) + state["pos_embed"],
    ]
    conditions = [clock(state, "text", time), clock(state, "image", deviation)]
    visible = [ids != config["vocab_size"] - 2, torch.ones(len(ids), side**2, dtype=torch.bool)]
    for index in range(config["depth"]):
        tokens = block(state, f"joint_embedding.blocks.{index}", config, tokens, conditions, visible)
    outputs = {}
    for number, name in enumerate(("text", "image")):
        x = unit(tokens[number], state[f"joint_embedding.norms.{number}.g"])
        if not config[f"{name}_depth"]:
            continue
        for index in range(config[f"{name}_depth"]):
            (x,) = block(state, f"{name}_dit.blocks.{index}", config, [x], [conditions[number]], [visible[number]])
        x = unit(x, state[f"{name}_dit.norms.0.g"])
        shift, scale = halves(state, f"{name}_final_layer.adaLN_modulation.2", conditions[number])
        hidden = F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale + shift
        outputs[name] = apply(state, f"{name}_final_layer.linear", hidden)
    if "text" in outputs:
        constant = torch.log(torch.expm1(-torch.log(1 - (1 - 1e-5) * time)))[:, None, None]
        logits = outputs["text"]
        outputs["text"] = torch.cat([logits[..., :-1].log_softmax(-1), logits[..., -1:]], -1) - constant
    patches = outputs["image"].reshape(len(ids), side, side, patch, patch, config["img_channels"])
    outputs["image"] = patches.permute(0, 5, 1, 3, 2, 4).reshape(image.shape)
    return outputs


@pytest.mark.parametrize(
    ("changes", "seed"), [({}, 0), ({}, 1), ({"text_depth": 0}, 2), (UNEQUAL, 3), ({**UNEQUAL, **PROJECTING}, 4)]
)
def test_the_imported_network_gives_the_released_outputs(changes, seed):
    config = {**SMALL, **changes}
    vocabulary, state = config["vocab_size"] - 1, released_state(config, seed)
    ids = torch.randint(vocabulary + 1, (6, 5))
    ids[0, 3:] = vocabulary - 1  # pads, which are hidden; and a caption that is all masks, which are not
    ids[1] = vocabulary
    time, deviation, image = torch.tensor([0.01, 0.2, 0.4, 0.6, 0.8, 0.99]), torch.rand(6), torch.randn(6, 3, 6, 6)
    model = model_from_config(config)
    module = build_model(model, predicted_of(state))
    module.load_state_dict(from_official(state, model))
    hidden = []
    if "text" in module.predicted:
        head = module.heads["text"]
        head.register_forward_hook(lambda _, given, __: hidden.append(head.normalised(*given[:2])))
    clocks, visible = {"text": time, "image": deviation}, {"text": ids != vocabulary - 1, "image": None}
    with torch.no_grad():
        found = module(Noised({"text": ids, "image": image}, clocks, visible), {name: Dense() for name in module.predicted})
        wanted = released_outputs(state, config, ids, time, image, deviation)
    assert set(found) == set(wanted)
    torch.testing.assert_close(found["image"], wanted["image"], rtol=1e-5, atol=1e-5)
    if "text" in found:
        torch.testing.assert_close(
            found["text"].log_softmax(-1), wanted["text"][..., :-1].log_softmax(-1), rtol=1e-5, atol=1e-5
        )
        mask = F.linear(hidden[0], head.mask_weight, head.mask_bias).detach()
        constant = found["text"].log_softmax(-1)[..., :1] - wanted["text"][..., :1]
        torch.testing.assert_close(mask, wanted["text"][..., -1:] + constant, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text_depth": 0},
        {"image_depth": 0},
        {"qk_rmsnorm": False},
        {"patch_size": 1},
        UNEQUAL,
        PROJECTING,
        {**UNEQUAL, **PROJECTING, "text_depth": 0},
    ],
)
def test_there_and_back_no_bit_changes(changes):
    config = {**SMALL, **changes}
    theirs = released_state(config)
    if config["qk_rmsnorm"] is False:
        theirs = {name: tensor for name, tensor in theirs.items() if "rmsnorms" not in name}
    model = model_from_config(config)
    ours = from_official(theirs, model)
    module = build_model(model, predicted_of(theirs))
    module.load_state_dict(ours)
    back = to_official(ours, model)
    given, made = theirs.pop("pos_embed"), back.pop("pos_embed")
    torch.testing.assert_close(given, made, rtol=0, atol=1e-6)
    assert equal(back, under_one_name(theirs))
    assert equal(from_official({**back, "pos_embed": given}, model), ours)


def test_from_our_side_and_back_no_bit_changes():
    model = model_from_config(SMALL)
    ours = {name: torch.randn_like(p) for name, p in build_model(model, ["text", "image"]).named_parameters()}
    assert equal(from_official(to_official(ours, model), model), ours)


def test_a_class_with_the_released_names_loads_an_export_strictly(tmp_path):
    model, state = model_from_config(SMALL), released_state()
    save_file({name: t.contiguous() for name, t in to_official(from_official(state, model), model).items()}, tmp_path / "w")
    network = as_modules(state)
    assert set(network.state_dict()) == set(state)
    load_model(network, tmp_path / "w", strict=True)
    assert equal({**network.state_dict(), "pos_embed": state["pos_embed"]}, state)


def test_no_exported_tensors_share_memory():
    model = model_from_config(SMALL)
    made = to_official(from_official(released_state(), model), model)
    assert len({tensor.data_ptr() for tensor in made.values()}) == len(made)


def test_the_paper_model_has_the_released_names_and_shapes():
    model = Model.model_validate(yaml.safe_load((ROOT / "configs/model/paper.yaml").read_text())["model"])
    with torch.device("meta"):
        ours = {name: p.detach() for name, p in build_model(model, ["text", "image"]).named_parameters()}
    made = to_official(ours, model)
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == under_one_name(released_shapes(PAPER))
    once = [tensor for name, tensor in made.items() if name != "pos_embed"]
    assert sum(tensor.numel() for tensor in once) == sum(tensor.numel() for tensor in ours.values()) == 578_329_873


@pytest.mark.slow
def test_no_bit_changes_at_full_size():
    theirs = {name: torch.randn(shape, dtype=torch.float16) for name, shape in released_shapes(PAPER).items()}
    theirs = {name: tensor for name, tensor in theirs.items() if "to_post_branch_gammas" not in name}
    model = model_from_config(PAPER)
    theirs["pos_embed"] = to_official(_zeros(model), model)["pos_embed"]
    back = to_official(from_official(theirs, model), model)
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())


def _zeros(model):
    with torch.device("meta"):
        return {name: p.detach() for name, p in build_model(model, ["text", "image"]).named_parameters()}


# -------------------------------------------------------------------------------------------------------------- refusal


def broken(**changes):
    """`changes` by name: None removes the tensor."""
    state = released_state()
    for name, tensor in changes.items():
        state.pop(name)
        if tensor is not None:
            state[name] = tensor
    return state


GATES = "joint_embedding.blocks.1.cond_dict.to_post_branch_gammas_0.2.bias"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (broken(**{"image_dit.norms.0.g": None}), "missing: image_dit.norms.0.g$"),
        ({**broken(), "text_hidden_projection.0.weight": torch.zeros(1)}, "unknown: text_hidden_projection.0.weight$"),
        (broken(**{"text_pos_embed.weight": torch.zeros(4, 16)}), r"text_pos_embed.weight is \[4, 16\], not \[5, 16\]"),
        (broken(pos_embed=torch.zeros(1, 9, 16)), "pos_embed differs by 1 from"),
        (broken(**{GATES: torch.zeros(32)}), "are one tensor in the released network"),
        ({}, "missing: text_embedder.weight, .* and 67 more"),
    ],
)
def test_what_does_not_fit_is_named(state, message):
    with pytest.raises(UserError, match=message) as caught:
        from_official(state, model_from_config(SMALL))
    assert "\n" not in str(caught.value)


def test_one_of_a_tensors_two_names_is_enough():
    model, state = model_from_config(SMALL), released_state()
    ours = from_official(state, model)
    for pattern in ("cond_linear", "to_post_branch_gammas"):
        half = {name: tensor for name, tensor in state.items() if pattern not in name}
        assert equal(from_official(half, model), ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept(dtype):
    state = {name: tensor.to(dtype) for name, tensor in released_state().items()}
    assert {tensor.dtype for tensor in from_official(state, model_from_config(SMALL)).values()} == {dtype}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_scale": 1000.0}, r"model.time_scale is 1000.0; the released network has 1.0"),
        ({"block_modulation": "one_plus_scale"}, "model.block_modulation is one_plus_scale"),
        ({"mlp": "swiglu"}, "model.mlp is swiglu"),
        ({"hidden_projections": {"text": 768}}, "model.hidden_projections.image is None; the released network has 1024"),
        ({"hidden_projections": {"text": 8, "image": 1024}}, "model.hidden_projections.text is 8"),
        ({"gates": "zero"}, None),
    ],
)
def test_another_network_is_refused_by_its_first_differing_setting(changes, message):
    model = model_from_config(SMALL).model_copy(update=changes)
    if message is None:
        config_from_model(model)
        return
    with pytest.raises(UserError, match=message):
        config_from_model(model)


def test_another_set_of_modalities_is_refused():
    tree = yaml.safe_load((ROOT / "configs/model/emoji32.yaml").read_text())["model"]
    model = Model.model_validate({**tree, "modalities": {"image": tree["modalities"]["image"]}})
    with pytest.raises(UserError, match=r"model.modalities is image \(grid\)"):
        config_from_model(model)
