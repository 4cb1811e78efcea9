"""`adaln` and `gated_adaln` by Triton's kernels, as operators of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megadiff.kernels import toolchain
from megadiff.kernels.gated_adaln.reference import GatedSum
from megadiff.kernels.gated_adaln.triton import LARGEST_WIDTH, Inputs, Outputs, run_backward, run_forward

Four = tuple[Tensor, Tensor, Tensor, Tensor]
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def adaln(tokens: Tensor, shift: Tensor, scale: Tensor, samples: Tensor | None, eps: float, one_plus: bool) -> Tensor:
    """See the reference."""
    normal: Tensor = _gated_adaln(tokens, None, None, shift, scale, samples, eps, one_plus)[1]
    return normal


def gated_adaln(
    tokens: Tensor,
    change: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    samples: Tensor | None,
    eps: float,
    one_plus: bool,
) -> GatedSum:
    """See the reference."""
    summed, normal, _, _ = _gated_adaln(tokens, change, gate, shift, scale, samples, eps, one_plus)
    return GatedSum(summed, normal)


def refusal(op: str, tokens: Tensor, *arguments: Any) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    vectors = arguments[:2] if op == "adaln" else arguments[:4]
    if any(vector.dtype != tokens.dtype for vector in vectors):
        return f"the tokens are {tokens.dtype}, other arguments {', '.join(str(vector.dtype) for vector in vectors)}"
    if tokens.shape[-1] > LARGEST_WIDTH:
        return f"the width ({tokens.shape[-1]}) is above {LARGEST_WIDTH}"
    return toolchain.unfit(tokens)


def example(op: str, device: torch.device) -> tuple[Any, ...]:
    """Small arguments."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 24, 64)] * (1 if op == "adaln" else 2) + [(2, 64)] * (2 if op == "adaln" else 3)
    floats = [torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_() for shape in shapes]
    return *floats, None, 1e-6, True


@torch.library.custom_op("megadiff::gated_adaln", mutates_args=())
def _gated_adaln(
    tokens: Tensor,
    change: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    samples: Tensor | None,
    eps: float,
    one_plus: bool,
) -> Four:
    """The sum (no elements without a gate), its modulated norm, and float32 means and 1 / deviations of the rows."""
    outputs = _outputs(tokens, gate)
    with toolchain.device_of(tokens):
        run_forward(_inputs(tokens, change, gate, shift, scale, samples), outputs, eps, one_plus)
    return outputs


@_gated_adaln.register_fake
def _(tokens: Tensor, change: Tensor | None, gate: Tensor | None, *_: object) -> Four:
    return _outputs(tokens, gate)


@torch.library.custom_op("megadiff::gated_adaln_backward", mutates_args=())
def _gated_adaln_backward(
    for_normal: Tensor,
    for_summed: Tensor,
    tokens: Tensor,
    change: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    samples: Tensor | None,
    summed: Tensor,
    means: Tensor,
    deviations: Tensor,
    one_plus: bool,
) -> Five:
    """Gradients of tokens, change, gate, shift and scale; those of change and gate have no elements without a gate."""
    gradients = _gradients(tokens, gate, scale)
    inputs = _inputs(tokens, change, gate, scale, scale, samples)
    starts = None
    if samples is not None:  # they ascend
        starts = torch.searchsorted(samples, torch.arange(len(scale) + 1, device=samples.device))
    arriving = for_normal.contiguous(), None if gate is None else for_summed.contiguous()
    outputs, made = Outputs(summed, tokens, means, deviations), (gradients[0], None if gate is None else gradients[1])
    with toolchain.device_of(tokens):
        for_vectors = run_backward(arriving, inputs, outputs, starts, made, one_plus).to(scale.dtype)
    for target, values in zip((gradients[3], gradients[4], gradients[2]), for_vectors, strict=False):
        target.copy_(values)
    return gradients


@_gated_adaln_backward.register_fake
def _(
    for_normal: Tensor,
    for_summed: Tensor,
    tokens: Tensor,
    change: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    *_: object,
) -> Five:
    return _gradients(tokens, gate, scale)


def _inputs(
    tokens: Tensor, change: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, samples: Tensor | None
) -> Inputs:
    return Inputs(tokens.contiguous(), None if change is None else change.contiguous(), gate, shift, scale, samples)


def _outputs(tokens: Tensor, gate: Tensor | None) -> Outputs:
    summed = tokens.new_empty(0 if gate is None else tokens.shape)
    means, deviations = (tokens.new_empty(tokens.shape[:-1], dtype=torch.float32) for _ in range(2))
    return Outputs(summed, tokens.new_empty(tokens.shape), means, deviations)


def _gradients(tokens: Tensor, gate: Tensor | None, scale: Tensor) -> Five:
    for_change, for_gate = (like.new_empty(0 if gate is None else like.shape) for like in (tokens, scale))
    for_shift, for_scale = (scale.new_empty(scale.shape) for _ in range(2))
    return tokens.new_empty(tokens.shape), for_change, for_gate, for_shift, for_scale


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    tokens, change, gate, _, scale, samples, _, ctx.one_plus = inputs
    summed, _, means, deviations = output
    # Of the gated form only the sum is read again.
    ctx.save_for_backward(tokens if gate is None else summed, change, gate, scale, samples, summed, means, deviations)


def _backward(ctx: Any, for_summed: Tensor, for_normal: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gate = ctx.saved_tensors[2]
    of_tokens, of_change, of_gate, *of_vectors = _gated_adaln_backward(for_normal, for_summed, *ctx.saved_tensors, ctx.one_plus)
    own = (None, None) if gate is None else (of_change, of_gate)
    return of_tokens, *own, *of_vectors, None, None, None


_gated_adaln.register_autograd(_backward, setup_context=_keep)
