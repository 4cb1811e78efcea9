"""The way of a gradient in ZeRO-1 and 2."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megadiff.config.layout import Layout
from megadiff.engine.optimizer import SPLIT
from megadiff.engine.zero_gradients import flatten_once, norm_at_once

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize(("tensor_rank", "counted"), [(0, [0, 1, 2]), (1, [1])])
def test_a_norm_of_norms_counts_the_gradients_that_deepspeed_counts(tensor_rank: int, counted: list[int]) -> None:
    gradients, padding = [torch.randn(3, 2), torch.randn(4), torch.randn(5)], torch.randn(1)
    padding._zero_padding = True  # type: ignore[attr-defined]
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in gradients]
    setattr(parameters[1], SPLIT, True)
    wrapper = SimpleNamespace(
        get_grad_norm_direct=lambda gradients, parameters: sum(gradient.square().sum() for gradient in gradients) ** 0.5
    )
    norm_at_once(wrapper, Layout(rank=tensor_rank, world=2, tensor=2))
    expected = torch.cat([gradients[index].flatten() for index in counted]).norm()
    torch.testing.assert_close(wrapper.get_grad_norm_direct([*gradients, padding], parameters), expected)


def test_gradients_become_one_float32_tensor_that_keeps_their_padding_apart() -> None:
    parts = [torch.randn(3, 2, dtype=torch.bfloat16).T, torch.randn(5, dtype=torch.bfloat16), torch.zeros(3)]
    parts[2]._zero_padding = True  # type: ignore[attr-defined]
    wrapper: Any = SimpleNamespace(get_flat_partition=lambda *_, **__: parts)
    flatten_once(wrapper)
    group = wrapper.get_flat_partition()
    assert group.flat_partition.dtype == torch.float32
    assert torch.equal(group.flat_partition, torch.cat([part.flatten() for part in parts]).float())
    assert [(view.numel(), view._zero_padding) for view in group] == [(6, False), (5, False), (3, True)]
