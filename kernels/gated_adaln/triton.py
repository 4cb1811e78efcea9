"""Gated residual, LayerNorm and modulation in one kernel; backward in one too, but for the last sum.

Legend: B samples, S tokens, D width, R rows (all tokens of all samples), P parts of a sample's rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megadiff.kernels.toolchain.triton import Case
from megadiff.kernels.tuning import Config, Defaults, configuration, options

FORWARD_DEFAULTS: Defaults = {0: {"numbers": 4096}, 80: {"numbers": 2048, "num_warps": 4}}
BACKWARD_DEFAULTS: Defaults = {0: {"numbers": 4096, "programs": 8}, 80: {"numbers": 2048, "programs": 1024, "num_warps": 8}}
"""Numbers: of a block, as rows x width. Programs: of the grid, about."""
LARGEST_WIDTH = 4096
"""A row is in registers as a whole."""


@triton.jit
def forward(
    tokens, change, gate, shift, scale, samples, summed, normal, means, deviations,
    rows, sample_rows, gate_stride, shift_stride, scale_stride, width, eps,
    GATED: tl.constexpr, PACKED: tl.constexpr, ONE_PLUS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """summed = tokens + gate * change if GATED; its LayerNorm, modulated. Grid: (R / ROWS,).

    Args:
        tokens, change, summed, normal: [R, D].
        gate, shift, scale: [B, D], with a stride of samples.
        samples: int64 [R], read if PACKED; else there are `sample_rows` rows of each sample.
        means, deviations: float32 [R], outputs: the mean of each row and 1 / its deviation.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    exists = (row < rows)[:, None] & (column < width)
    sample = tl.load(samples + row, mask=row < rows, other=0) if PACKED else row // sample_rows
    place, sample = row[:, None] * width + column, sample[:, None]
    y = tl.load(tokens + place, mask=exists, other=0.0).to(tl.float32)
    if GATED:
        g = tl.load(gate + sample * gate_stride + column, mask=exists, other=0.0).to(tl.float32)
        y += g * tl.load(change + place, mask=exists, other=0.0).to(tl.float32)
        # The norm is that of what later layers read.
        rounded = y.to(summed.dtype.element_ty)
        tl.store(summed + place, rounded, mask=exists)
        y = rounded.to(tl.float32)
    mean = tl.sum(y, 1) / width
    centred = tl.where(exists, y - mean[:, None], 0.0)
    deviation = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / width + eps)
    factor = tl.load(scale + sample * scale_stride + column, mask=exists, other=0.0).to(tl.float32)
    if ONE_PLUS:
        factor += 1.0
    n = centred * deviation[:, None] * factor
    n += tl.load(shift + sample * shift_stride + column, mask=exists, other=0.0).to(tl.float32)
    tl.store(normal + place, n.to(normal.dtype.element_ty), mask=exists)
    tl.store(means + row, mean, mask=row < rows)
    tl.store(deviations + row, deviation, mask=row < rows)


