"""This rank's part of every parameter, for any backend: extents by the model's names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megadiff.weights.boxes import Extent
from megadiff.weights.checkpoint import MOMENTS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Part of a trained parameter, of which this rank holds the fp32 master and Adam's moments.

    Attributes:
        shape: the whole parameter's.
        extent: the part.
        flat: the tensor that the optimizer steps.
        offset: the part's beginning within `flat`.
        owned: whether this rank saves the piece; False if it repeats another rank's (ZeRO-0).
    """

    name: str
    shape: Shape
    extent: Extent
    flat: Tensor
    offset: int
    owned: bool

    @property
    def master(self) -> Tensor:
        """Float32 view [extent.size]."""
        return self._view(self.flat.detach())

    @property
    def gradient(self) -> Tensor | None:
        """View [extent.size] of the gradient that the optimizer is about to take; None at other times."""
        return None if self.flat.grad is None else self._view(self.flat.grad)

    def moment(self, optimizer: torch.optim.Optimizer, kind: str) -> Tensor:
        """Float32 view [extent.size] of one of MOMENTS; created as zeros if the optimizer has not stepped yet."""
        return self._view(optimizer_state(optimizer, self.flat)[kind])

    def _view(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1)[self.offset : self.offset + self.extent.size]


@dataclass
class FrozenPiece:
    """A frozen parameter: the part that this rank's forward reads, and the fp32 part of that which it saves.

    Attributes:
        local: flat view of this rank's copy (the whole parameter, its ZeRO-3 partition, its shard), in the model's dtype.
        local_extent: the part of the whole parameter that `local` is.
        extent: the part that this rank saves: a range within `local_extent`, of the same boxes.
        master: float32 [extent.size]; the model's copy may be rounded to bf16.
    """

    name: str
    shape: Shape
    local: Tensor
    local_extent: Extent
    extent: Extent
    master: Tensor

    def write(self, values: Tensor) -> None:
        """Set the whole of `local` to new float32 values."""
        self.local.copy_(values.to(self.local.device))
        begin = self.extent.start - self.local_extent.start
        self.master = values[begin : begin + self.extent.size].to(self.master.device, torch.float32).clone()


@dataclass
class Pieces:
    """All pieces of this rank, and the way from changed masters to the weights that forward reads.

    Attributes:
        shapes: by name, the whole shape of every parameter in this rank's part of the model, with a piece here or not.
        write_through: copies the masters to the weights that forward reads. Collective.
    """

    optimizer: torch.optim.Optimizer
    trained: Sequence[Piece]
    frozen: Sequence[FrozenPiece]
    shapes: dict[str, Shape]
    write_through: Callable[[], None]

    def publish(self) -> None:
        """Copy the masters to the weights that forward reads. Collective."""
        with torch.no_grad():
            self.write_through()

    @property
    def adam_steps(self) -> int:
        """The number of steps in the moments."""
        counts = [
            int(self.optimizer.state[piece.flat]["step"]) for piece in self.trained if self.optimizer.state.get(piece.flat)
        ]
        return max(counts, default=0)

    def set_adam_steps(self, count: int) -> None:
        for flat in {id(piece.flat): piece.flat for piece in self.trained}.values():
            optimizer_state(self.optimizer, flat)["step"].fill_(float(count))


def optimizer_state(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """AdamW's state of one tensor, created as it would be before the first step."""
    state: dict[str, Tensor] = optimizer.state[flat]
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(flat.detach())
    return state
