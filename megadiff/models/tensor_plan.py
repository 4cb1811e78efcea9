"""Which parameters of a model tensor parallelism splits, and how: a plan beside the model, which does not know of it.

Legend: T tensor ranks, D width, V vocabulary, H heads.

Attention is split by heads and MLPs by hidden channels: the maps into them by output rows, the maps out of them by input
columns, after which the ranks' results are added. Modulations have replicated inputs and outputs, and most of a block's weights
after these; they are split by input columns as well. Source: Shoeybi et al., "Megatron-LM", arXiv 1909.08053, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple

from torch import nn

from megadiff.models.attention import Projection
from megadiff.models.blocks import BlockPart
from megadiff.models.embeddings import TokenEmbedding
from megadiff.models.heads import TokenHead
from megadiff.models.layers import Mlp, Modulation
from megadiff.models.names import named_parameters


class Kind(Enum):
    """How a module is split."""

    COLUMN = auto()
    """A linear map by its outputs: replicated input, split output."""
    ROW = auto()
    """A linear map by its inputs: split input, replicated output."""
    SCATTERED_ROW = auto()
    """A row map whose input is replicated: each rank takes its slice."""
    HEADS = auto()
    """Gains [H, channels] by heads."""
    VOCABULARY = auto()
    """An embedding by its rows."""
    VOCABULARY_HEAD = auto()
    """A vocabulary head by its rows."""


DIMENSIONS: dict[Kind, dict[str, int]] = {
    Kind.COLUMN: {"weight": 0, "bias": 0},
    Kind.ROW: {"weight": 1},
    Kind.SCATTERED_ROW: {"weight": 1},
    Kind.HEADS: {"query_gain": 0, "key_gain": 0},
    Kind.VOCABULARY: {"weight": 0},
    Kind.VOCABULARY_HEAD: {"weight": 0, "bias": 0},
}
"""The split parameters of a module and the dimension along which each is split; all others are replicated."""


class ModuleSplit(NamedTuple):
    """How a module is split.

    Attributes:
        groups: equal groups of rows, each of which is split for itself: query, key and value; the halves of SwiGLU.
    """

    kind: Kind
    groups: int = 1


class Split(NamedTuple):
    """One tensor rank's part of a parameter.

    Attributes:
        shape: the whole parameter's.
        boxes: [start, stop) in every dimension of each part of it; the local tensor is these laid end to end, then padding.
        local: the local tensor's shape; longer than the boxes where the rows of an embedding do not divide.
    """

    shape: tuple[int, ...]
    boxes: tuple[tuple[tuple[int, int], ...], ...]
    local: tuple[int, ...]


def tensor_plan(module: nn.Module) -> dict[str, ModuleSplit]:
    """By path, the modules to split in a model or a list of its layers."""
    plan: dict[str, ModuleSplit] = {}
    for path, child in module.named_modules():
        match child:
            case Projection():
                plan[path] = ModuleSplit(Kind.HEADS)
                plan[f"{path}.linear"] = ModuleSplit(Kind.COLUMN, groups=3)
            case BlockPart():
                plan[f"{path}.output"] = ModuleSplit(Kind.ROW)
            case Mlp():
                plan[f"{path}.up"] = ModuleSplit(Kind.COLUMN, groups=2 if child.gated else 1)
                plan[f"{path}.down"] = ModuleSplit(Kind.ROW)
            case Modulation():
                plan[path] = ModuleSplit(Kind.SCATTERED_ROW)
            case TokenEmbedding():
                plan[path] = ModuleSplit(Kind.VOCABULARY)
            case TokenHead():
                plan[path] = ModuleSplit(Kind.VOCABULARY_HEAD)
    return plan


def splits(module: nn.Module, tensor: int, rank: int) -> dict[str, Split]:
    """By the model's names, the parameters that are split over `tensor` ranks, with the part of this one."""
    names = {id(parameter): name for name, parameter in named_parameters(module)}
    found = {}
    for path, planned in tensor_plan(module).items():
        for own, dimension in DIMENSIONS[planned.kind].items():
            parameter = getattr(module.get_submodule(path), own)
            if parameter is not None:
                found[names[id(parameter)]] = split(parameter.shape, dimension, planned.groups, tensor, rank)
    return found


def split(shape: Sequence[int], dimension: int, groups: int, tensor: int, rank: int) -> Split:
    """A rank's part of every group along a dimension; the last ranks' parts of one group may be shorter, and are padded."""
    group = shape[dimension] // groups
    size = -(-group // tensor)
    low, high = min(rank * size, group), min((rank + 1) * size, group)
    whole = [(0, length) for length in shape]
    boxes = tuple(
        (*whole[:dimension], (start + low, start + high), *whole[dimension + 1 :])
        for start in range(0, shape[dimension], group)
    )
    return Split(tuple(shape), boxes, (*shape[:dimension], groups * size, *shape[dimension + 1 :]))
