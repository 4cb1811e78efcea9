"""What autograd keeps of a micro-batch, counted without torch: bytes of the reference kernels, each layer's own.

A comment names the tensors that the line after it counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from megadiff.config.parameters import (
    ALIGNMENT_HIDDEN,
    BLOCK_SLOTS,
    TIME_FEATURES,
    Layer,
    flows,
    is_trained,
    mlp_hidden,
    patch_numbers,
    reached,
    token_count,
)
from megadiff.config.schema import GridSpace, Model, Stage

Precision = Literal["bf16", "fp32"]
WIDE = 4
"""Bytes of a float32 number, in which norms, rotations and heads compute."""


def number_bytes(precision: Precision) -> int:
    return 2 if precision == "bf16" else WIDE


def activations(model: Model, stage: Stage, layers: Sequence[Layer], tensor: int, precision: Precision) -> list[int]:
    """Bytes by layer that autograd keeps from one micro-batch's forward to its backward, at most: if every token is there and
    scored. Under activation checkpointing a block keeps its input alone; `recomputed` has the rest.

    Args:
        layers: of this model and stage.
    """
    found = whole(model, stage, layers, tensor, precision)
    if not stage.activation_checkpointing:
        return found
    inputs = [_input(model, stage, layer, precision) for layer in layers]
    return [kept if before is None else min(before, kept) for kept, before in zip(found, inputs, strict=True)]


def recomputed(model: Model, stage: Stage, layers: Sequence[Layer], tensor: int, precision: Precision) -> list[int]:
    """Bytes by layer that exist again while the backward pass is in it: of blocks under activation checkpointing, else 0."""
    if not stage.activation_checkpointing:
        return [0] * len(layers)
    found = whole(model, stage, layers, tensor, precision)
    return [kept if layer.block else 0 for kept, layer in zip(found, layers, strict=True)]


def whole(model: Model, stage: Stage, layers: Sequence[Layer], tensor: int, precision: Precision) -> list[int]:
    """Bytes by layer without activation checkpointing."""
    count, needs, samples = _Bytes(model, stage, tensor, precision), flows(model, layers), stage.batch.micro_batch
    return [samples * count.of(layer, needed) if layer.runs else 0 for layer, needed in zip(layers, needs, strict=True)]


def leads_on(layer: Layer, name: str, model: Model, stage: Stage) -> bool:
    """Whether a block computes a modality's tokens after attention; the last joint block does so only for a loss."""
    return layer.name != f"joint {model.joint_depth - 1}" or name in reached(model, stage)


def _input(model: Model, stage: Stage, layer: Layer, precision: Precision) -> int | None:
    """Bytes of a block's tokens; None for other layers."""
    if not layer.block:
        return None
    tokens = sum(token_count(model.modalities[name].space) * model.width_of(name) for name in layer.modalities)
    return stage.batch.micro_batch * number_bytes(precision) * tokens


