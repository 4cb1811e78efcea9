"""From states and clocks to tokens and conditioning vectors: patches, token ids, positions, times.

Legend: B samples, S tokens, D width, C channels, H height, W width of a grid, p x q patch, d channels of a head.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadiff.config.parameters import TIME_FEATURES, patch_numbers, token_count
from megadiff.config.schema import GridSpace, Modality, Model, TokenSpace
from megadiff.models.initial import Initial, Normal
from megadiff.models.layers import INITIAL_DEVIATION, CachedConstant, Linear
from megadiff.types import Noised, Ragged, Rows, Stream

LEAST_SAVED = 0.08
"""Smallest share of all modalities' tokens that packing must save, since gathering rows has a cost."""
TOKEN_ROTARY_BASE = 10000.0
GRID_ROTARY_BASE = 100.0
"""Grids are tens of patches wide: at 10,000 most channels of a small head would hardly rotate."""


# ------------------------------------------------------------------------------------------------------------- patches


def patchify(grid: Tensor, patch: tuple[int, int]) -> Tensor:
    """[B, C, H, W] -> [B, (H/p) (W/q), p q C]: patches row by row, inside each (row, column, channel)."""
    batch, channels, height, width = grid.shape
    p, q = patch
    blocks = grid.reshape(batch, channels, height // p, p, width // q, q)
    return blocks.permute(0, 2, 4, 3, 5, 1).reshape(batch, (height // p) * (width // q), p * q * channels)


def unpatchify(patches: Tensor, channels: int, patch: tuple[int, int], rows: int, columns: int) -> Tensor:
    """The inverse of `patchify`: [B, rows columns, p q C] -> [B, C, H, W]."""
    p, q = patch
    blocks = patches.reshape(len(patches), rows, columns, p, q, channels)
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), channels, rows * p, columns * q)


# ----------------------------------------------------------------------------------------------------------- positions


def sincos_positions(width: int, device: torch.device, rows: int, columns: int) -> Tensor:
    """Fixed positions, float32 [rows columns, D]: the first half of the channels for the column, the second for the row.

    Each half is [sin, cos] of index * 10000^(-k / (D/4)) (the paper's released network).
    """
    column, row = _grid_coordinates(device, rows, columns)
    rates = 10000.0 ** (-torch.arange(width // 4, device=device, dtype=torch.float64) / (width // 4))
    halves = [axis.double()[:, None] * rates for axis in (column, row)]
    return torch.cat([wave(half) for half in halves for wave in (torch.sin, torch.cos)], dim=-1).float()


def rotary_table(head_dim: int, device: torch.device, *sizes: int) -> Tensor:
    """Cosines and sines of the rotary angles, float32 [2, S, 1, d/2].

    `sizes` are the length of a sequence, or the rows and columns of a grid. Tokens rotate by their index; grids by their row in
    the first half of the angles and by their column in the second.
    Source: Su et al., "RoFormer", arXiv 2104.09864, and its usual extension to two axes.
    """
    if len(sizes) == 2:
        column, row = _grid_coordinates(device, *sizes)
        axes, base = [row, column], GRID_ROTARY_BASE
    else:
        axes, base = [torch.arange(*sizes, device=device)], TOKEN_ROTARY_BASE
    count = head_dim // 2 // len(axes)
    rates = base ** (-torch.arange(count, device=device, dtype=torch.float64) / count)
    angles = torch.cat([axis.double()[:, None] * rates for axis in axes], dim=-1)
    return torch.stack([angles.cos(), angles.sin()]).float()[:, :, None]


def _grid_coordinates(device: torch.device, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(column, row) of every patch, int64 [S] each, row by row."""
    index = torch.arange(rows * columns, device=device)
    return index % columns, index // columns


# ---------------------------------------------------------------------------------------------------------- embeddings


class PatchEmbedding(nn.Module):
    """A grid's patches through one linear map, plus positions."""

    def __init__(self, space: GridSpace, width: int, positions: str) -> None:
        super().__init__()
        self.patch = space.patch_sides
        self.projection = Linear(patch_numbers(space), width)
        self.positions = nn.Parameter(torch.empty(token_count(space), width)) if positions == "learned" else None
        self.fixed = CachedConstant(partial(sincos_positions, width)) if positions == "sincos" else None

    def initial(self) -> dict[str, Initial]:
        return {"positions": Normal(INITIAL_DEVIATION)}

    def forward(self, grid: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, S, D]; without learned positions, of any height and width."""
        tokens: Tensor = self.projection(patchify(grid, self.patch))
        if self.positions is not None:
            tokens = tokens + self.positions
        if self.fixed is not None:
            tokens = tokens + self.fixed(tokens.device, *grid_of(grid, self.patch)).to(tokens.dtype)
        return tokens


def grid_of(grid: Tensor, patch: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches of [B, C, H, W]."""
    return grid.shape[2] // patch[0], grid.shape[3] // patch[1]


class TokenEmbedding(nn.Module):
    """One row per token id and a last one for the mask state, plus positions."""

    def __init__(self, space: TokenSpace, width: int, positions: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(space.vocabulary + 1, width))
        self.positions = nn.Parameter(torch.empty(space.length, width)) if positions == "learned" else None

    def initial(self) -> dict[str, Initial]:
        return dict.fromkeys(("weight", "positions"), Normal(INITIAL_DEVIATION))

    def forward(self, ids: Tensor, rows: Rows | None = None) -> Tensor:
        """int64 [B, S] -> [B, S, D], or the packed [R, D]; sequences may be shorter than the space's length."""
        tokens = self.look_up(ids if rows is None else ids.flatten()[rows.places])
        if self.positions is None:
            return tokens
        return tokens + (self.positions[: ids.shape[1]] if rows is None else self.positions[rows.places % rows.length])

    def look_up(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., D]."""
        return F.embedding(ids, self.weight)


class TimeEmbedding(nn.Module):
    """A clock to a conditioning vector: sinusoids of clock * scale, linear, SiLU, linear."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.up = Linear(TIME_FEATURES, width, rule="normal")
        self.down = Linear(width, width, rule="normal")

    def forward(self, clock: Tensor) -> Tensor:
        """float32 [B] -> [B, D]."""
        conditioning: Tensor = self.down(F.silu(self.up(time_features(clock, self.scale))))
        return conditioning


def time_features(clock: Tensor, scale: float) -> Tensor:
    """float32 [B, 256]: [cos, sin] of clock * scale at frequencies 10000^(-k / 128)."""
    angles = clock.float()[:, None] * scale * _frequencies(clock.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@CachedConstant
def _frequencies(device: torch.device) -> Tensor:
    half = TIME_FEATURES // 2
    return torch.exp(-math.log(10000.0) / half * torch.arange(half, device=device, dtype=torch.float32))


class Embed(nn.Module):
    """The first layer: a Noised to a Stream.

    Attributes:
        packs: whether the tokens of a modality with many absent positions are packed into rows, so that no layer computes
            those. If not, shapes are constant.
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.packs = True
        self.states = nn.ModuleDict({name: embedding_of(m, config.width_of(name)) for name, m in config.modalities.items()})
        self.clocks = nn.ModuleDict(
            {name: TimeEmbedding(config.width_of(name), config.time_scale) for name in config.modalities}
        )

    def forward(self, noised: Noised) -> Stream:
        rows = {
            name: rows_of(ragged, noised.states[name]) for name, ragged in noised.ragged.items() if self._pays(name, noised)
        }
        return Stream(
            tokens={
                name: embedding(noised.states[name], rows[name]) if name in rows else embedding(noised.states[name])
                for name, embedding in self.states.items()
            },
            conditioning={name: embedding(noised.clocks[name]) for name, embedding in self.clocks.items()},
            visible={name: noised.visible.get(name) for name in self.states},
            grids={
                name: grid_of(noised.states[name], embedding.patch)
                for name, embedding in self.states.items()
                if isinstance(embedding, PatchEmbedding)
            },
            ragged=noised.ragged,
            rows=rows,
        )

    def _pays(self, name: str, noised: Noised) -> bool:
        if not self.packs or not isinstance(self.states[name], TokenEmbedding):
            return False
        missing = noised.states[name].numel() - noised.ragged[name].total
        return missing >= LEAST_SAVED * sum(map(self._token_count, noised.states.items()))

    def _token_count(self, named: tuple[str, Tensor]) -> int:
        """Positions of all samples of one modality."""
        name, state = named
        embedding = self.states[name]
        if isinstance(embedding, PatchEmbedding):
            return len(state) * math.prod(grid_of(state, embedding.patch))
        return state.shape[0] * state.shape[1]


def rows_of(ragged: Ragged, ids: Tensor) -> Rows:
    """The packed rows of [B, S] positions. Does not wait for the device."""
    lengths, total = ragged.lengths.long(), ragged.total
    ends = lengths.cumsum(0)
    starts = ends - lengths
    samples = torch.repeat_interleave(lengths, output_size=total)
    places = torch.arange(total, device=ids.device) - starts[samples]
    return Rows(samples * ids.shape[1] + places, samples, starts.int(), ids.shape[1])


def embedding_of(modality: Modality, width: int) -> PatchEmbedding | TokenEmbedding:
    """The embedding that a modality's space asks for."""
    if isinstance(modality.space, GridSpace):
        return PatchEmbedding(modality.space, width, modality.positions)
    return TokenEmbedding(modality.space, width, modality.positions)
