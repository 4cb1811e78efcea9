"""Joint attention's kernels as an operator of torch: shapes without a run, gradients, autocast; and what they cannot take.

Legend: B samples, R rows of a stream (B * S if dense), H heads, d channels of a head.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megadiff.kernels import dispatch, toolchain
from megadiff.kernels.joint_attention import triton as kernels
from megadiff.kernels.joint_attention.path import most_places
from megadiff.kernels.joint_attention.reference import attend
from megadiff.kernels.qk_norm_pack.op import qk_norm_pack
from megadiff.kernels.qk_norm_pack.reference import finite
from megadiff.kernels.streams import Projected, Span

CHANNELS = (16, 32, 64, 128)
MOST_STREAMS = 2


def joint_attention(streams: Sequence[Projected]) -> list[Tensor]:
    """As the reference; streams that `refusal` does not refuse."""
    why = _packing(streams)
    if why is None:
        dispatch.say("joint_attention", "its own kernel", "one or two modalities")
        return _attended(streams)
    if any(stream.span.lengths is not None for stream in streams) and (kernel := _varlen_kernel(streams)) is not None:
        dispatch.say("joint_attention", "qk_norm_pack, then flash attention of the tokens that exist", why)
        return _attended_ragged(streams, kernel)
    dispatch.say("joint_attention", "qk_norm_pack, then SDPA", why)
    return attend(qk_norm_pack(streams), streams)


def _varlen_kernel(streams: Sequence[Projected]) -> Callable[..., Tensor] | None:
    """torch's flash attention of samples of several lengths, or None where it cannot take the streams."""
    qkv = streams[0].qkv
    known = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    if not (known and qkv.is_cuda and all(stream.span.visible is None for stream in streams)):
        return None
    if toolchain.autocast(qkv[:0]).dtype == torch.float32:
        return None
    kernel: Callable[..., Tensor] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return kernel


def _attended_ragged(streams: Sequence[Projected], kernel: Callable[..., Tensor]) -> list[Tensor]:
    """Attention of the tokens that exist, of which there are fewer than a mask would hide.

    Args:
        kernel: (query, key, value [R, H, d], int32 [B + 1] first rows of samples, the same, longest, longest) -> [R, H, d].
    """
    device, longest = streams[0].qkv.device, sum(stream.span.longest for stream in streams)
    counts = torch.stack([stream.span.counts(device).long() for stream in streams])
    firsts = F.pad(counts.sum(0).cumsum(0), (1, 0)).int()
    out = kernel(*qk_norm_pack(streams, firsts[:-1]), firsts, firsts, longest, longest)
    before = counts.cumsum(0) - counts
    return [_own_rows(out, stream, firsts[:-1] + before[index]) for index, stream in enumerate(streams)]


def _own_rows(out: Tensor, stream: Projected, firsts: Tensor) -> Tensor:
    """A stream's outputs in its own memory layout, zero in rows without a token.

    Args:
        firsts: int64 [B], the row of `out` at which the stream's tokens of each sample start.
    """
    span, row = stream.span, torch.arange(stream.qkv.flatten(0, -4).shape[0], device=out.device)
    starts = span.firsts(out.device).long()
    sample = torch.searchsorted(starts, row, right=True) - 1  # of samples that start at one row, the last has tokens
    place = row - starts[sample]
    there = place < span.counts(out.device)[sample]
    own = out[torch.where(there, firsts[sample] + place, 0)]
    return torch.where(there[:, None, None], own, 0.0).view(*stream.qkv.shape[:-3], *out.shape[1:])


def _packing(streams: Sequence[Projected]) -> str | None:
    """Why such streams are packed for SDPA, or None: the attention kernels take them."""
    places = sum(stream.span.longest for stream in streams)
    if any(stream.rotary is not None for stream in streams):
        return "positions are rotary"
    if len(streams) > MOST_STREAMS:
        return f"there are {len(streams)} modalities, the kernel takes {MOST_STREAMS}"
    if streams[0].qkv.dtype == torch.float32 and not toolchain.interpreted():
        return "float32 has no tensor cores"
    qkv = streams[0].qkv
    most = most_places(qkv.shape[-1], qkv.dtype, qkv.device)
    return f"samples have up to {places} tokens, above {most}" if places > most else None


def _attended(streams: Sequence[Projected]) -> list[Tensor]:
    spans = [stream.span for stream in streams]
    outputs = _forward(
        [toolchain.autocast(finite(stream)).flatten(0, -4).contiguous() for stream in streams],
        [stream.gains.float() for stream in streams if stream.gains is not None],
        [span.starts for span in spans],
        [span.lengths for span in spans],
        [span.visible for span in spans],
        [span.longest for span in spans],
        spans[0].batch,
    )
    return [
        out.view(*stream.qkv.shape[:-3], *out.shape[1:])
        for out, stream in zip(outputs[:: len(kernels.Attended._fields)], streams, strict=True)
    ]


