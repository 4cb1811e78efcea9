"""Random weights with the released network's names and shapes."""

from __future__ import annotations

import math

import torch

PAPER = {
    "img_resolution": 32,
    "patch_size": 2,
    "img_channels": 4,
    "vocab_size": 49409,
    "context_len": 120,
    "depth": 8,
    "text_depth": 6,
    "image_depth": 6,
    "dim_modalities": [1024, 1024],
    "dim_conds": [1024, 1024],
    "dim_joint_attn": 1024,
    "qk_rmsnorm": True,
    "flash_attn": True,
}

SMALL = {
    **PAPER,
    "img_resolution": 6,
    "img_channels": 3,
    "vocab_size": 14,
    "context_len": 5,
    "depth": 2,
    "text_depth": 1,
    "image_depth": 2,
    "dim_modalities": [16, 16],
    "dim_conds": [16, 16],
    "dim_joint_attn": 16,
    "heads": 2,
    "dim_head": 12,
}

PROJECTING = {"project_hidden": True}

UNEQUAL = {"dim_modalities": [12, 20], "dim_conds": [12, 20], "dim_joint_attn": 12}


def linear(shapes, name, outputs, inputs, bias=True):
    shapes[f"{name}.weight"] = (outputs, inputs)
    if bias:
        shapes[f"{name}.bias"] = (outputs,)


def released_shapes(config):
    """What the released network holds, from its description alone."""
    widths, vocabulary = config["dim_modalities"], config["vocab_size"]
    text_width, image_width = widths
    heads, head_dim = config.get("heads", 8), config.get("dim_head", 64)
    patch, channels, side = config["patch_size"], config["img_channels"], config["img_resolution"]
    shapes = {
        "text_embedder.weight": (vocabulary, text_width),
        "text_pos_embed.weight": (config["context_len"], text_width),
        "image_embedder.proj.weight": (image_width, channels, patch, patch),
        "image_embedder.proj.bias": (image_width,),
        "pos_embed": (1, (side // patch) ** 2, image_width),
    }
    for name, width in zip(("text", "image"), widths, strict=True):
        linear(shapes, f"{name}_time_encoder.mlp.0", width, 256)
        linear(shapes, f"{name}_time_encoder.mlp.2", width, width)
    stacks = [("joint_embedding", config["depth"], widths)]
    for name, outputs, width in (("text", vocabulary, text_width), ("image", channels * patch * patch, image_width)):
        if config[f"{name}_depth"]:
            stacks.append((f"{name}_dit", config[f"{name}_depth"], [width]))
            linear(shapes, f"{name}_final_layer.linear", outputs, width)
            linear(shapes, f"{name}_final_layer.adaLN_modulation.2", 2 * width, width)
            if config.get("project_hidden"):
                linear(shapes, f"{name}_hidden_projection.0", width, width)
                linear(shapes, f"{name}_hidden_projection.2", {"text": 768, "image": 1024}[name], width)
    for stack, depth, stack_widths in stacks:
        for number, width in enumerate(stack_widths):
            shapes[f"{stack}.norms.{number}.g"] = (width,)
            for index in range(depth):
                block = f"{stack}.blocks.{index}"
                conditioned = (f"attn_layernorms.{number}.to_cond.2", f"ff_layernorms.{number}.to_cond.2")
                gates = (f"cond_dict.cond_linear_{number}", f"cond_dict.to_post_branch_gammas_{number}.2")
                for name in (*conditioned, *gates):
                    linear(shapes, f"{block}.{name}", 2 * width, width)
                linear(shapes, f"{block}.joint_attn.to_qkv.{number}", 3 * heads * head_dim, width, bias=False)
                linear(shapes, f"{block}.joint_attn.to_out.{number}", width, heads * head_dim, bias=False)
                for kind in "qk":
                    shapes[f"{block}.joint_attn.{kind}_rmsnorms.{number}.gamma"] = (heads, 1, head_dim)
                linear(shapes, f"{block}.feedforwards.{number}.ff.0.0", 4 * width, width)
                linear(shapes, f"{block}.feedforwards.{number}.ff.2", width, 4 * width)
    return shapes


def under_one_name(released):
    """Without the second names of shared tensors, as safetensors writes a network."""
    return {name: value for name, value in released.items() if "to_post_branch_gammas" not in name}


def as_modules(state):
    """A network with the released names, in which the gates' linear map is one module under two names."""
    network = torch.nn.Module()
    for name, tensor in under_one_name(state).items():
        *path, last = name.split(".")
        module = network
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, torch.nn.Parameter(torch.zeros_like(tensor)))
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if name.startswith("cond_linear_"):
                branch = torch.nn.Module()
                branch.add_module("2", child)
                module.add_module(name.replace("cond_linear", "to_post_branch_gammas"), branch)
    return network


def released_state(config=None, seed=0):
    """Random tensors; the fixed positions as described, and the repeated ones twice."""
    generator = torch.Generator().manual_seed(seed)
    config = config or SMALL
    state = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in released_shapes(config).items()}
    for name in state:
        if "to_post_branch_gammas" in name:
            state[name] = state[name.replace("to_post_branch_gammas", "cond_linear").replace(".2.", ".")].clone()
    side, width = config["img_resolution"] // config["patch_size"], config["dim_modalities"][1]
    for token in range(side**2):
        for k in range(width // 4):
            rate = 10000 ** (-k / (width // 4))
            for half, index in enumerate((token % side, token // side)):
                place = half * width // 2 + k
                state["pos_embed"][0, token, place] = math.sin(index * rate)
                state["pos_embed"][0, token, place + width // 4] = math.cos(index * rate)
    return state
