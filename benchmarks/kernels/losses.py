"""Cross entropy of scored tokens out of hidden states, with the gradients of hidden states and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.measure import TRAINING, Absent, Case, Machine, Ready
from megadiff.kernels.agreement import converted
from megadiff.kernels.head_loss import reference


class Shape(NamedTuple):
    """B x L positions, of which a share is scored."""

    samples: int
    length: int
    width: int
    vocabulary: int
    share: float

    def __str__(self) -> str:
        return f"B={self.samples} L={self.length} D={self.width} V={self.vocabulary} scored {self.share:.0%}"


SHAPES = [Shape(64, 120, 1024, 49_408, share) for share in (1.0, 0.5)]
TOYS = [Shape(2, 7, 24, 300, 0.5)]
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]


def numbers(shape: Shape, machine: Machine) -> Arguments:
    device, dtype = machine.device, machine.dtype
    places = shape.samples, shape.length
    hidden = torch.randn(*places, shape.width, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(shape.vocabulary, shape.width, device=device) / shape.width**0.5).to(dtype).requires_grad_()
    bias = torch.zeros(shape.vocabulary, device=device, dtype=dtype).requires_grad_()
    targets = torch.randint(shape.vocabulary, places, device=device)
    count = round(shape.share * targets.numel())
    scored = (torch.randperm(targets.numel(), device=device) < count).view(places)
    return hidden, weight, bias, targets, scored, torch.ones(places, device=device), count


def cases(machine: Machine) -> Iterator[Case]:
    for shape in TOYS if machine.toy else SHAPES:
        count = round(shape.share * shape.samples * shape.length)
        flops = 3 * 2.0 * count * shape.width * shape.vocabulary
        # Forward reads the head and hidden states; backward reads them again and writes gradients, the head's in float32.
        moved = shape.width * (shape.vocabulary * (2 * machine.dtype.itemsize + 4) + 3 * count * machine.dtype.itemsize)
        yield Case("head_loss", str(shape), TRAINING, flops, moved, peers(shape, machine))


def peers(shape: Shape, machine: Machine) -> dict[str, Callable[[], Ready]]:
    def of(run: Callable[..., Tensor]) -> Ready:
        return Ready(run, numbers(shape, machine))

    return {
        "reference, float32": lambda: Ready(_reference, converted(numbers(shape, machine), torch.float32)),
        "megadiff": partial(_ours, shape, machine),
        "eager": lambda: of(_eager),
        "compiled eager": lambda: of(_of_rows(machine.compiled(_mean_loss))),
        "F.linear_cross_entropy": lambda: of(_of_rows(_chunked)),
        "Liger": lambda: of(_of_rows(_liger())),
    }


def _reference(*arguments: Tensor) -> Tensor:
    return reference.head_loss(*arguments).weighted.sum()


def _ours(shape: Shape, machine: Machine) -> Ready:
    from megadiff.kernels.head_loss import op

    arguments = numbers(shape, machine)
    if (refusal := op.refusal("head_loss", *arguments)) is not None:
        raise Absent(refusal)
    return Ready(lambda *own: op.head_loss(*own).weighted.sum(), arguments)


def _of_rows(mean_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Peers take rows, and no weights of theirs: the sum of the scored rows' losses, with the rows gathered before."""

    def run(
        hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scored: Tensor, weights: Tensor, count: int
    ) -> Tensor:
        rows = scored.flatten().nonzero_static(size=count)[:, 0]
        return count * mean_loss(hidden.flatten(0, 1)[rows], weight, bias, targets.flatten()[rows])

    return run


def _mean_loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets)


def _eager(*arguments: Tensor) -> Tensor:
    return _of_rows(_mean_loss)(*arguments)


def _chunked(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    from torch.nn import LinearCrossEntropyOptions

    return F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, options=LinearCrossEntropyOptions())


def _liger() -> Callable[..., Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, bias, targets: loss(weight, hidden, targets, bias)
