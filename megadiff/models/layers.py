"""The smallest modules. Each initialises its own parameters, so that a model can be built under zero.Init or on meta.

Legend: B samples, S tokens of one modality, D width.

ZeRO-3 empties a parameter outside the forward of the module that owns it directly. So a module here owns its parameters through
nn.Linear or nn.Parameter, uses them only in its own forward, and never touches those of another module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadiff.kernels.joint_attention.reference import rms_normalise

Rule = Literal["xavier", "normal", "torch", "zero"]
"""Initialisation of a linear map: xavier uniform, normal with deviation 0.02, torch's nn.Linear default, or zero. Biases are 0
(torch: its default)."""

INITIAL_DEVIATION = 0.02


class Linear(nn.Linear):
    """nn.Linear with an initialisation rule; inputs are cast to the weight's dtype."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, rule: Rule = "xavier") -> None:
        self.rule: Rule = rule  # before nn.Linear's own __init__, which calls reset_parameters
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        initialise_linear(self.weight, self.bias, self.rule)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.to(self.weight.dtype), self.weight, self.bias)


def initialise_linear(weight: Tensor, bias: Tensor | None, rule: Rule) -> None:
    """Fill a linear map's parameters in place by `rule`."""
    match rule:
        case "xavier":
            nn.init.xavier_uniform_(weight)
        case "normal":
            fill_normal(weight)
        case "zero":
            nn.init.zeros_(weight)
        case "torch":
            bound = weight.shape[1] ** -0.5  # equals nn.Linear's kaiming_uniform_(a=sqrt(5))
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)
            return
    if bias is not None:
        nn.init.zeros_(bias)


def fill_normal(parameter: Tensor) -> None:
    """Fill a parameter in place with N(0, INITIAL_DEVIATION^2); on the meta device, where it holds nothing, do nothing.

    There torch 2.13 would import its compiler to compute a shape: 3 s of CPU whenever weights are loaded.
    """
    if not parameter.is_meta:
        nn.init.normal_(parameter, std=INITIAL_DEVIATION)


class Modulation(Linear):
    """adaLN: shifts, scales and gates from a conditioning vector, by one linear map of its SiLU.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (DiT), section 3.2.
    """

    def __init__(self, width: int, slots: int, *, rule: Rule = "zero", ones: Sequence[int] = ()) -> None:
        """Make `slots` vectors of `width`; the bias of those in `ones` starts at 1."""
        self.slots = slots
        self.ones = tuple(ones)
        super().__init__(width, slots * width, rule=rule)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            for slot in self.ones:
                self.bias[slot * self.in_features : (slot + 1) * self.in_features].fill_(1.0)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """[B, D] -> `slots` tensors [B, D]."""
        return super().forward(F.silu(input)).chunk(self.slots, dim=-1)


class HiddenProjection(nn.Module):
    """Two linear maps, SiLU between them, whose result the paper's network computes and drops beside a tower.

    They have no forward: their weights are kept for exporting such a network whole.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.up = Linear(width, width)
        self.down = Linear(width, outputs)


class RmsNorm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(D) * gain over the last axis, in float32 inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self, tokens: Tensor) -> Tensor:
        return rms_normalise(tokens, self.gain)


class Mlp(nn.Module):
    """Linear, exact GELU, linear; or SwiGLU: (SiLU(first half) * second half) of one linear, then a linear."""

    def __init__(self, width: int, hidden: int, kind: Literal["gelu", "swiglu"]) -> None:
        super().__init__()
        self.gated = kind == "swiglu"
        self.up = Linear(width, 2 * hidden if self.gated else hidden)
        self.down = Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        raised: Tensor = self.up(tokens)
        if self.gated:
            gate, value = raised.chunk(2, dim=-1)
            raised = F.silu(gate) * value
        else:
            raised = F.gelu(raised)
        lowered: Tensor = self.down(raised)
        return lowered


class CachedConstant:
    """A constant float32 tensor, computed on first use for each device and size, of which there are few.

    Not a buffer: DeepSpeed casts buffers to bfloat16, zero.Init rounds what a constructor computes, and a model on the meta
    device would lose them.
    """

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        """`compute` takes a device and sizes."""
        self.compute = compute
        self.cache: dict[tuple[object, ...], Tensor] = {}

    def __call__(self, device: torch.device, *sizes: int) -> Tensor:
        if (device, *sizes) in self.cache:
            return self.cache[(device, *sizes)]
        # A cached inference-mode tensor could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            constant = self.compute(device, *sizes)
        if type(constant) is torch.Tensor and not torch.compiler.is_compiling():  # fake tensors must not outlive their mode
            self.cache[(device, *sizes)] = constant
        return constant

    def __getstate__(self) -> dict[str, object]:
        return {"compute": self.compute, "cache": {}}
