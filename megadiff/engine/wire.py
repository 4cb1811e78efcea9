"""The Stream between pipeline stages as one float tensor and two of integers.

DeepSpeed sends tensors one by one, runs a backward pass for each float tensor that a stage gives, and wants a gradient for each
that it takes. So all floats travel in one. They come first: receive buffers are told apart by position and size, not by dtype.

Legend: B samples, S tokens of one modality, N of all modalities, D width, F numbers of a feature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megadiff.types import Noised, Stream


class Wire(NamedTuple):
    """What travels.

    Attributes:
        floats: [K], laid end to end: per modality tokens [B, S, D] and conditioning [B, D], then the tapped tokens [B, S, F].
        visible: uint8 [B, N].
        header: int64; the micro-batch's number, S and F of the tapped tokens (0 without), then a _Place per modality.
    """

    floats: Tensor
    visible: Tensor
    header: Tensor


class _Place(NamedTuple):
    """A modality's length S, whether a position may be hidden, and its rows and columns (0 if it is no grid)."""

    length: int
    masked: int
    rows: int
    columns: int


def dense(noised: Noised) -> Noised:
    """The same input with the absent positions of ragged modalities hidden as keys: shapes are then constant."""
    visible = dict(noised.visible)
    for name, ragged in noised.ragged.items():
        there = torch.arange(noised.states[name].shape[1], device=ragged.lengths.device) < ragged.lengths[:, None]
        mask = visible.get(name)
        visible[name] = there if mask is None else there & mask
    return noised._replace(visible=visible, ragged={})


def pack(stream: Stream, number: int) -> Wire:
    """A dense stream of the micro-batch `number`."""
    floats, visible = [], []
    tapped = stream.tapped
    header = [number, *((0, 0) if tapped is None else tapped.shape[1:])]
    for name, tokens in stream.tokens.items():
        mask = stream.visible[name]
        floats += [tokens.flatten(), stream.conditioning[name].flatten()]
        visible.append(tokens.new_ones(tokens.shape[:2], dtype=torch.uint8) if mask is None else mask.to(torch.uint8))
        header += _Place(tokens.shape[1], int(mask is not None), *stream.grids.get(name, (0, 0)))
    floats += [] if tapped is None else [tapped.flatten()]
    return Wire(torch.cat(floats), torch.cat(visible, 1), torch.tensor(header, device=floats[0].device))


def unpack(wire: Wire, widths: Mapping[str, int]) -> tuple[Stream, int]:
    """The stream and its micro-batch's number; waits for the device once.

    Args:
        widths: D of every modality, in the model's order.
    """
    number, tapped, features, *entries = wire.header.tolist()
    places = {name: _Place(*entries[4 * index : 4 * index + 4]) for index, name in enumerate(widths)}
    batch = len(wire.visible)
    shapes = [(batch, *rest) for name, width in widths.items() for rest in ((places[name].length, width), (width,))]
    shapes += [(batch, tapped, features)]
    floats = torch.split(wire.floats, [math.prod(shape) for shape in shapes])
    parts = [part.view(shape) for part, shape in zip(floats, shapes, strict=True)]
    masks = dict(zip(places, torch.split(wire.visible.bool(), [place.length for place in places.values()], 1), strict=True))
    stream = Stream(
        tokens=dict(zip(places, parts[:-1:2], strict=True)),
        conditioning=dict(zip(places, parts[1:-1:2], strict=True)),
        visible={name: masks[name].contiguous() if place.masked else None for name, place in places.items()},
        grids={name: (place.rows, place.columns) for name, place in places.items() if place.rows},
        tapped=parts[-1] if tapped else None,
    )
    return stream, number


def tie(value: Tensor, floats: Tensor) -> Tensor:
    """`value`, which does not depend on `floats`, with a gradient of zero for them."""
    tied: Tensor = _Tie.apply(value, floats)  # type: ignore[no-untyped-call]
    return tied


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, floats: Tensor) -> Tensor:
        ctx.shape = floats.shape
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        return gradient, gradient.new_zeros(ctx.shape)
