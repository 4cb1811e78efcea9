"""Cross entropies of chunks of logits, which their gradients take the place of.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from megadiff.kernels.toolchain.triton import Case
from megadiff.kernels.tuning import Defaults, configuration, options

DEFAULTS: Defaults = {0: {"block": 1024}, 80: {"block": 2048, "num_warps": 8}, 90: {"block": 4096, "num_warps": 8}}
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def cross_entropies(
    logits, bias, targets, weights, losses, gradients, vocabulary, gradient_stride,
    HAS_BIAS: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's cross entropy and, if BACKWARD, weight x its gradient, which may lie in the same row's memory. Grid: (R,).

    Args:
        logits: float32 [R, V].
        bias: float32 [V].
        targets: int64 [R].
        weights, losses: float32 [R].
        gradients: [R, V] with this stride of rows, of 32 or 16 bits.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    gradients += row * gradient_stride
    target = tl.load(targets + row)
    of_target = tl.load(logits + target)
    if HAS_BIAS:
        of_target += tl.load(bias + target)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, mask=columns < vocabulary, other=float("-inf"))
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=columns < vocabulary, other=0.0)
        before, top = top, tl.maximum(top, z)
        total = total * tl.exp(before - top) + tl.exp(z - top)
    best = tl.max(top, 0)
    total = tl.sum(total * tl.exp(top - best), 0)
    tl.store(losses + row, tl.log(total) + (best - of_target))
    if BACKWARD:
        factor = tl.load(weights + row)
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = tl.load(logits + columns, mask=columns < vocabulary, other=float("-inf"))
            if HAS_BIAS:
                z += tl.load(bias + columns, mask=columns < vocabulary, other=0.0)
            gradient = factor * (tl.exp(z - best) / total - (columns == target).to(tl.float32))
            # A block of 16-bit gradients lies where logits of this block and of those before it were: all threads have
            # read them from here on.
            tl.debug_barrier()
            tl.store(gradients + columns, gradient.to(gradients.dtype.element_ty), mask=columns < vocabulary)


def differentiate(
    logits: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, losses: Tensor, gradients: Tensor | None
) -> None:
    """Fill the cross entropies [R] of float32 logits [R, V], without their bias, and the gradients, where they are wanted.

    Args:
        gradients: [R, V], in the logits' own memory or elsewhere.
    """
    config = configuration("head_loss.cross_entropies", "", logits.dtype, logits.device, DEFAULTS)
    target = logits if gradients is None else gradients
    cross_entropies[(len(logits),)](
        logits, bias, targets, weights, losses, target, logits.shape[1], target.stride(0),
        HAS_BIAS=bias is not None, BACKWARD=gradients is not None, BLOCK=config["block"], **options(config),
    )  # fmt: skip


def in_place(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for [R, V] of a dtype in the memory of float32 logits [R, V], row by row."""
    return logits.view(dtype)[:, : logits.shape[1]]


def cases() -> Iterator[Case]:
    """A chunk of rows of CLIP's vocabulary, for training and for evaluation."""
    for name, dtype in (("training bfloat16", torch.bfloat16), ("training float32", torch.float32), ("evaluation", None)):
        logits, bias = torch.empty(768, 49_408, device="meta"), torch.empty(49_408, device="meta")
        targets, losses = torch.empty(768, dtype=torch.int64, device="meta"), torch.empty(768, device="meta")
        gradients = None if dtype is None else in_place(logits, dtype)
        launch = functools.partial(differentiate, logits, bias, targets, losses, losses, gradients)
        yield Case(name, launch, usual=dtype == torch.bfloat16)
