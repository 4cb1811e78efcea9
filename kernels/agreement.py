"""How far an implementation of an op is from another: relative errors of its outputs and of every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

T = TypeVar("T")


class Outcome(NamedTuple):
    """The tensors of a result in order, and the gradient of every argument that requires one."""

    outputs: list[Tensor]
    gradients: list[Tensor]


def outcome(run: Callable[..., Any], arguments: tuple[Any, ...], *, arriving: float | None = None) -> Outcome:
    """What an op makes of copies of the arguments, and the gradients that it gives back.

    Args:
        arriving: the gradient of every number of the outputs; None: random ones, the same at every call.
    """
    copies = tree_map(
        lambda leaf: leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf, arguments
    )
    leaves = [leaf for leaf in tree_leaves(copies) if isinstance(leaf, Tensor) and leaf.requires_grad]
    outputs = [leaf for leaf in tree_leaves(run(*copies)) if isinstance(leaf, Tensor)]
    own = [output for output in outputs if output.requires_grad]
    generator = torch.Generator().manual_seed(7)
    back = [
        torch.randn(output.shape, generator=generator).to(output) if arriving is None else torch.full_like(output, arriving)
        for output in own
    ]
    gradients = torch.autograd.grad(own, leaves, back) if leaves else ()
    return Outcome([output.detach() for output in outputs], list(gradients))


def converted(arguments: T, dtype: torch.dtype) -> T:
    """The same, with every floating-point tensor in another dtype."""

    def convert(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return leaf
        return leaf.detach().to(dtype).requires_grad_(leaf.requires_grad)

    result: T = tree_map(convert, arguments)
    return result


def relative_errors(actual: Outcome, expected: Outcome) -> dict[str, float]:
    """|actual - expected| / |expected| of every output and gradient, as root mean squares in float64; infinite for a NaN.

    Of integers: the share that differs.
    """
    pairs = [
        (f"{kind} {index}", one, other)
        for kind, ours, theirs in zip(Outcome._fields, actual, expected, strict=True)
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True))
    ]
    return {name: relative_error(one, other) for name, one, other in pairs}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Of one tensor, see `relative_errors`."""
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    if not actual.is_floating_point():
        return (actual != expected).double().mean().item() if actual.numel() else 0.0
    if not bool(actual.isfinite().all()):
        return float("inf")
    if not actual.numel():
        return 0.0
    difference = (actual.double() - expected.double()).square().mean().sqrt().item()
    scale = expected.double().square().mean().sqrt().item()
    return difference / scale if scale else difference
