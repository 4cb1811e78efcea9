"""What a run costs, by pure arithmetic and without torch: tokens, FLOPs, the batch equation, the learning rate. The one
owner of these formulas; parameters are counted in parameters.py, bytes in footprint.py.

Legend: D width of a modality's tokens, I = heads x head_dim (the attention's inner width), S tokens of one modality, N
tokens of all modalities.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from megadiff.config import checks
from megadiff.config.parameters import (
    BLOCK_SLOTS,
    HEAD_SLOTS,
    TIME_FEATURES,
    alignment_layers,
    head_outputs,
    mlp_hidden,
    patch_numbers,
    predicted,
    scored,
    token_count,
    up_outputs,
)
from megadiff.config.schema import Alignment, GridSpace, Model, Optimizer, Run, Stage, StageModality


def tokens(model: Model) -> dict[str, int]:
    """Tokens per sample, per modality."""
    return {name: token_count(modality.space) for name, modality in model.modalities.items()}


# --------------------------------------------------------------------------------------------------------------- FLOPs


def flops_per_sample(model: Model, stage: Stage) -> int:
    """Model FLOPs of training on one sample: forward and backward, a multiply-add counted as two.

    It counts the products of linear maps (2 n x inputs x outputs forward for n tokens) and of attention (4 N^2 I forward).
    Backward, a linear map costs its forward once if its weight is trained, and once more if anything before it is trained (its
    input then needs a gradient); attention costs its forward twice in the latter case. So trained parts cost 3 x forward,
    frozen ones with trained parts before them 2 x, frozen ones before all trained parts 1 x.
    Towers and heads run for modalities with a loss weight above 0. A token head counts the expected share of scored positions:
    1 for the plain loss, 1/2 for the NELBO (times are uniform), less the samples in which the modality is only a condition.
    Recomputation under activation checkpointing is not counted, nor are norms, softmax, activations and lookups.
    """
    return round(sum(layer_flops(model, stage)))


def layer_flops(model: Model, stage: Stage) -> list[float]:
    """The FLOPs of `flops_per_sample` by layer, in the order of `MMDiT.layers()`; 0 for layers that training does not run."""
    shares = {name: _scored_share(model, name, modality) for name, modality in stage.modalities.items() if modality.has_loss}
    trained = {part for part in ("joint", *scored(stage)) if part not in stage.freeze}
    trunk = _trunk_flops(model, shares, trained)
    if stage.alignment is not None:
        trunk.insert(stage.alignment.block + 1, _alignment_flops(model, stage, stage.alignment))
    norm = [0.0] if model.trunk_norm else []
    towers = [
        flops
        for name in model.modalities
        if name in predicted(stage) and model.modalities[name].tower_depth
        for flops in [*_tower_flops(model, name, shares, trained), *norm]
    ]
    return [_embed_flops(model, shares, trained), *trunk, *norm, *towers, _heads_flops(model, shares, trained)]


def _alignment_flops(model: Model, stage: Stage, alignment: Alignment) -> float:
    """FLOPs of the projection alone: the blocks before it run anyway."""
    count = token_count(model.modalities[alignment.modality].space)
    own, inputs = "alignment" not in stage.freeze, "joint" not in stage.freeze
    layers = alignment_layers(model, alignment)
    return sum(_matmul(count, *shape, own, inputs or (own and index > 0)) for index, shape in enumerate(layers))


def _scored_share(model: Model, name: str, modality: StageModality) -> float:
    process = model.modalities[name].process
    if process.kind == "gaussian":
        return 1.0
    share = 0.5 if process.kind == "masked" and process.loss == "nelbo" else 1.0
    return share * (1 - modality.conditioning.clean - modality.conditioning.absent)


def _embed_flops(model: Model, shares: Mapping[str, float], trained: Collection[str]) -> float:
    leads = {name: model.joint_depth > 0 or name in shares for name in model.modalities}
    return sum(_embedding_flops(model, name, "joint" in trained and leads[name]) for name in model.modalities)


def _trunk_flops(model: Model, shares: Mapping[str, float], trained: Collection[str]) -> list[float]:
    """Of each joint block."""
    counts, joint = tokens(model), "joint" in trained
    attention = _attention_flops(model, sum(counts.values()), inputs=joint)
    blocks = []
    for index in range(model.joint_depth):
        last = index == model.joint_depth - 1
        blocks.append(float(attention))
        for name, count in counts.items():
            # After the last joint attention, an unread modality is not computed.
            read = not last or name in shares
            blocks[-1] += _block_flops(model, name, count, weights=joint, inputs=joint, read=read)
    return blocks


def _tower_flops(model: Model, name: str, shares: Mapping[str, float], trained: Collection[str]) -> list[float]:
    """Of each block of a modality's tower."""
    count, joint, own = tokens(model)[name], "joint" in trained, name in trained
    linear = _block_flops(model, name, count, weights=own, inputs=joint)
    flops = float(linear + _attention_flops(model, count, inputs=joint or own)) if name in shares else 0.0
    return [flops] * model.modalities[name].tower_depth


