"""Blocks of the MMDiT. A joint block has several modalities, a tower's block one.

Legend: B samples, S tokens of one modality, R packed rows, D width. Source: Esser et al., "Scaling Rectified Flow Transformers"
(MMDiT), arXiv 2403.03206, figure 2b; adaLN-Zero from Peebles and Xie (DiT).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megadiff.config.parameters import mlp_hidden
from megadiff.config.schema import Model
from megadiff.kernels.gated_adaln import adaln, gated_adaln, spread
from megadiff.kernels.joint_attention import joint_attention
from megadiff.kernels.streams import Projected, Span
from megadiff.models.attention import Projection
from megadiff.models.layers import Linear, Mlp, Modulation, RmsNorm
from megadiff.types import Stream

BLOCK_NORM_EPS = 1e-5


class Modulated(NamedTuple):
    """The six adaLN vectors of a block, each [B, D], in the order in which the fused linear map holds them."""

    attention_shift: Tensor
    attention_scale: Tensor
    attention_gate: Tensor
    mlp_shift: Tensor
    mlp_scale: Tensor
    mlp_gate: Tensor


class BlockPart(nn.Module):
    """One modality's weights in a block. It owns modules, but no parameter, since its two halves are not a forward."""

    def __init__(self, config: Model, name: str) -> None:
        super().__init__()
        width, inner = config.width_of(name), config.heads * config.head_dim
        self.one_plus_scale = config.block_modulation == "one_plus_scale"
        ones = [] if config.gates == "zero" else ["attention_gate", "mlp_gate"]
        ones += [] if self.one_plus_scale else ["attention_scale", "mlp_scale"]
        slots = Modulated._fields
        self.modulation = Modulation(width, len(slots), ones=[slots.index(name) for name in ones])
        self.projection = Projection(config, name)
        self.output = Linear(inner, width, bias=config.attention_bias)
        self.mlp = Mlp(width, mlp_hidden(config, name), config.mlp)

    def project(self, tokens: Tensor, conditioning: Tensor, placing: Placing) -> tuple[Modulated, Projected]:
        """Before attention: the block's modulation, and attention's input."""
        vectors = Modulated(*self.modulation(conditioning))
        normal = adaln(
            tokens, vectors.attention_shift, vectors.attention_scale, placing.samples, BLOCK_NORM_EPS, self.one_plus_scale
        )
        return vectors, self.projection(normal, placing.span, placing.grid)

    def finish(self, tokens: Tensor, attended: Tensor, vectors: Modulated, placing: Placing) -> Tensor:
        """After attention: its gated residual, then that of the MLP."""
        change: Tensor = self.output(attended.flatten(-2))
        gates = vectors.attention_gate, vectors.mlp_shift, vectors.mlp_scale
        tokens, normal = gated_adaln(tokens, change, *gates, placing.samples, BLOCK_NORM_EPS, self.one_plus_scale)
        change = self.mlp(normal)
        return torch.addcmul(tokens, spread(vectors.mlp_gate, placing.samples), change)


class Placing(NamedTuple):
    """The layout of a modality's tokens.

    Attributes:
        span: for attention.
        samples: int64 [R], the sample of each packed row; None: dense.
        grid: rows and columns of patches, if it is a grid.
    """

    span: Span
    samples: Tensor | None
    grid: tuple[int, int] | None


class Given(NamedTuple):
    """What a block takes of a modality.

    Attributes:
        tokens: [B, S, D], or packed [R, D].
        conditioning: [B, D].
        placing: of the tokens.
    """

    tokens: Tensor
    conditioning: Tensor
    placing: Placing


def given_of(stream: Stream, name: str) -> Given:
    """What a block takes of a modality of a stream."""
    return Given(stream.tokens[name], _kept(stream, name, stream.conditioning[name]), placing_of(stream, name))


def placing_of(stream: Stream, name: str) -> Placing:
    """The layout of a modality's tokens in a stream."""
    rows, tokens = stream.rows.get(name), stream.tokens[name]
    lengths = stream.ragged[name].lengths if name in stream.ragged else None
    visible = stream.visible[name]
    visible = None if visible is None else _kept(stream, name, visible)
    if rows is None:
        span = Span(len(tokens), tokens.shape[1], None, lengths, visible)
    else:
        span = Span(len(rows.starts), stream.ragged[name].longest, rows.starts, lengths, visible)
    return Placing(span, None if rows is None else rows.samples, stream.grids.get(name))


def _kept(stream: Stream, name: str, values: Tensor) -> Tensor:
    """Of values [B, ...], those of the samples that a modality's tokens are left of."""
    samples = stream.kept(name)
    return values if samples is None else values[samples]


class Block(nn.Module):
    """Attention over the tokens of the block's modalities, then an MLP for each; it leaves other modalities unchanged.

    Attributes:
        last: whether it is the last joint block, after which tokens lead no further than `Stream.read` says.
    """

    def __init__(self, config: Model, names: Sequence[str], *, last: bool = False) -> None:
        super().__init__()
        self.last = last
        self.parts = nn.ModuleDict({name: BlockPart(config, name) for name in names})

    def forward(self, stream: Stream) -> Stream:
        given = {name: given_of(stream, name) for name in self.parts}
        read = stream.read if self.last and stream.read is not None else dict.fromkeys(given)
        return stream._replace(tokens={**stream.tokens, **self.compute(given, read)})

    def compute(self, given: Mapping[str, Given], read: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """What torch.compile makes a graph of (compiling.py).

        Args:
            given: of each of the block's modalities.
            read: the modalities whose tokens lead on, and int64 [b], the samples of which; None: all.

        Returns:
            The tokens of those after the block.
        """
        parts: dict[str, BlockPart] = dict(self.parts.items())  # type: ignore[arg-type]
        projected = {name: part.project(*given[name]) for name, part in parts.items()}
        attended = joint_attention([projection for _, projection in projected.values()])
        finished = {}
        for (name, part), rows in zip(parts.items(), attended, strict=True):
            if name not in read:
                continue
            tokens, vectors, samples = given[name].tokens, projected[name][0], read[name]
            if samples is not None:
                tokens, rows, vectors = tokens[samples], rows[samples], Modulated(*(vector[samples] for vector in vectors))
            finished[name] = part.finish(tokens, rows, vectors, given[name].placing)
        return finished


class StreamNorm(nn.Module):
    """An RMSNorm per modality: after the joint blocks, and at a tower's end (the paper's network)."""

    def __init__(self, config: Model, names: Sequence[str]) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: RmsNorm(config.width_of(name)) for name in names})

    def forward(self, stream: Stream) -> Stream:
        return stream._replace(
            tokens={**stream.tokens, **{name: norm(stream.tokens[name]) for name, norm in self.norms.items()}}
        )