def refusal(op: str, streams: Sequence[Projected]) -> str | None:
    """Why the kernels cannot take such streams, or None."""
    first = streams[0]
    if (fault := toolchain.unfit(first.qkv)) is not None:
        return fault
    if any(stream.gains is None for stream in streams):
        return "queries and keys have no norm"
    if first.qkv.shape[-1] not in CHANNELS:
        return f"heads have {first.qkv.shape[-1]} channels, it takes {', '.join(map(str, CHANNELS))}"
    return None


def example(op: str, device: torch.device) -> tuple[Any, ...]:
    """A dense stream and a packed one, of which a sample has no token."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0, 37, 90], dtype=torch.int32)
    spans = Span(3, 100), Span(3, 90, (lengths.cumsum(0) - lengths).int().to(device), lengths.to(device))
    streams = []
    for span, shape in zip(spans, ((3, 100), (127,)), strict=True):
        qkv = torch.randn(*shape, 3, 2, 64, generator=generator).to(device, torch.bfloat16)
        gains = 1 + 0.3 * torch.randn(2, 2, 64, generator=generator)
        streams.append(Projected(qkv.requires_grad_(), gains.to(device).requires_grad_(), None, span))
    return (streams,)


@torch.library.custom_op("megadiff::joint_attention", mutates_args=())
def _forward(
    qkv: Sequence[Tensor],
    gains: Sequence[Tensor],
    starts: Sequence[Tensor | None],
    lengths: Sequence[Tensor | None],
    visible: Sequence[Tensor | None],
    longest: Sequence[int],
    batch: int,
) -> list[Tensor]:
    """Per stream the fields of `kernels.Attended`.

    Args:
        qkv: [R, 3, H, d], contiguous.
        gains: float32 [2, H, d].
        starts, lengths, visible, longest, batch: as in Span.
    """
    streams = _rows(qkv, gains, starts, lengths, visible, longest)
    with toolchain.device_of(qkv[0]):
        attended = iter(kernels.attend([stream for stream in streams if len(stream.qkv)], batch))
        return [tensor for stream in streams for tensor in (next(attended) if len(stream.qkv) else kernels.allocate(stream))]


@_forward.register_fake
def _(qkv, gains, starts, lengths, visible, longest, batch):  # type: ignore[no-untyped-def]
    return [tensor for stream in _rows(qkv, gains, starts, lengths, visible, longest) for tensor in kernels.allocate(stream)]


@torch.library.custom_op("megadiff::joint_attention_backward", mutates_args=())
def _backward(
    douts: Sequence[Tensor],
    attended: Sequence[Tensor],
    qkv: Sequence[Tensor],
    gains: Sequence[Tensor],
    starts: Sequence[Tensor | None],
    lengths: Sequence[Tensor | None],
    visible: Sequence[Tensor | None],
    longest: Sequence[int],
    batch: int,
) -> list[Tensor]:
    """Per stream the gradients of its qkv and of its gains, given those of its output; the rest as of `_forward`."""
    streams = _rows(qkv, gains, starts, lengths, visible, longest)
    size = len(kernels.Attended._fields)
    parts = [kernels.Attended(*attended[place : place + size]) for place in range(0, len(attended), size)]
    present = [place for place, stream in enumerate(streams) if len(stream.qkv)]
    with toolchain.device_of(qkv[0]):
        made = kernels.differentiate(
            [streams[place] for place in present],
            [parts[place] for place in present],
            [douts[place].contiguous() for place in present],
            batch,
        )
    gradients = [kernels.Gradients(torch.zeros_like(stream.qkv), torch.zeros_like(stream.gains)) for stream in streams]
    for place, gradient in zip(present, made, strict=True):
        gradients[place] = gradient
    return [tensor for gradient in gradients for tensor in gradient]


@_backward.register_fake
def _(douts, attended, qkv, gains, starts, lengths, visible, longest, batch):  # type: ignore[no-untyped-def]
    return [torch.empty_like(tensor) for pair in zip(qkv, gains, strict=True) for tensor in pair]


def _rows(qkv, gains, starts, lengths, visible, longest) -> list[kernels.Rows]:  # type: ignore[no-untyped-def]
    spans = [Span(0, *span) for span in zip(longest, starts, lengths, visible, strict=True)]
    return [kernels.Rows.of(*stream) for stream in zip(qkv, gains, spans, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.longest, ctx.batch = inputs
    ctx.save_for_backward(*output, *(tensor for column in tensors for tensor in column))
    ctx.streams = len(tensors[0])
    ctx.set_materialize_grads(True)


def _differentiate(ctx: Any, douts: list[Tensor]) -> tuple[Any, ...]:
    count, size, tensors = ctx.streams, len(kernels.Attended._fields), ctx.saved_tensors
    attended, saved = tensors[: count * size], tensors[count * size :]
    columns = [saved[place : place + count] for place in range(0, len(saved), count)]
    gradients = _backward(douts[::size], attended, *columns, ctx.longest, ctx.batch)
    return gradients[::2], gradients[1::2], *toolchain.no_gradients(columns[2:]), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
