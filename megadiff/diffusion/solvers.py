"""How one modality moves from a time to an earlier one: Heun for Gaussian processes, exact ancestral unmasking for masked ones.

A solver asks for a readout at the step's beginning, moves its state with the answer, and may ask once more at the step's end.
It knows its own modality only; the sampler keeps all clocks together.
Legend: B samples, R rows.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.masked import Masked
from megadiff.diffusion.process import Process
from megadiff.types import Dense, Readout, RowLogits


class Moved(NamedTuple):
    """A state at the step's end, and the slope that led there; None where no second evaluation is wanted."""

    state: Tensor
    slope: Tensor | None


class Solver(Protocol):
    """The steps of one modality. `keys` int64 [B] belong to the step: every step has others.

    Which steps want a second evaluation must not depend on the samples: under ZeRO-3 all ranks make the same calls.
    """

    steep_at_zero: bool
    """Whether the process changes as sqrt(t) near t = 0, so that steps should be even in sqrt(t)."""

    def request(self, state: Tensor, now: float, then: float, keys: Tensor) -> Readout:
        """What to read out at `state`, which stands at `now`."""

    def move(self, state: Tensor, now: float, then: float, keys: Tensor, request: Readout, prediction: Tensor) -> Moved:
        """The state at `then`, from what `request` gave."""

    def correct(self, state: Tensor, now: float, then: float, moved: Moved, prediction: Tensor) -> Tensor:
        """The state at `then`, from a second prediction made at `moved`; asked for only where `moved` has a slope."""


class Heun:
    """Second order: Euler's step, then the step again with the average of the slopes at both ends.

    The step to t = 0 is Euler's alone: at t = 0 there is no noise whose slope could be told.
    """

    def __init__(self, process: Gaussian) -> None:
        self.process = process
        self.steep_at_zero = process.config.schedule == "vp"

    def request(self, state: Tensor, now: float, then: float, keys: Tensor) -> Dense:
        return Dense()

    def move(self, state: Tensor, now: float, then: float, keys: Tensor, request: Readout, prediction: Tensor) -> Moved:
        slope = self._slope(prediction, state, now)
        return Moved(self._step(state, now, then, slope), slope if then > 0 else None)

    def correct(self, state: Tensor, now: float, then: float, moved: Moved, prediction: Tensor) -> Tensor:
        if moved.slope is None:
            return moved.state
        return self._step(state, now, then, 0.5 * (moved.slope + self._slope(prediction, moved.state, then)))

    def _slope(self, prediction: Tensor, state: Tensor, time: float) -> Tensor:
        return self.process.slope(prediction.float(), state, _times(time, state))

    def _step(self, state: Tensor, now: float, then: float, slope: Tensor) -> Tensor:
        return self.process.integrate(state, _times(now, state), _times(then, state), slope)


class Ancestral:
    """Positions are chosen first, by the exact probability of unmasking; the head is asked about those rows only.

    Where no row is chosen the readout is of none, but it is still a readout: the head runs on every rank.
    """

    steep_at_zero = False

    def __init__(self, process: Masked) -> None:
        self.process = process

    def request(self, state: Tensor, now: float, then: float, keys: Tensor) -> RowLogits:
        chosen = self.process.chosen(state, _times(now, state), _times(then, state), keys)
        return RowLogits(chosen.flatten().nonzero()[:, 0])

    def move(self, state: Tensor, now: float, then: float, keys: Tensor, request: Readout, prediction: Tensor) -> Moved:
        assert isinstance(request, RowLogits)  # its own
        return Moved(self.process.fill(state, request.rows, prediction, keys), None)

    def correct(self, state: Tensor, now: float, then: float, moved: Moved, prediction: Tensor) -> Tensor:
        return moved.state


def build_solver(process: Process) -> Solver:
    """The solver of a process."""
    if isinstance(process, Gaussian):
        return Heun(process)
    if isinstance(process, Masked):
        return Ancestral(process)
    raise TypeError(f"{process.name}: there is no solver for a {type(process).__name__} process")


def _times(value: float, like: Tensor) -> Tensor:
    """float32 [B]."""
    return torch.full((len(like),), value, dtype=torch.float32, device=like.device)
