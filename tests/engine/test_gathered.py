"""The linear map for weights that ZeRO-3 gathers and releases."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from megadiff.engine.gathered import linear


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_it_has_the_values_and_gradients_of_torchs_own(shape: tuple[int, ...], bias: bool, frozen: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    random = [torch.randn(size, dtype=torch.float64, generator=draw) for size in (shape, (7, 5), (7,))]
    results = []
    for function in (linear, F.linear):
        tensors = [values.clone().requires_grad_(index == 0 or not frozen) for index, values in enumerate(random)]
        result = function(*tensors) if bias else function(*tensors[:2])
        result.sin().sum().backward()
        results.append([result.detach(), *(tensor.grad for tensor in tensors)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_values_released_after_the_forward_pass_are_not_kept_and_those_gathered_before_the_backward_pass_are_used() -> None:
    rows, weight = torch.ones(2, 3, requires_grad=True), torch.nn.Parameter(torch.ones(4, 3))
    result = linear(rows, weight)
    gathered = StorageWeakRef(weight.untyped_storage())
    weight.data = torch.empty(0)
    assert gathered.expired()
    weight.data = torch.full((4, 3), 2.0)
    result.sum().backward()
    assert torch.equal(rows.grad, torch.full((2, 3), 8.0))
