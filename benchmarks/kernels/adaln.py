"""Gated residual, LayerNorm and modulation between two linear maps, with the gradients of tokens and vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.measure import FORWARD, TRAINING, Absent, Case, Machine, Ready
from megadiff.kernels.agreement import converted
from megadiff.kernels.gated_adaln import reference

SHAPES = [(64, 376, 1024), (64, 1144, 1024), (16, 4216, 1024), (64, 376, 4096)]
TOYS = [(2, 7, 24)]
Shape = tuple[int, int, int]
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, None, float, bool]


def numbers(shape: Shape, machine: Machine) -> Arguments:
    """The vectors are parts of one linear map's output, as in a block."""
    samples, _, width = shape
    tokens, change = (torch.randn(shape, device=machine.device, dtype=machine.dtype).requires_grad_() for _ in range(2))
    vectors = torch.randn(samples, 6 * width, device=machine.device, dtype=machine.dtype)
    gate, shift, scale = (vector.requires_grad_() for vector in vectors.chunk(6, dim=-1)[2:5])
    return tokens, change, gate, shift, scale, None, 1e-6, True


def cases(machine: Machine) -> Iterator[Case]:
    for shape in TOYS if machine.toy else SHAPES:
        samples, length, width = shape
        once = samples * length * width * machine.dtype.itemsize
        for passes, times in ((FORWARD, 4), (TRAINING, 4 + 6)):
            name = f"B={samples} S={length} D={width}"
            yield Case("gated_adaln", name, passes, 0.0, times * once, peers(shape, machine))


def peers(shape: Shape, machine: Machine) -> dict[str, Callable[[], Ready]]:
    return {
        "reference, float32": lambda: Ready(reference.gated_adaln, converted(numbers(shape, machine), torch.float32)),
        "megadiff": partial(_ours, shape, machine),
        "eager": lambda: Ready(reference.gated_adaln, numbers(shape, machine)),
        "Inductor": lambda: Ready(machine.compiled(reference.gated_adaln), numbers(shape, machine)),
    }


def _ours(shape: Shape, machine: Machine) -> Ready:
    from megadiff.kernels.gated_adaln import op

    arguments = numbers(shape, machine)
    if (refusal := op.refusal("gated_adaln", *arguments)) is not None:
        raise Absent(refusal)
    return Ready(op.gated_adaln, arguments)
