"""`head_loss` by Triton's kernel between two matrix products, as an operator of torch.

The gradients are made along with the losses, for a gradient of 1 at every scored position's weighted loss; backward multiplies
them by the one number that arrives there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadiff.kernels import toolchain
from megadiff.kernels.head_loss.reference import Shard
from megadiff.kernels.head_loss.triton import in_place, run
from megadiff.kernels.products import accumulate, multiply
from megadiff.types import CrossEntropy

ROWS_AT_ONCE = 768
"""Their logits take 152 MB at V = 49,408, beside 202 MB of the weight's gradient at D = 1,024."""
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scored: Tensor,
    weights: Tensor,
    count: int | None = None,
    shard: Shard | None = None,
) -> CrossEntropy:
    """See the reference. Nothing waits for the device; if `count` is None, products are made for as many rows as positions.

    The gradient that arrives at the weighted losses must be one number for all scored positions, or backward raises.
    """
    training = torch.is_grad_enabled()
    for_hidden = training and hidden.requires_grad
    for_head = training and (weight.requires_grad or (bias is not None and bias.requires_grad))
    part = (0, "") if shard is None else (shard.first, shard.group.group_name)
    weighted, unweighted, *_ = _head_loss(hidden, weight, bias, targets, scored, weights, count, for_hidden, for_head, *part)
    return CrossEntropy(weighted, unweighted.detach())


def refusal(op: str, hidden: Tensor, weight: Tensor, *_: object, **__: object) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    if hidden.dtype != weight.dtype:
        return f"the hidden states are {hidden.dtype}, the head is {weight.dtype}"
    return toolchain.unfit(hidden)


def example(op: str, device: torch.device) -> tuple[Tensor, ...]:
    """Small arguments; one position is scored, so that one number is the gradient of all that are."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 24, 64), (300, 64), (300,)
    floats = [torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_() for shape in shapes]
    targets = torch.randint(300, (2, 24), generator=generator).to(device)
    return *floats, targets, torch.arange(48, device=device).view(2, 24) == 30, torch.ones(2, 24, device=device)


@torch.library.custom_op("megadiff::head_loss", mutates_args=())
def _head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scored: Tensor,
    weights: Tensor,
    count: int | None,
    for_hidden: bool,
    for_head: bool,
    first: int,
    group: str,
) -> Results:
    """Both losses, then the gradients of hidden (its dtype), weight and bias (float32), which are empty if not wanted."""
    flat, positions = hidden.flatten(0, -2), scored.numel()
    # Rows without a scored position, if there are fewer than `count`, go to a place behind the last position.
    rows = torch.nonzero_static(scored.flatten(), size=positions if count is None else count, fill_value=positions)[:, 0]
    at = rows.clamp_max(positions - 1)
    none = rows == positions
    own_targets = targets.flatten()[at].masked_fill(none, 0) - first
    own_weights = weights.flatten()[at].masked_fill(none, 0)
    offset = None if bias is None else bias.float()
    losses = flat.new_zeros(positions + 1, dtype=torch.float32)
    for_hidden_states = flat.new_zeros((positions + 1) * for_hidden, flat.shape[1])
    for_weight = torch.zeros(weight.shape if for_head else 0, dtype=torch.float32, device=flat.device)
    for_bias = flat.new_zeros(len(weight) if for_head and bias is not None else 0, dtype=torch.float32)
    buffer = flat.new_empty(min(ROWS_AT_ONCE, len(rows)), len(weight), dtype=torch.float32)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        chosen = flat[at[part]].masked_fill(none[part, None], 0)
        logits, figures = buffer[: len(chosen)], losses.new_empty(3, len(chosen))
        multiply(chosen, weight.T, logits)
        gradients = in_place(logits, flat.dtype) if for_hidden or for_head else None
        own = logits, offset, own_targets[part], own_weights[part], figures
        with toolchain.device_of(hidden):
            if group:
                run(*own, None, forward=True)
                _of_all_ranks(figures, group)
            if not group or gradients is not None:
                run(*own, gradients, forward=not group)
        best, total, of_target = figures
        losses.index_copy_(0, rows[part], total.log() + (best - of_target))
        if gradients is not None and for_hidden:
            of_hidden = losses.new_empty(chosen.shape)
            multiply(gradients, weight, of_hidden)
            for_hidden_states.index_copy_(0, rows[part], of_hidden.to(flat.dtype))
        if gradients is not None and for_head:
            accumulate(gradients.T, chosen, for_weight)
            for_bias += gradients.sum(0, dtype=torch.float32) if bias is not None else 0
    unweighted = losses[:positions].view(weights.shape)
    back = for_hidden_states[:positions].view(hidden.shape) if for_hidden else for_hidden_states
    return unweighted * weights, unweighted, back, for_weight, for_bias


@_head_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scored: Tensor,
    weights: Tensor,
    count: int | None,
    for_hidden: bool,
    for_head: bool,
    *_: object,
) -> Results:
    back = hidden.new_empty(hidden.shape if for_hidden else (0, hidden.shape[-1]))
    for_weight = weight.new_empty(weight.shape if for_head else 0, dtype=torch.float32)
    for_bias = weight.new_empty(len(weight) if for_head and bias is not None else 0, dtype=torch.float32)
    return torch.empty_like(weights), torch.empty_like(weights), back, for_weight, for_bias


def _of_all_ranks(figures: Tensor, group: str) -> None:
    """The figures of rows over all parts of the vocabulary, in place of those of this rank's part."""
    ranks = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]
    own_best = figures[0].clone()
    dist.all_reduce(figures[0], dist.ReduceOp.MAX, ranks)
    figures[1] *= (own_best - figures[0]).exp()
    dist.all_reduce(figures[1:], group=ranks)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    _, weight, bias, _, scored, *_ = inputs
    ctx.save_for_backward(scored, *output[2:])
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, gradient: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    scored, *own = ctx.saved_tensors
    factor = torch.where(scored, gradient, -torch.inf).amax()
    smallest = torch.where(scored, gradient, torch.inf).amin()
    torch._assert_async(
        smallest >= factor, "the gradients that arrive at the scored positions of head_loss are not all one number"
    )
    factor = torch.where(factor.isinf(), 0, factor)
    dtypes = own[0].dtype, *ctx.dtypes
    wanted = [_scaled(each, factor, dtype) for each, dtype in zip(own, dtypes, strict=True)]
    return *wanted, *[None] * 8


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """Of another dtype, without a second copy in float32; None if there is no gradient."""
    if dtype is None or not gradient.numel():
        return None
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


_head_loss.register_autograd(_backward, setup_context=_keep)
