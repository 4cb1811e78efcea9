"""Holds an implementation of an op to a naive version of it, over poisoned memory.

What is not written shows: memory that torch hands out uninitialised is full of NaN, and so are input rows that nobody may read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import deterministic

from megadiff.kernels import toolchain
from megadiff.kernels.agreement import Outcome, converted, outcome, relative_errors

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""Absolute and relative, for results of size 1."""


RELATIVE_ERRORS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of kernels against the reference in float64, root mean square."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""The one that kernels are tested on: a GPU if there is one, else the interpreter's."""
KERNEL_DTYPES = (torch.float32, torch.float16) if toolchain.interpreted() else (torch.float32, torch.float16, torch.bfloat16)
"""Triton's interpreter computes nonsense in bfloat16."""


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
    with poisoned_memory():
        found = outcome(run, arguments, arriving=arriving)
    expected = outcome(naive, converted(arguments, torch.float64), arriving=arriving)
    for kind, ours, wanted in zip(Outcome._fields, found, expected, strict=True):
        assert len(ours) == len(wanted), f"{len(ours)} {kind}, and {len(wanted)} are expected"
        for index, (one, other) in enumerate(zip(ours, wanted, strict=True)):
            assert one.shape == other.shape
            torch.testing.assert_close(
                one.to(other.dtype), other, atol=tolerance, rtol=tolerance, msg=lambda text, k=kind, i=index: f"{k} {i}: {text}"
            )


def assert_equals_reference(
    run: Callable[..., Any], reference: Callable[..., Any], *arguments: Any, limit: float, arriving: float | None = None
) -> None:
    """A kernel gives what the reference gives of the same numbers in float64, with relative errors (root mean square) below
    a limit: outputs and every gradient.

    Args:
        arguments: as of `assert_agrees`.
        arriving: see `outcome`.
    """
    with poisoned_memory():
        actual = outcome(run, arguments, arriving=arriving)
    errors = relative_errors(actual, outcome(reference, converted(arguments, torch.float64), arriving=arriving))
    assert errors
    assert not {name: error for name, error in errors.items() if not error <= limit}


def numbers(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    """Random normal numbers of a dtype that want a gradient."""
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def poison(tensor: Tensor, where: Tensor) -> Tensor:
    """The same, NaN where a mask over its leading axes says so."""
    with torch.no_grad():
        tensor[where] = torch.nan
    return tensor
