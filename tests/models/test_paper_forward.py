"""The paper's network, restated plainly from its parameters: one joint block, a tower block each, the heads."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from megadiff.types import Dense
from tests.models.small import small_config, small_model, small_noised

WIDTH, HEADS, HEAD_DIM = 16, 2, 12


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)


def unit(x, size):
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12) * math.sqrt(size)


def normal(x, eps):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()


def conditioning(p, name, clock):
    k = torch.arange(128)
    angles = clock[:, None] * torch.exp(-math.log(10000) * k / 128)
    features = torch.cat([angles.cos(), angles.sin()], -1)
    return linear(p, f"embed.clocks.{name}.down", F.silu(linear(p, f"embed.clocks.{name}.up", features)))


def block(p, prefix, tokens, conditions, visible):
    parts, queries, keys, values = {}, [], [], []
    for name, x in tokens.items():
        parts[name] = linear(p, f"{prefix}.parts.{name}.modulation", F.silu(conditions[name]))[:, None].split(WIDTH, -1)
        shift, scale = parts[name][:2]
        qkv = linear(p, f"{prefix}.parts.{name}.projection.linear", normal(x, 1e-5) * (1 + scale) + shift)
        query, key, value = (part.reshape(*x.shape[:2], HEADS, HEAD_DIM) for part in qkv.split(HEADS * HEAD_DIM, -1))
        queries.append(unit(query, HEAD_DIM) * p[f"{prefix}.parts.{name}.projection.query_gain"])
        keys.append(unit(key, HEAD_DIM) * p[f"{prefix}.parts.{name}.projection.key_gain"])
        values.append(value)
    scores = torch.einsum("bihd,bjhd->bhij", torch.cat(queries, 1), torch.cat(keys, 1)) / math.sqrt(HEAD_DIM)
    weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    attended = torch.einsum("bhij,bjhd->bihd", weights, torch.cat(values, 1)).flatten(2)
    result, start = {}, 0
    for name, x in tokens.items():
        _, _, gate, shift, scale, mlp_gate = parts[name]
        rows, start = attended[:, start : start + x.shape[1]], start + x.shape[1]
        x = x + gate * linear(p, f"{prefix}.parts.{name}.output", rows)
        hidden = F.gelu(linear(p, f"{prefix}.parts.{name}.mlp.up", normal(x, 1e-5) * (1 + scale) + shift))
        result[name] = x + mlp_gate * linear(p, f"{prefix}.parts.{name}.mlp.down", hidden)
    return result


def restated(p, noised):
    grid = noised.states["picture"]
    patches = grid.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    position = torch.zeros(6, WIDTH)
    for row in range(2):
        for column in range(3):
            for k in range(4):
                rate = 10000 ** (-k / 4)
                waves = [math.sin(column * rate), math.cos(column * rate), math.sin(row * rate), math.cos(row * rate)]
                position[row * 3 + column, [k, 4 + k, 8 + k, 12 + k]] = torch.tensor(waves)
    tokens = {
        "words": p["embed.states.words.weight"][noised.states["words"]] + p["embed.states.words.positions"],
        "picture": linear(p, "embed.states.picture.projection", patches) + position,
    }
    conditions = {name: conditioning(p, name, noised.clocks[name]) for name in tokens}
    everything = torch.ones(3, 6, dtype=torch.bool)
    tokens = block(p, "joint.0", tokens, conditions, torch.cat([noised.visible["words"], everything], 1))
    outputs = {}
    for name, seen in (("words", noised.visible["words"]), ("picture", everything)):
        x = unit(tokens[name], WIDTH) * p[f"trunk_norm.norms.{name}.gain"]
        x = block(p, f"towers.{name}.0", {name: x}, conditions, seen)[name]
        x = unit(x, WIDTH) * p[f"towers.{name}.1.norms.{name}.gain"]
        shift, scale = linear(p, f"heads.{name}.modulation", F.silu(conditions[name]))[:, None].split(WIDTH, -1)
        outputs[name] = linear(p, f"heads.{name}", normal(x, 1e-6) * scale + shift)
    picture = outputs["picture"].reshape(3, 2, 3, 2, 2, 3)  # sample, row, column, row in patch, column in patch, channel
    outputs["picture"] = picture.permute(0, 5, 1, 3, 2, 4).reshape(3, 3, 4, 6)
    return outputs


def test_the_paper_variant_equals_a_plain_restatement():
    config = small_config(
        ("learned", "sincos"),
        (1, 1),
        joint_depth=1,
        mlp="gelu",
        gates="one",
        trunk_norm=True,
        head_modulation="scale",
        time_scale=1.0,
    )
    model, noised = small_model(config), small_noised()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    wanted = restated(parameters, noised)
    for name, output in model(noised, {"words": Dense(), "picture": Dense()}).items():
        assert torch.allclose(output, wanted[name], atol=1e-4), name