@triton.jit
def backward(
    normal_gradient, summed_gradient, summed, change, gate, scale, starts, means, deviations,
    tokens_gradient, change_gradient, vector_gradients,
    sample_rows, gate_stride, scale_stride, width, batch,
    GATED: tl.constexpr, PACKED: tl.constexpr, ONE_PLUS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of all that `forward` reads, those of the vectors summed over a part of a sample's rows. Grid: (B, P).

    Args:
        starts: int64 [B + 1], the first row of each sample, read if PACKED.
        vector_gradients: float32 [P, 3, B, D], of shift, scale and gate.
    """
    sample, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    if PACKED:
        first, end = tl.load(starts + sample), tl.load(starts + sample + 1)
    else:
        first, end = sample * sample_rows, (sample + 1) * sample_rows
    own = tl.cdiv(end - first, parts)
    first += part * own
    end = tl.minimum(first + own, end)
    column = tl.arange(0, WIDTH)
    inside = column < width
    factor = tl.load(scale + sample * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ONE_PLUS:
        factor += 1.0
    for_shift = tl.zeros([ROWS, WIDTH], tl.float32)
    for_scale = tl.zeros([ROWS, WIDTH], tl.float32)
    if GATED:
        g = tl.load(gate + sample * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        for_gate = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        exists = (row < end)[:, None] & inside[None, :]
        place = row[:, None] * width + column[None, :]
        mean = tl.load(means + row, mask=row < end, other=0.0)
        deviation = tl.load(deviations + row, mask=row < end, other=0.0)
        y = tl.load(summed + place, mask=exists, other=0.0).to(tl.float32)
        unit = tl.where(exists, (y - mean[:, None]) * deviation[:, None], 0.0)
        dn = tl.load(normal_gradient + place, mask=exists, other=0.0).to(tl.float32)
        for_shift += dn
        for_scale += dn * unit
        dunit = dn * factor[None, :]
        along = tl.sum(dunit * unit, 1) / width
        dy = (dunit - (tl.sum(dunit, 1) / width)[:, None] - unit * along[:, None]) * deviation[:, None]
        if GATED:
            dy += tl.load(summed_gradient + place, mask=exists, other=0.0).to(tl.float32)
            for_gate += dy * tl.load(change + place, mask=exists, other=0.0).to(tl.float32)
            dchange = dy * g[None, :]
            tl.store(change_gradient + place, dchange.to(change_gradient.dtype.element_ty), mask=exists)
        tl.store(tokens_gradient + place, dy.to(tokens_gradient.dtype.element_ty), mask=exists)
    at = vector_gradients + (part * 3 * batch + sample) * width + column
    tl.store(at, tl.sum(for_shift, 0), mask=inside)
    tl.store(at + batch * width, tl.sum(for_scale, 0), mask=inside)
    if GATED:
        tl.store(at + 2 * batch * width, tl.sum(for_gate, 0), mask=inside)


class Inputs(NamedTuple):
    """Tensors that `forward` reads; of the gated form if there are `change` and `gate`. Tokens and change are contiguous."""

    tokens: Tensor
    change: Tensor | None
    gate: Tensor | None
    shift: Tensor
    scale: Tensor
    samples: Tensor | None


class Outputs(NamedTuple):
    """What `forward` fills; `summed` has no elements if there is no gate."""

    summed: Tensor
    normal: Tensor
    means: Tensor
    deviations: Tensor


def run_forward(inputs: Inputs, outputs: Outputs, eps: float, one_plus: bool) -> None:
    """Fill the outputs."""
    rows, width = outputs.means.numel(), inputs.tokens.shape[-1]
    config = configuration("gated_adaln.forward", f"D{width}", inputs.tokens.dtype, inputs.tokens.device, FORWARD_DEFAULTS)
    block = _block(config, width)
    forward[(triton.cdiv(rows, block["ROWS"]),)](
        *inputs, *outputs, rows, _rows_of_sample(inputs), 0 if inputs.gate is None else inputs.gate.stride(0),
        inputs.shift.stride(0), inputs.scale.stride(0), width, eps,
        GATED=inputs.gate is not None, PACKED=inputs.samples is not None, ONE_PLUS=one_plus, **block, **options(config),
    )  # fmt: skip


def run_backward(
    arriving: tuple[Tensor, Tensor | None],
    inputs: Inputs,
    outputs: Outputs,
    starts: Tensor | None,
    gradients: tuple[Tensor, Tensor | None],
    one_plus: bool,
) -> Tensor:
    """Fill the gradients of tokens and change; returns float32 [3, B, D], those of shift, scale and gate.

    Args:
        arriving: at `normal` and `summed`.
        starts: int64 [B + 1], the first row of each sample, if rows are packed.
    """
    batch, width = inputs.scale.shape
    config = configuration("gated_adaln.backward", f"D{width}", inputs.tokens.dtype, inputs.tokens.device, BACKWARD_DEFAULTS)
    block = _block(config, width)
    blocks = triton.cdiv(outputs.means.numel(), max(1, batch) * block["ROWS"])
    parts = max(1, min(triton.cdiv(config["programs"], max(1, batch)), blocks))
    for_vectors = outputs.means.new_empty(parts, 2 if inputs.gate is None else 3, batch, width)
    backward[(batch, parts)](
        *arriving, inputs.tokens if inputs.gate is None else outputs.summed, inputs.change, inputs.gate, inputs.scale,
        starts, outputs.means, outputs.deviations, *gradients, for_vectors, _rows_of_sample(inputs),
        0 if inputs.gate is None else inputs.gate.stride(0), inputs.scale.stride(0), width, batch,
        GATED=inputs.gate is not None, PACKED=starts is not None, ONE_PLUS=one_plus, **block, **options(config),
    )  # fmt: skip
    return for_vectors.sum(0)


def _block(config: Config, width: int) -> dict[str, int]:
    """Powers of two: rows of a block, and the least from the width up."""
    padded = triton.next_power_of_2(width)
    return {"ROWS": max(1, config["numbers"] // padded), "WIDTH": padded}


def _rows_of_sample(inputs: Inputs) -> int:
    """0 if rows are packed."""
    return 0 if inputs.samples is not None else inputs.tokens.shape[-2]


def candidates(kernel: str, architecture: int) -> Iterator[Config]:
    """What tuning measures."""
    for numbers, warps in itertools.product((1024, 2048, 4096, 8192), (2, 4, 8)):
        for programs in (512, 1024, 2048) if kernel == "backward" else (None,):
            yield {"numbers": numbers, "num_warps": warps} | ({} if programs is None else {"programs": programs})


def cases() -> Iterator[Case]:
    """At the paper's width and the largest one, dense and packed, gated and not."""
    for width, packed, gated in ((1024, False, True), (1024, False, False), (1024, True, True), (LARGEST_WIDTH, False, True)):
        for dtype in (torch.bfloat16, torch.float32):
            kind = f"{'packed' if packed else 'dense'} {'gated' if gated else 'plain'}"
            usual = width == 1024 and kind == "dense gated" and dtype == torch.bfloat16
            launch = functools.partial(_launch_both, 64, 376, width, packed, gated, dtype)
            yield Case(f"D{width} {kind} {str(dtype).removeprefix('torch.')}", launch, usual)


def _launch_both(
    samples: int, length: int, width: int, packed: bool, gated: bool, dtype: torch.dtype, device: torch.device
) -> object:
    shape = (samples * length, width) if packed else (samples, length, width)
    numbers = [torch.randn(shape, dtype=dtype, device=device) for _ in range(4)]
    vectors = torch.randn(samples, 6 * width, dtype=dtype, device=device).chunk(6, dim=-1)
    sample = torch.arange(samples * length, device=device) // length if packed else None
    starts = torch.arange(samples + 1, device=device) * length if packed else None
    change, gate = (numbers[1], vectors[0]) if gated else (None, None)
    inputs = Inputs(numbers[0], change, gate, vectors[1], vectors[2], sample)
    made = [torch.empty_like(numbers[0]) for _ in range(4)]
    outputs = Outputs(*made[:2], *torch.empty(2, *shape[:-1], device=device))
    run_forward(inputs, outputs, 1e-6, True)
    gradients = made[2], made[3] if gated else None
    for_vectors = run_backward((numbers[2], numbers[3] if gated else None), inputs, outputs, starts, gradients, True)
    return outputs.normal, gradients[0], for_vectors
