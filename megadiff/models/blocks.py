"""Blocks of the MMDiT. A joint block and a tower's block are the same thing over several modalities or one.

Legend: B samples, S tokens of one modality, D width. Source: Esser et al., "Scaling Rectified Flow Transformers"
(MMDiT), arXiv 2403.03206, figure 2b; adaLN-Zero from Peebles and Xie (DiT).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from megadiff.config.derived import mlp_hidden
from megadiff.config.schema import Modality, Model
from megadiff.kernels.joint_attention import joint_attention
from megadiff.models.attention import Projection
from megadiff.models.layers import Linear, Mlp, Modulation, RmsNorm
from megadiff.types import Stream

BLOCK_NORM_EPS = 1e-5


class Modulated(NamedTuple):
    """The six adaLN vectors of a block, each [B, 1, D], in the order in which the fused linear map holds them."""

    attention_shift: Tensor
    attention_scale: Tensor
    attention_gate: Tensor
    mlp_shift: Tensor
    mlp_scale: Tensor
    mlp_gate: Tensor


class BlockPart(nn.Module):
    """One modality's weights in a block. Owns modules only, never a parameter: its two halves are not a forward."""

    def __init__(self, config: Model, modality: Modality) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.one_plus_scale = config.block_modulation == "one_plus_scale"
        ones = [] if config.gates == "zero" else ["attention_gate", "mlp_gate"]
        ones += [] if self.one_plus_scale else ["attention_scale", "mlp_scale"]
        slots = Modulated._fields
        self.modulation = Modulation(config.width, len(slots), ones=[slots.index(name) for name in ones])
        self.projection = Projection(config, modality)
        self.output = Linear(inner, config.width, bias=config.attention_bias)
        self.mlp = Mlp(config.width, mlp_hidden(config), config.mlp)

    def project(
        self, tokens: Tensor, conditioning: Tensor, grid: tuple[int, int] | None
    ) -> tuple[Modulated, tuple[Tensor, Tensor, Tensor]]:
        """Before attention: the block's modulation, and (query, key, value)."""
        modulated = Modulated(*self.modulation(conditioning))
        normal = self._modulate(tokens, modulated.attention_shift, modulated.attention_scale)
        return modulated, self.projection(normal, grid)

    def finish(self, tokens: Tensor, attended: Tensor, modulated: Modulated) -> Tensor:
        """After attention: its gated residual, then the MLP's."""
        tokens = tokens + modulated.attention_gate * self.output(attended.flatten(-2))
        change: Tensor = self.mlp(self._modulate(tokens, modulated.mlp_shift, modulated.mlp_scale))
        return tokens + modulated.mlp_gate * change

    def _modulate(self, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normal = F.layer_norm(tokens, tokens.shape[-1:], eps=BLOCK_NORM_EPS)
        return normal * (1 + scale if self.one_plus_scale else scale) + shift


class Block(nn.Module):
    """Attention over the tokens of the block's modalities, then an MLP for each; other modalities pass unchanged."""

    def __init__(self, config: Model, names: Sequence[str]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: BlockPart(config, config.modalities[name]) for name in names})

    def forward(self, stream: Stream) -> Stream:
        parts: dict[str, BlockPart] = dict(self.parts.items())  # type: ignore[arg-type]
        projected = {
            name: part.project(stream.tokens[name], stream.conditioning[name], stream.grids.get(name))
            for name, part in parts.items()
        }
        attended = joint_attention([qkv for _, qkv in projected.values()], [stream.visible[name] for name in parts])
        tokens = dict(stream.tokens)
        for (name, part), rows in zip(parts.items(), attended, strict=True):
            tokens[name] = part.finish(tokens[name], rows, projected[name][0])
        return stream._replace(tokens=tokens)


class StreamNorm(nn.Module):
    """An RMSNorm per modality: after the joint blocks, and at a tower's end (the paper's network)."""

    def __init__(self, config: Model, names: Sequence[str]) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: RmsNorm(config.width) for name in names})

    def forward(self, stream: Stream) -> Stream:
        return stream._replace(
            tokens={**stream.tokens, **{name: norm(stream.tokens[name]) for name, norm in self.norms.items()}}
        )
