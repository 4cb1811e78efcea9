"""Holds an implementation of an op to a naive version of it, over poisoned memory.

What is not written shows: memory that torch hands out uninitialised is full of NaN, and so are input rows that nobody may read.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import deterministic
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""Absolute and relative, for results of size 1."""


def implementations(op: str, folder: str | None = None) -> list[Any]:
    """An op's reference, and its Triton twin where there are one and a GPU; to parametrise tests with."""
    room = f"megadiff.kernels.{folder or op}"
    found = [pytest.param(getattr(importlib.import_module(f"{room}.reference"), op), id="reference")]
    if importlib.util.find_spec(f"{room}.triton") and hasattr(twin := importlib.import_module(f"{room}.triton"), op):
        skipped = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        found.append(pytest.param(getattr(twin, op), id="triton", marks=[pytest.mark.gpu, skipped]))
    return found


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every tensor that is allocated but not filled holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


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
    outputs, _ = tree_flatten(run(*copies))
    own = [output for output in outputs if output.requires_grad]
    generator = torch.Generator().manual_seed(7)
    back = [
        torch.randn(output.shape, generator=generator).to(output) if arriving is None else torch.full_like(output, arriving)
        for output in own
    ]
    gradients = torch.autograd.grad(own, leaves, back) if leaves else ()
    return Outcome([output.detach() for output in outputs], list(gradients))


def assert_agrees(
    run: Callable[..., Any],
    naive: Callable[..., Any],
    *arguments: Any,
    tolerance: float,
    arriving: float | None = None,
) -> None:
    """An implementation gives what a naive version gives of the same numbers in float64, outputs and every gradient.

    Args:
        arguments: NaN where nobody may read; a gradient is wanted of those that require one.
        tolerance: absolute and relative.
        arriving: see `outcome`.
    """
    exact = tree_map(
        lambda leaf: (
            leaf.detach().double().requires_grad_(leaf.requires_grad)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
            else leaf
        ),
        arguments,
    )
    with poisoned_memory():
        found = outcome(run, arguments, arriving=arriving)
    expected = outcome(naive, exact, arriving=arriving)
    for kind, ours, wanted in zip(Outcome._fields, found, expected, strict=True):
        assert len(ours) == len(wanted), f"{len(ours)} {kind}, and {len(wanted)} are expected"
        for index, (one, other) in enumerate(zip(ours, wanted, strict=True)):
            assert one.shape == other.shape
            torch.testing.assert_close(
                one.to(other.dtype), other, atol=tolerance, rtol=tolerance, msg=lambda text, k=kind, i=index: f"{k} {i}: {text}"
            )


def numbers(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    """Random normal numbers of a dtype that want a gradient."""
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def poison(tensor: Tensor, where: Tensor) -> Tensor:
    """The same, NaN where a mask over its leading axes says so."""
    with torch.no_grad():
        tensor[where] = torch.nan
    return tensor
