"""Packing's kernels as an operator of torch: shapes without a run, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megadiff.kernels import toolchain
from megadiff.kernels.qk_norm_pack import triton as kernels
from megadiff.kernels.qk_norm_pack.reference import Packed
from megadiff.kernels.streams import Projected, Span


def qk_norm_pack(streams: Sequence[Projected], firsts: Tensor | None = None) -> Packed:
    """As the reference, of streams with gains; with `firsts`, each [R, H, d], tokens alone.

    Args:
        firsts: int32 [B], the row of the results at which each sample starts; its streams follow one another without gaps.
            R is an upper bound on the number of tokens, and rows behind the last token are not written.
    """
    spans = [stream.span for stream in streams]
    return Packed(
        *_forward(
            [toolchain.autocast(stream.qkv).flatten(0, -4).contiguous() for stream in streams],
            [stream.gains.float() for stream in streams if stream.gains is not None],
            [stream.rotary for stream in streams],
            [span.starts for span in spans],
            [span.lengths for span in spans],
            [span.longest for span in spans],
            spans[0].batch,
            firsts,
        )
    )


@torch.library.custom_op("megadiff::qk_norm_pack", mutates_args=())
def _forward(
    qkv: Sequence[Tensor],
    gains: Sequence[Tensor],
    rotary: Sequence[Tensor | None],
    starts: Sequence[Tensor | None],
    lengths: Sequence[Tensor | None],
    longest: Sequence[int],
    batch: int,
    firsts: Tensor | None,
) -> list[Tensor]:
    """Query, key, value, each [B, N, H, d].

    Args:
        qkv: [R, 3, H, d], contiguous.
        gains: float32 [2, H, d].
        rotary: float32 [2, n, 1, d / 2].
        starts, lengths, longest, batch: as in Span.
        firsts: see `qk_norm_pack`.
    """
    with toolchain.device_of(qkv[0]):
        return kernels.pack_rows(_rows(qkv, gains, rotary, starts, lengths, longest), batch, firsts)


@_forward.register_fake
def _(qkv, gains, rotary, starts, lengths, longest, batch, firsts):  # type: ignore[no-untyped-def]
    return kernels.allocate(_rows(qkv, gains, rotary, starts, lengths, longest), batch, firsts is not None)


@torch.library.custom_op("megadiff::qk_norm_pack_backward", mutates_args=())
def _backward(
    douts: Sequence[Tensor],
    qkv: Sequence[Tensor],
    gains: Sequence[Tensor],
    rotary: Sequence[Tensor | None],
    starts: Sequence[Tensor | None],
    lengths: Sequence[Tensor | None],
    longest: Sequence[int],
    batch: int,
    firsts: Tensor | None,
) -> list[Tensor]:
    """Per stream the gradients of its qkv and of its gains, given those of query, key and value."""
    rows = _rows(qkv, gains, rotary, starts, lengths, longest)
    with toolchain.device_of(qkv[0]):
        return kernels.unpack_gradients(rows, [dout.contiguous() for dout in douts], batch, firsts)


@_backward.register_fake
def _(douts, qkv, gains, rotary, starts, lengths, longest, batch, firsts):  # type: ignore[no-untyped-def]
    return [torch.empty_like(tensor) for pair in zip(qkv, gains, strict=True) for tensor in pair]


def _rows(qkv, gains, rotary, starts, lengths, longest) -> list[kernels.Rows]:  # type: ignore[no-untyped-def]
    spans = [Span(0, *span) for span in zip(longest, starts, lengths, strict=True)]
    return [kernels.Rows.of(*stream) for stream in zip(qkv, gains, rotary, spans, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.longest, ctx.batch, firsts = inputs
    ctx.save_for_backward(firsts, *(tensor for column in tensors for tensor in column))


def _differentiate(ctx: Any, douts: list[Tensor]) -> tuple[Any, ...]:
    (firsts, *saved), count = ctx.saved_tensors, len(ctx.longest)
    columns = [saved[place : place + count] for place in range(0, len(saved), count)]
    gradients = _backward(douts, *columns, ctx.longest, ctx.batch, firsts)
    return gradients[::2], gradients[1::2], *toolchain.no_gradients(columns[2:]), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