def _heads_flops(model: Model, shares: Mapping[str, float], trained: Collection[str]) -> float:
    total, counts, joint = 0.0, tokens(model), "joint" in trained
    for name, share in shares.items():
        own, width = name in trained, model.width_of(name)
        total += _matmul(1, width, HEAD_SLOTS * width, own, joint)
        total += share * _matmul(counts[name], width, head_outputs(model.modalities[name].space), own, joint or own)
    return total


def _matmul(rows: int, inputs: int, outputs: int, weights: bool, gradient: bool) -> int:
    """A linear map; `weights`: it is trained; `gradient`: its input needs a gradient."""
    return 2 * rows * inputs * outputs * (1 + weights + gradient)


def _embedding_flops(model: Model, name: str, trained: bool) -> int:
    space, width = model.modalities[name].space, model.width_of(name)
    time = _matmul(1, TIME_FEATURES, width, trained, False) + _matmul(1, width, width, trained, trained)
    if isinstance(space, GridSpace):
        return time + _matmul(token_count(space), patch_numbers(space), width, trained, False)
    return time


def _block_flops(model: Model, name: str, count: int, *, weights: bool, inputs: bool, read: bool = True) -> int:
    """One modality's linear maps in a block.

    Args:
        inputs: its tokens and conditioning need a gradient.
        read: whether its tokens are computed after attention.
    """
    width, inner = model.width_of(name), model.heads * model.head_dim
    within = inputs or weights  # the modulation, first of all, is trained or passes a gradient on: so does all after it
    after = count if read else 0
    return (
        _matmul(1, width, BLOCK_SLOTS * width, weights, inputs)
        + _matmul(count, width, 3 * inner, weights, within)
        + _matmul(after, inner, width, weights, within)
        + _matmul(after, width, up_outputs(model, name), weights, within)
        + _matmul(after, mlp_hidden(model, name), width, weights, within)
    )


def _attention_flops(model: Model, count: int, *, inputs: bool) -> int:
    return 4 * count**2 * model.heads * model.head_dim * (3 if inputs else 1)


# --------------------------------------------------------------------------------------------------------------- batch


def accumulation(stage: Stage, data_ranks: int) -> int:
    """Micro-batches per rank and optimizer step: global_samples / (micro_batch x data ranks).

    Raises:
        ConfigError: it does not come out whole.
    """
    batch = stage.batch
    faults = checks.batch_over_ranks(batch.global_samples, batch.micro_batch, data_ranks)
    checks.require(f"stage {stage.name}: {fault}" for fault in faults)
    return batch.global_samples // (batch.micro_batch * data_ranks)


def lanes_per_rank(run: Run, data_ranks: int) -> int:
    """Lanes of the sample order that one rank owns.

    Raises:
        ConfigError: the lanes do not divide over the ranks.
    """
    checks.require(checks.lanes_over_ranks(run.data.lanes, data_ranks))
    return run.data.lanes // data_ranks


def learning_rate(config: Optimizer, step: int, total_steps: int) -> float:
    """The learning rate of the optimizer step with index `step` (0 is the first): linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    remaining = 1 - min(progress, 1.0)
    if config.schedule == "cosine":
        remaining = 0.5 * (1 - math.cos(math.pi * remaining))
    return config.learning_rate * (config.final_ratio + (1 - config.final_ratio) * remaining)