class _Bytes:
    """Bytes of one sample."""

    def __init__(self, model: Model, stage: Stage, tensor: int, precision: Precision) -> None:
        self.model, self.stage, self.tensor, self.size = model, stage, tensor, number_bytes(precision)

    def of(self, layer: Layer, needs: Mapping[str, bool]) -> int:
        """Args: needs: by modality, whether the tokens that the layer takes need a gradient."""
        model, trained = self.model, layer.trained.total > 0
        if layer.block:
            kept = [name for name in layer.modalities if trained or needs[name]]
            joint = len(layer.modalities) > 1
            return sum(self.block(name, trained, needs[name], joint, leads_on(layer, name, model, self.stage)) for name in kept)
        if layer.name == "embed":
            return sum(self.embedding(name) for name in model.modalities) if trained else 0
        if layer.name == "heads":
            read = [name for name, modality in self.stage.modalities.items() if modality.has_loss]
            return sum(self.head(name, needs[name]) for name in read if needs[name] or is_trained(name, self.stage))
        if layer.name == "alignment":
            return self.alignment(trained or any(needs.values()))
        # A norm keeps what it divides, and the quotients.
        kept = [name for name in layer.modalities if needs[name] or trained]
        return sum(WIDE * self.count(name) * (needs[name] + trained) * model.width_of(name) for name in kept)

    def count(self, name: str) -> int:
        return token_count(self.model.modalities[name].space)

    def alignment(self, flowing: bool) -> int:
        rule = self.stage.alignment
        if rule is None or not flowing:
            return 0
        hidden = ALIGNMENT_HIDDEN * self.model.width_of(rule.modality)
        # Two hidden layers before and after their activation; the projection and its target.
        return self.count(rule.modality) * (4 * hidden * self.size + 2 * rule.features * WIDE)

    def embedding(self, name: str) -> int:
        space, width = self.model.modalities[name].space, self.model.width_of(name)
        # The clock's sinusoids; before and after SiLU; conditioning, which all layers share.
        time = (TIME_FEATURES + 3 * width) * self.size
        return time + self.count(name) * (patch_numbers(space) * self.size if isinstance(space, GridSpace) else 8)

    def block(self, name: str, trained: bool, inputs: bool, joint: bool, leads: bool) -> int:
        """Args: leads: its tokens are computed after attention."""
        model, size = self.model, self.size
        count, width, own = self.count(name), model.width_of(name), int(trained)
        heads, hidden = model.heads // self.tensor, mlp_hidden(model, name) // self.tensor
        inner = heads * model.head_dim
        after = count * leads
        # SiLU of the conditioning, the modulation's vectors, 1 + scale of two norms.
        vectors = (1 + BLOCK_SLOTS + (1 + leads if model.block_modulation == "one_plus_scale" else 0)) * width
        # Of two norms: the quotient; of the second the input, and of the first if anything before is trained.
        normed = ((1 + inputs) * count + 2 * after) * (width * size) + 2 * (inputs * count + after) * WIDE
        # What the gates multiply.
        gated = 2 * after * width
        # What linear maps take: projection, first of the MLP, second of the MLP.
        linear = own * (count * width + after * (width + hidden))
        # Before the activation; of SwiGLU its gate and value, and SiLU of the gate.
        active = after * hidden * (3 if model.mlp == "swiglu" else 1)
        # Operands and the result; in a joint block that is copied for the output.
        attended = ((self.operands(name, joint) + 1) * count + (joint and own) * after) * inner
        numbers = vectors + gated + linear + active + attended
        return size * numbers + normed + WIDE * heads * count + self.normalised(count, heads, own)

    def operands(self, name: str, joint: bool) -> int:
        """Queries, keys and values. A stream that is alone has its values read from the projection, which is kept for them."""
        normed, rotated = self.model.qk_norm, self.model.modalities[name].positions == "rope"
        if joint or not (normed or rotated):
            return 3
        return 2 if normed and self.size == WIDE else 2 + 3  # `normalised` has the projection

    def normalised(self, count: int, heads: int, trained: int) -> int:
        """Of queries and keys: what the norm divides (in float32 the projection itself), norms, and the quotients."""
        inner = heads * self.model.head_dim
        if not self.model.qk_norm:
            return 0
        divided = 3 if self.size == WIDE else 2
        return WIDE * count * (divided * inner + 4 * heads + 2 * trained * inner)

    def head(self, name: str, inputs: bool) -> int:
        model, size = self.model, self.size
        space, width = model.modalities[name].space, model.width_of(name)
        count = self.count(name)
        # SiLU of the conditioning, and 1 + scale, or shift and scale; the norm's input, its quotient; the linear map's input.
        vectors = (2 if model.head_modulation == "one_plus_scale" else 3) * width
        kept = size * (vectors + (1 + inputs) * count * width) + 2 * inputs * count * WIDE + WIDE * count * width
        if isinstance(space, GridSpace):
            return kept + WIDE * count * patch_numbers(space)  # the residual
        # Log-probabilities; a row's index, its target, and two weights.
        return kept + count * (WIDE * space.vocabulary // self.tensor + 2 * 8 + 2 * WIDE)
