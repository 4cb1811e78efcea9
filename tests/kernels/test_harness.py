"""The harness finds what it is for."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.harness import assert_agrees, numbers, poisoned_memory


def double(values):
    return values * 2


def unwritten(values):
    result = torch.empty_like(values)
    result[:-1] = 2 * values[:-1]
    return result


def crooked(values):
    """The right result with a wrong gradient."""
    return 2 * values + (values.detach() - values)


def test_memory_that_is_not_filled_is_nan_only_inside():
    with poisoned_memory():
        assert torch.empty(50).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_right_implementation_agrees():
    assert_agrees(double, double, numbers(5), tolerance=1e-6)


@pytest.mark.parametrize(("wrong", "message"), [(unwritten, "outputs 0"), (crooked, "gradients 0")])
def test_what_is_not_written_and_a_wrong_gradient_are_found(wrong, message):
    with pytest.raises(AssertionError, match=message):
        assert_agrees(wrong, double, numbers(5), tolerance=1e-6)
