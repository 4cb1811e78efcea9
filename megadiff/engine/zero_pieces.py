"""The fp32 master weights of DeepSpeed 0.19.8; only this file depends on their place.

They are a flat partition per sub-group in ZeRO-3, a flat partition per parameter group in ZeRO-1/2 and its bf16 optimizer, and
the parameters themselves in ZeRO-0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from megadiff.engine.pieces import FrozenPiece, Piece, Pieces
from megadiff.models.names import named_parameters
from megadiff.weights.boxes import Extent, whole


def zero_pieces(engine: Any, world: int, rank: int) -> Pieces:
    """The pieces that a DeepSpeed engine holds on data-parallel rank `rank` of `world`."""
    optimizer, wrapper = engine.basic_optimizer, engine.optimizer
    named = list(named_parameters(engine.module))
    shapes = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in named}
    trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    frozen = [(name, parameter) for name, parameter in named if not parameter.requires_grad]
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        trained = [piece for item in trainable for piece in _zero3_piece(*item, wrapper, rank)]
        parameters = dict(trainable)
        frozen_pieces = [_zero3_frozen(*item, rank) for item in frozen]
        return Pieces(optimizer, trained, frozen_pieces, shapes, lambda: _publish_zero3(wrapper, trained, parameters))
    frozen_pieces = [_whole_frozen(*item, world, rank) for item in frozen]
    if wrapper is optimizer:
        return Pieces(
            optimizer, [_whole_piece(*item, owned=rank == 0) for item in trainable], frozen_pieces, shapes, _nothing_to_publish
        )
    flats = getattr(wrapper, "single_partition_of_fp32_groups", None) or wrapper.fp32_groups_flat_partition
    trained = [piece for item in trainable for piece in _linked_piece(*item, flats)]
    return Pieces(optimizer, trained, frozen_pieces, shapes, wrapper.update_lp_params)


def _nothing_to_publish() -> None:
    """In ZeRO-0 the masters are the weights."""


def _partition_range(parameter: Any, rank: int) -> tuple[int, int]:
    """The range of the whole parameter in this rank's ZeRO-3 partition, without padding."""
    size = parameter.ds_tensor.numel()
    return min(rank * size, parameter.ds_numel), min((rank + 1) * size, parameter.ds_numel)


def _zero3_piece(name: str, parameter: Any, wrapper: Any, rank: int) -> Iterable[Piece]:
    start, stop = _partition_range(parameter, rank)
    group, offset, _ = wrapper.grad_position[wrapper.get_param_id(parameter)]
    flat = wrapper.fp32_partitioned_groups_flat[group]
    if stop > start:
        yield Piece(name, tuple(parameter.ds_shape), Extent(start, stop), flat, offset, owned=True)


def _zero3_frozen(name: str, parameter: Any, rank: int) -> FrozenPiece:
    start, stop = _partition_range(parameter, rank)
    local = parameter.ds_tensor.detach()[: stop - start]
    part = Extent(start, stop)
    return FrozenPiece(name, tuple(parameter.ds_shape), local, part, part, local.float().cpu().clone())


def _publish_zero3(wrapper: Any, pieces: Sequence[Piece], parameters: dict[str, nn.Parameter]) -> None:
    # Small parameters stay gathered between steps, which would hide a changed partition: partition all, write, gather again.
    wrapper.checkpoint_event_prologue()
    for piece in pieces:
        parameters[piece.name].ds_tensor[: piece.extent.size].copy_(piece.master)  # type: ignore[attr-defined]
    wrapper.checkpoint_event_epilogue()


def _linked_piece(name: str, parameter: Any, flats: Sequence[Tensor]) -> Iterable[Piece]:
    link = parameter._hp_mapping
    if link is not None:
        low, high = link.lp_fragment_address, link.hp_fragment_address
        flat = flats[link.param_group_index]
        part = Extent(low.start, low.start + low.numel)
        yield Piece(name, tuple(parameter.shape), part, flat, high.start, owned=True)


def _whole_piece(name: str, parameter: nn.Parameter, *, owned: bool) -> Piece:
    return Piece(name, tuple(parameter.shape), whole(parameter.shape), parameter, 0, owned)


def _whole_frozen(name: str, parameter: nn.Parameter, world: int, rank: int) -> FrozenPiece:
    size = parameter.numel()
    start, stop = size * rank // world, size * (rank + 1) // world
    local = parameter.detach().view(-1)
    saved = local[start:stop].float().cpu().clone()
    return FrozenPiece(name, tuple(parameter.shape), local, whole(parameter.shape), Extent(start, stop), saved)
