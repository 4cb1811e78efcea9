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
from megadiff.kernels.tuning import Config, Defaults, configuration, options

DEFAULTS: Defaults = {0: {"block": 1024}, 80: {"block": 2048, "num_warps": 8}, 90: {"block": 4096, "num_warps": 8}}
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def cross_entropies(
    logits, bias, targets, weights, figures, gradients, rows, vocabulary, gradient_stride,
    HAS_BIAS: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Figures of each row and, if BACKWARD, weight x gradient, which may lie in the same row's memory. Grid: (R,).

    Args:
        logits: float32 [R, V].
        bias: float32 [V].
        targets: int64 [R]; out of range: the target is no token of this vocabulary.
        weights: float32 [R].
        figures: float32 [3, R]: the largest logit, the sum of exp(logit - largest), the target's logit (0 if it is no token);
            outputs if FORWARD, else inputs.
        gradients: [R, V] with this stride of rows, of 32 or 16 bits.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    gradients += row * gradient_stride
    target = tl.load(targets + row)
    if FORWARD:
        inside = (target >= 0) & (target < vocabulary)
        of_target = tl.load(logits + target, mask=inside, other=0.0)
        if HAS_BIAS:
            of_target += tl.load(bias + target, mask=inside, other=0.0)
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
        tl.store(figures + row, best)
        tl.store(figures + rows + row, total)
        tl.store(figures + 2 * rows + row, of_target)
    else:
        best, total = tl.load(figures + row), tl.load(figures + rows + row)
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


def run(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    figures: Tensor,
    gradients: Tensor | None,
    forward: bool,
) -> None:
    """Fill the figures float32 [3, R] of float32 logits [R, V], without their bias, if `forward`; and the gradients.

    Args:
        gradients: [R, V], in the logits' own memory or elsewhere; None: they are not wanted.
    """
    config = configuration("head_loss.cross_entropies", "", logits.dtype, logits.device, DEFAULTS)
    rows, vocabulary = logits.shape
    target = logits if gradients is None else gradients
    cross_entropies[(rows,)](
        logits, bias, targets, weights, figures, target, rows, vocabulary, target.stride(0),
        HAS_BIAS=bias is not None, FORWARD=forward, BACKWARD=gradients is not None, BLOCK=config["block"], **options(config),
    )  # fmt: skip


def in_place(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for [R, V] of a dtype in the memory of float32 logits [R, V], row by row."""
    return logits.view(dtype)[:, : logits.shape[1]]


def candidates(kernel: str, architecture: int) -> Iterator[Config]:
    """What tuning measures."""
    yield from ({"block": block, "num_warps": warps} for block in (1024, 2048, 4096, 8192) for warps in (4, 8, 16))


def cases() -> Iterator[Case]:
    """A chunk of rows of CLIP's vocabulary, for training (with figures of all ranks: only gradients) and for evaluation."""
    forms = [
        ("training bfloat16", torch.bfloat16, True),
        ("training float32", torch.float32, True),
        ("evaluation", None, True),
        ("figures given bfloat16", torch.bfloat16, False),
    ]
    for name, dtype, forward in forms:
        yield Case(name, functools.partial(_launch, dtype, forward), usual=name == "training bfloat16")


def _launch(dtype: torch.dtype | None, forward: bool, device: torch.device) -> object:
    logits, bias = torch.randn(768, 49_408, device=device), torch.randn(49_408, device=device)
    targets = torch.randint(49_408, (768,), device=device)
    figures = torch.stack([logits.amax(1), torch.full((768,), 1e4, device=device), logits[:, 0]])
    gradients = None if dtype is None else in_place(logits, dtype)
    run(logits, bias, targets, torch.ones(768, device=device), figures, gradients, forward)
    return figures, gradients
