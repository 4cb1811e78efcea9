"""A kernel at real sizes in bfloat16, beside the reference in bfloat16, both against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megadiff.kernels.agreement import converted, outcome, relative_errors
from tests.kernels.harness import poisoned_memory

NO_WORSE = 1.1
"""Times the error of the reference in bfloat16."""


def assert_no_worse_than_eager(
    run: Callable[..., Any], reference: Callable[..., Any], *arguments: Any, arriving: float | None = None
) -> None:
    """Outputs and every gradient of a kernel over poisoned memory, by their relative root mean square errors."""
    with poisoned_memory():
        actual = outcome(run, arguments, arriving=arriving)
    expected = outcome(reference, converted(arguments, torch.float64), arriving=arriving)
    eager = relative_errors(outcome(reference, arguments, arriving=arriving), expected)
    errors = relative_errors(actual, expected)
    assert errors
    assert not {name: (error, eager[name]) for name, error in errors.items() if not error <= NO_WORSE * eager[name]}
