"""What ZeRO-3 spends around each module, cut to what its weights need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero import stage3
from deepspeed.utils import set_z3_leaf_modules, z3_leaf_module
from torch import Tensor, nn


class _Linear(torch.autograd.Function):
    """A linear map that saves its weight itself.

    Torch's own saves the transpose, a view that keeps gathered values in memory from the forward pass to the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _plain_linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,) = gradients
        input, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        wanted: tuple[bool, bool, bool] = ctx.needs_input_grad
        return (
            (rows @ weight).view_as(input) if wanted[0] else None,
            rows.T @ input.reshape(-1, input.shape[-1]) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


_plain_linear = torch._C._nn.linear


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` for weights that ZeRO-3 gathers and releases; the same values and gradients.

    DeepSpeed's own (`memory_efficient_linear`) adds the bias in a pass of its own, and costs more per call.
    """
    if torch.compiler.is_compiling():  # a graph keeps the weight itself
        return _plain_linear(input, weight, bias)
    result: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return result


def release_linear_weights() -> None:
    """Let every `torch.nn.functional.linear` of this process be `linear`."""
    torch.nn.functional.linear = linear


@contextmanager
def gathered_whole(module: nn.Module, kind: type[nn.Module]) -> Iterator[None]:
    """ZeRO-3, if it wraps the module meanwhile, gathers all weights of each module of a kind at once."""
    set_z3_leaf_modules(module, [kind])
    own = stage3.z3_leaf_parameter
    # Such modules' gradients it would reduce in a hook of torch's, which does not see the tensors in a Stream.
    stage3.z3_leaf_parameter = lambda _: False
    try:
        yield
    finally:
        stage3.z3_leaf_parameter = own


def drop_idle_hooks(engine: Any) -> None:
    """Remove ZeRO-3's hooks from the modules that own no weight, and do not gather those of all that is in them.

    They gather nothing, and cost an autograd node for each tensor that enters or leaves the module.

    Args:
        engine: a DeepSpeedEngine with ZeRO-3.
    """
    offload = engine.optimizer.parameter_offload
    root: nn.Module = offload.module
    idle = [m for m in root.modules() if m is not root and not m._parameters and not z3_leaf_module(m)]
    tables = {id(table) for module in idle for table in (module._forward_hooks, module._forward_pre_hooks)}
    for handle in (*offload.forward_hooks, *offload.backward_hooks):
        if id(handle.hooks_dict_ref()) in tables:
            handle.remove()
