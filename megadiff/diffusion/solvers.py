"""The interface of solvers, which move one modality from a time to an earlier one.

A solver asks for a readout at the step's beginning, moves its state with the answer, and may ask once more at the step's end.
It knows its own modality only; the sampler keeps all clocks together. A solver belongs to one run of the sampler: some remember
what they saw before.
Legend: B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from megadiff.types import Dense, SampledRows

SolverReadout = Dense | SampledRows


class SolverStep(NamedTuple):
    """One step of one modality.

    Attributes:
        now, then: float32 [B], the times at the step's beginning and end.
        keys: int64 [B]; no other step has them.
        last: whether the step ends at t = 0.
    """

    now: Tensor
    then: Tensor
    keys: Tensor
    last: bool


class StepEnd(NamedTuple):
    """The state at a step's end, and the slope that led there; None where no second evaluation is wanted."""

    state: Tensor
    slope: Tensor | None = None


class Solver(Protocol):
    """The steps of one modality.

    Which steps want a second evaluation must not depend on the samples: under ZeRO-3 all ranks make the same calls.
    """

    def warp(self, fraction: float) -> float:
        """The clock, as a share of its starting time, when this fraction of the run is left."""

    def plan(self, state: Tensor, steps: Sequence[SolverStep]) -> None:
        """Count what the steps of a run will ask for. Called before a run in which every step is made once."""

    def request(self, state: Tensor, step: SolverStep) -> SolverReadout:
        """What to read out at the step's beginning."""

    def move(self, state: Tensor, step: SolverStep, request: Any, prediction: Any) -> StepEnd:
        """The state at the step's end, from the prediction that answers `request`."""

    def correct(self, state: Tensor, step: SolverStep, end: StepEnd, prediction: Any) -> Tensor:
        """The state at the step's end, corrected by a second prediction, made at `end`; called only where `end` has a slope."""

    def finished(self, state: Tensor) -> bool:
        """Whether further steps would change nothing."""

    def forget(self) -> None:
        """Forget the steps so far: the next one does not continue them."""


class SolverBase:
    """Defaults: an even clock, no plan, no second evaluation, no memory."""

    def warp(self, fraction: float) -> float:
        return fraction

    def plan(self, state: Tensor, steps: Sequence[SolverStep]) -> None:
        """Nothing depends on it."""

    def correct(self, state: Tensor, step: SolverStep, end: StepEnd, prediction: Any) -> Tensor:
        return end.state

    def finished(self, state: Tensor) -> bool:
        return False

    def forget(self) -> None:
        """There is nothing to forget."""
