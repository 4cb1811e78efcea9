"""Attention, from projections to its output, with the norms of queries and keys, and their gradients.

Peers read what linear layers write for padded text: [B, S, 3, H, d] per modality. Their norms, concatenation and split are
compiled. Ours read packed captions, as the trainer makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.measure import FORWARD, TRAINING, Absent, Case, Machine, Ready
from megadiff.kernels.agreement import converted
from megadiff.kernels.joint_attention import reference
from megadiff.kernels.streams import Projected, Span


class Shape(NamedTuple):
    """B samples of a picture and a text of up to `text` tokens, log-normal around `mean` if it is given."""

    samples: int
    image: int
    text: int
    heads: int
    channels: int
    mean: int | None = None

    def __str__(self) -> str:
        kind = "full" if self.mean is None else f"mean {self.mean}"
        return f"B={self.samples} N={self.image}+{self.text} H={self.heads} d={self.channels} text {kind}"


SHAPES = [
    *(Shape(64, 256, 120, heads, 64, mean) for heads in (8, 16) for mean in (None, 40)),
    *(Shape(64, 1024, 120, 16, 64, mean) for mean in (None, 40)),
    *(Shape(16, 4096, 120, heads, channels, mean) for heads, channels in ((16, 64), (8, 128)) for mean in (None, 40)),
]
TOYS = [Shape(2, 8, 6, 2, 16), Shape(3, 8, 6, 2, 16, 3)]


class Numbers(NamedTuple):
    """The projections with padded text, [B, S, 3, H, d] each, gains [2, H, d] of both, the lengths of texts [B] or None."""

    image: Tensor
    text: Tensor
    image_gains: Tensor
    text_gains: Tensor
    lengths: Tensor | None


def lengths_of(samples: int, longest: int, mean: int | None) -> Tensor | None:
    """int32 [B], at even quantiles of a log-normal distribution, cut to 1 and the longest; None: all are the longest."""
    if mean is None:
        return None
    quantiles = torch.special.ndtri((torch.arange(samples) + 0.5) / samples)
    values = torch.exp(0.5 * quantiles)
    return (values * (mean / values.mean())).round().clamp(1, longest).int()


def numbers(shape: Shape, machine: Machine) -> Numbers:
    def projected(length: int) -> Tensor:
        sizes = shape.samples, length, 3, shape.heads, shape.channels
        return torch.randn(sizes, device=machine.device, dtype=machine.dtype).requires_grad_()

    gains = [torch.ones(2, shape.heads, shape.channels, device=machine.device).requires_grad_() for _ in range(2)]
    lengths = lengths_of(shape.samples, shape.text, shape.mean)
    return Numbers(
        projected(shape.image), projected(shape.text), *gains, None if lengths is None else lengths.to(machine.device)
    )


def cases(machine: Machine) -> Iterator[Case]:
    for shape in TOYS if machine.toy else SHAPES:
        lengths = lengths_of(shape.samples, shape.text, shape.mean)
        places = torch.full((shape.samples,), shape.text) if lengths is None else lengths.long()
        places = places + shape.image
        inner = shape.heads * shape.channels
        flops = 4.0 * places.square().sum().item() * inner
        passed = machine.dtype.itemsize * places.sum().item() * inner
        # Forward reads queries, keys, values and writes the output; backward reads these and a gradient, and writes three.
        for passes, products, tensors in ((FORWARD, 1.0, 4), (TRAINING, 3.5, 4 + 8)):
            yield Case("joint_attention", str(shape), passes, products * flops, tensors * passed, peers(shape, machine))


def peers(shape: Shape, machine: Machine) -> dict[str, Callable[[], Ready]]:
    sdpa = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    return {
        "reference, float32": lambda: Ready(_reference, converted(tuple(numbers(shape, machine)), torch.float32)),
        "megadiff": partial(_ours, shape, machine, "_chosen"),
        "megadiff: its own kernel": partial(_ours, shape, machine, "_attended"),
        "megadiff: qk_norm_pack, then SDPA": partial(_ours, shape, machine, "_packed"),
        "megadiff: qk_norm_pack, then varlen_attn": partial(_ours, shape, machine, "_ragged"),
        **{f"SDPA, {name}": partial(_sdpa, shape, machine, name, backend) for name, backend in sdpa.items()},
        "FlexAttention": partial(_flex, shape, machine),
        "torch varlen_attn": partial(_varlen, shape, machine, "torch"),
        "flash-attn 2": partial(_varlen, shape, machine, "flash_attn"),
        "flash-attn 3": partial(_varlen, shape, machine, "flash_attn_interface"),
    }


def _dense(image: Tensor, text: Tensor, image_gains: Tensor, text_gains: Tensor, lengths: Tensor | None) -> list[Projected]:
    samples, places = text.shape[:2]
    spans = Span(samples, image.shape[1]), Span(samples, places, lengths=lengths)
    return [Projected(image, image_gains, None, spans[0]), Projected(text, text_gains, None, spans[1])]


def _reference(*arguments: Any) -> list[Tensor]:
    return reference.joint_attention(_dense(*arguments))


def _ours(shape: Shape, machine: Machine, form: str) -> Ready:
    from megadiff.kernels.joint_attention import op
    from megadiff.kernels.qk_norm_pack.op import qk_norm_pack

    streams = _dense(*numbers(shape, machine))
    lengths = streams[1].span.lengths
    if lengths is not None:
        there = streams[1].span.there(machine.device)
        starts = (lengths.cumsum(0) - lengths).int()
        span = Span(shape.samples, int(lengths.max()), starts, lengths)
        streams[1] = streams[1]._replace(qkv=streams[1].qkv.detach()[there].requires_grad_(), span=span)
    if (refusal := op.refusal("joint_attention", streams)) is not None:
        raise Absent(refusal)
    kernel = op._varlen_kernel(streams)
    if form == "_ragged" and kernel is None:
        raise Absent("torch's varlen_attn runs on GPUs only, from torch 2.13 on")
    run = {
        "_ragged": partial(op._attended_ragged, kernel=kernel),
        "_chosen": op.joint_attention,
        "_attended": op._attended,
        "_packed": lambda streams: reference.attend(qk_norm_pack(streams), streams),
    }[form]
    return Ready(run, (streams,))


def _joined(image: Tensor, text: Tensor, image_gains: Tensor, text_gains: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, N, H, d], as users write it."""

    def normed(qkv: Tensor, gains: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = qkv.unbind(2)
        sizes = query.shape[-1:]
        query = (F.rms_norm(query.float(), sizes) * gains[0]).to(value.dtype)
        return query, (F.rms_norm(key.float(), sizes) * gains[1]).to(value.dtype), value

    pairs = zip(normed(image, image_gains), normed(text, text_gains), strict=True)
    query, key, value = (torch.cat(pair, 1) for pair in pairs)
    return query, key, value


def _there(image: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
    """bool [B, N]."""
    of_text = torch.arange(text.shape[1], device=text.device) < lengths[:, None]
    return torch.cat([of_text.new_ones(len(image), image.shape[1]), of_text], 1)


def _sdpa(shape: Shape, machine: Machine, name: str, backend: SDPBackend) -> Ready:
    if name == "cuDNN":
        machine.needs_gpu()
    if shape.mean is not None and name == "flash":
        raise Absent("SDPA's flash kernel takes no mask")

    def attention(image: Tensor, text: Tensor, image_gains: Tensor, text_gains: Tensor, lengths: Tensor | None) -> Any:
        operands = [operand.transpose(1, 2) for operand in _joined(image, text, image_gains, text_gains)]
        mask = None if lengths is None else _there(image, text, lengths)[:, None, None]
        out = F.scaled_dot_product_attention(*operands, attn_mask=mask).transpose(1, 2)
        return [part.contiguous() for part in out.split([image.shape[1], text.shape[1]], 1)]

    compiled = machine.compiled(attention)

    def run(*arguments: Any) -> Any:
        with sdpa_kernel(backend):
            return compiled(*arguments)

    return Ready(run, tuple(numbers(shape, machine)))


def _flex(shape: Shape, machine: Machine) -> Ready:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    machine.needs_gpu()  # without Inductor it makes all scores, and on a CPU it has no backward pass
    arguments = numbers(shape, machine)
    mask = None
    if (lengths := arguments.lengths) is not None:
        places = shape.image + shape.text

        def seen(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key < shape.image + lengths[sample]

        mask = create_block_mask(seen, shape.samples, None, places, places, device=machine.device.type)

    def attention(image: Tensor, text: Tensor, image_gains: Tensor, text_gains: Tensor) -> Any:
        operands = [operand.transpose(1, 2) for operand in _joined(image, text, image_gains, text_gains)]
        out = flex_attention(*operands, block_mask=mask).transpose(1, 2)
        return [part.contiguous() for part in out.split([image.shape[1], text.shape[1]], 1)]

    return Ready(machine.compiled(attention), tuple(arguments[:4]))


def _varlen(shape: Shape, machine: Machine, library: str) -> Ready:
    """Without padding: norms and the gather of real tokens are compiled, the kernel is the library's."""
    machine.needs_gpu()
    arguments = numbers(shape, machine)
    lengths = arguments.lengths
    if lengths is None:
        lengths = torch.full((shape.samples,), shape.text, dtype=torch.int32, device=machine.device)
    firsts = F.pad((lengths + shape.image).cumsum(0), (1, 0)).int()
    longest = shape.image + int(lengths.max())
    places = _there(arguments.image, arguments.text, lengths).flatten().nonzero()[:, 0]
    if library == "torch":
        from torch.nn.attention.varlen import varlen_attn as kernel
    elif library == "flash_attn":
        from flash_attn import flash_attn_varlen_func as kernel
    else:
        from flash_attn_interface import flash_attn_varlen_func as kernel

    @machine.compiled
    def before(*own: Tensor) -> list[Tensor]:
        return [operand.flatten(0, 1)[places] for operand in _joined(*own)]

    @machine.compiled
    def after(out: Tensor) -> list[Tensor]:
        whole = out.new_zeros(shape.samples * (shape.image + shape.text), *out.shape[1:]).index_copy(0, places, out)
        return [part.contiguous() for part in whole.view(shape.samples, -1, *out.shape[1:]).split([shape.image, shape.text], 1)]

    def run(*own: Tensor) -> list[Tensor]:
        return after(kernel(*before(*own), firsts, firsts, longest, longest))

    return Ready(run, tuple(arguments[:4]))
