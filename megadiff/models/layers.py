"""The smallest modules. Each says how its own parameters start (initial.py).

Legend: B samples, S tokens of one modality, D width.

ZeRO-3 empties a parameter outside the forward of the module that owns it directly. So a module here owns its parameters through
nn.Linear or nn.Parameter, uses them only in its own forward, and never touches those of another module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadiff.kernels.qk_norm_pack.reference import rms_normalise
from megadiff.models.initial import ONE, ZERO, Constant, Initial, Normal, Uniform

Rule = Literal["xavier", "normal", "torch", "zero"]
"""Initialisation of a linear map: xavier uniform, normal with deviation 0.02, torch's nn.Linear default, or zero. Biases are 0
(torch: its default)."""

INITIAL_DEVIATION = 0.02


class Linear(nn.Linear):
    """nn.Linear with an initialisation rule; inputs are cast to the weight's dtype."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, rule: Rule = "xavier") -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.rule: Rule = rule

    def reset_parameters(self) -> None:
        """Nothing: nn.Linear's constructor calls this."""

    def initial(self) -> dict[str, Initial]:
        return linear_initial(self.out_features, self.in_features, self.rule)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.to(self.weight.dtype), self.weight, self.bias)


def linear_initial(outputs: int, inputs: int, rule: Rule) -> dict[str, Initial]:
    """The distributions of a linear map's weight and bias."""
    match rule:
        case "xavier":
            return {"weight": Uniform(math.sqrt(6 / (inputs + outputs))), "bias": ZERO}
        case "normal":
            return {"weight": Normal(INITIAL_DEVIATION), "bias": ZERO}
        case "zero":
            return {"weight": ZERO, "bias": ZERO}
        case "torch":
            bound = inputs**-0.5  # equals nn.Linear's kaiming_uniform_(a=sqrt(5))
            return {"weight": Uniform(bound), "bias": Uniform(bound)}


class Modulation(Linear):
    """adaLN: shifts, scales and gates from a conditioning vector, by one linear map of its SiLU.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (DiT), section 3.2.
    """

    def __init__(self, width: int, slots: int, *, rule: Rule = "zero", ones: Sequence[int] = ()) -> None:
        """Make `slots` vectors of `width`; the bias of those in `ones` starts at 1."""
        self.slots = slots
        self.ones = tuple(ones)
        super().__init__(width, slots * width, rule=rule)

    def initial(self) -> dict[str, Initial]:
        ones = tuple((slot * self.in_features, (slot + 1) * self.in_features) for slot in self.ones)
        before = super().initial()
        return {**before, "bias": Constant(0.0, ones)} if ones else before

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
    """x / sqrt(|x|^2 + 1e-24) * sqrt(D) * gain over the last axis, in float32 inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(width))

    def initial(self) -> dict[str, Initial]:
        return {"gain": ONE}

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
