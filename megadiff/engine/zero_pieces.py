"""The fp32 master weights of DeepSpeed 0.19.8; only this file depends on their place.

They are a flat partition per sub-group in ZeRO-3, a flat partition per parameter group in ZeRO-1/2 and its bf16 optimizer, and
the parameters themselves in ZeRO-0. With tensor parallelism a parameter here is this rank's part of it, which may end in
padding; those that are not split are alike on all tensor ranks: the first one saves them, of frozen ones each a share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from megadiff.config.layout import Layout
from megadiff.engine.pieces import FrozenPiece, Piece, Pieces, Shape
from megadiff.models.names import named_parameters
from megadiff.models.tensor_plan import Split
from megadiff.weights.boxes import Extent


class Place(NamedTuple):
    """A parameter of this rank's model within the whole model.

    Attributes:
        parameter: as DeepSpeed keeps it; emptied in ZeRO-3.
        shape: the whole parameter's.
        everything: the part that this tensor rank has of it.
        alike: the number of tensor ranks that have the same numbers, and which one of them this is.
    """

    name: str
    parameter: Any
    shape: Shape
    everything: Extent
    alike: tuple[int, int]

    @property
    def saved(self) -> bool:
        """Whether this tensor rank saves it while it is trained, not another one that has it alike."""
        return self.alike[1] == 0

    def part(self, start: int, stop: int) -> Extent:
        """The range [start, stop) of the flattened local parameter, without padding."""
        size = self.everything.size
        return Extent(min(start, size), min(stop, size), self.everything.boxes)


def zero_pieces(engine: Any, layout: Layout, splits: Mapping[str, Split]) -> Pieces:
    """The pieces that a DeepSpeed engine holds on this rank.

    Args:
        splits: by name, this rank's part of the parameters that tensor parallelism splits.
    """
    optimizer, wrapper, rank = engine.basic_optimizer, engine.optimizer, layout.data_rank
    places = [_place(*named, splits, layout) for named in named_parameters(engine.module)]
    shapes = {place.name: place.shape for place in places}
    trainable = [place for place in places if place.parameter.requires_grad]
    frozen = [place for place in places if not place.parameter.requires_grad]
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        trained = [piece for place in trainable for piece in _zero3_piece(place, wrapper, rank)]
        parameters = {place.name: place.parameter for place in trainable}
        frozen_pieces = [_zero3_frozen(place, rank) for place in frozen]
        return Pieces(optimizer, trained, frozen_pieces, shapes, lambda: _publish_zero3(wrapper, trained, parameters))
    frozen_pieces = [_whole_frozen(place, layout.data_ranks, rank) for place in frozen]
    if wrapper is optimizer:
        trained = [_whole_piece(place, first=rank == 0) for place in trainable]
        return Pieces(optimizer, trained, frozen_pieces, shapes, _nothing_to_publish)
    flats = getattr(wrapper, "single_partition_of_fp32_groups", None) or wrapper.fp32_groups_flat_partition
    trained = [piece for place in trainable for piece in _linked_piece(place, flats)]
    return Pieces(optimizer, trained, frozen_pieces, shapes, wrapper.update_lp_params)


def _place(name: str, parameter: Any, splits: Mapping[str, Split], layout: Layout) -> Place:
    if name in splits:
        shape, boxes, _ = splits[name]
        size = sum(math.prod(stop - start for start, stop in box) for box in boxes)
        return Place(name, parameter, shape, Extent(0, size, boxes), (1, 0))
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    return Place(name, parameter, shape, Extent(0, math.prod(shape)), (layout.tensor, layout.tensor_rank))


def _nothing_to_publish() -> None:
    """In ZeRO-0 the masters are the weights."""


def _zero3_part(place: Place, rank: int) -> Extent:
    """This rank's ZeRO-3 partition."""
    size = place.parameter.ds_tensor.numel()
    return place.part(rank * size, (rank + 1) * size)


def _zero3_piece(place: Place, wrapper: Any, rank: int) -> Iterator[Piece]:
    part = _zero3_part(place, rank)
    group, offset, _ = wrapper.grad_position[wrapper.get_param_id(place.parameter)]
    flat = wrapper.fp32_partitioned_groups_flat[group]
    if part.size:
        yield Piece(place.name, place.shape, part, flat, offset, place.saved)


def _zero3_frozen(place: Place, rank: int) -> FrozenPiece:
    part = _zero3_part(place, rank)
    return _frozen(place, place.parameter.ds_tensor.detach(), part, part)


def _publish_zero3(wrapper: Any, pieces: Sequence[Piece], parameters: dict[str, nn.Parameter]) -> None:
    # Small parameters stay gathered between steps, which would hide a changed partition: partition all, write, gather again.
    wrapper.checkpoint_event_prologue()
    for piece in pieces:
        parameters[piece.name].ds_tensor[: piece.extent.size].copy_(piece.master)  # type: ignore[attr-defined]
    wrapper.checkpoint_event_epilogue()


def _linked_piece(place: Place, flats: Sequence[Tensor]) -> Iterator[Piece]:
    link = place.parameter._hp_mapping
    if link is not None:
        low, high = link.lp_fragment_address, link.hp_fragment_address
        part = place.part(low.start, low.start + low.numel)
        if part.size:
            yield Piece(place.name, place.shape, part, flats[link.param_group_index], high.start, place.saved)


def _whole_piece(place: Place, *, first: bool) -> Piece:
    return Piece(place.name, place.shape, place.everything, place.parameter, 0, owned=first and place.saved)


def _whole_frozen(place: Place, world: int, rank: int) -> FrozenPiece:
    size = place.everything.size
    share = place.part(size * rank // world, size * (rank + 1) // world)
    return _frozen(place, place.parameter.detach().view(-1), place.everything, share)


def _frozen(place: Place, local: Tensor, part: Extent, share: Extent) -> FrozenPiece:
    """A frozen parameter whose values `part` are in `local`, and of which this rank saves its share of `share`."""
    ranks, rank = place.alike
    own = place.part(share.start + share.size * rank // ranks, share.start + share.size * (rank + 1) // ranks)
    values = local[own.start - part.start : own.stop - part.start].float().cpu().clone()
    return FrozenPiece(place.name, place.shape, local[: part.size], part, own, values)
