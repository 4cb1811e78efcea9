"""Stops a run whose numbers stay non-finite. All inputs are equal on all ranks, so all ranks decide alike."""

from __future__ import annotations

import math
from collections.abc import Callable

from megadiff.config.errors import UserError
from megadiff.config.run_folder import IncidentKind
from megadiff.engine.api import StepResult
from megadiff.training.incidents import Incidents


class Diverged(UserError):
    """The run's numbers are non-finite; training cannot continue."""


class Health:
    """Watches every step's result.

    Attributes:
        skipped_steps: since the start or resumption of the stage.
    """

    def __init__(self, most_in_a_row: int, incidents: Incidents) -> None:
        """Args: most_in_a_row: skipped steps after which the run stops; every applied step resets the count."""
        self.skipped_steps = 0
        self._most, self._incidents = most_in_a_row, incidents
        self._in_a_row = 0

    def check(self, result: StepResult, step: int, samples: Callable[[], str]) -> None:
        """Count and record skipped steps.

        Args:
            samples: names the step's samples.

        Raises:
            Diverged: a non-finite loss or gradient norm reached the weights, or too many steps in a row were skipped.
        """
        finite = math.isfinite(result.total) and math.isfinite(result.grad_norm)
        if result.applied and finite:
            self._in_a_row = 0
            return
        where = f"step {step}: loss {result.total:g}, gradient norm {result.grad_norm:g}"
        if result.applied:
            raise Diverged(
                f"{where} is not finite and was applied; lower optimizer.learning_rate and resume from the last checkpoint"
            )
        self.skipped_steps += 1
        self._in_a_row += 1
        what = f"loss {result.total:g}, gradient norm {result.grad_norm:g}"
        self._incidents.add(IncidentKind.SKIPPED, step, f"{what}; {samples()}")
        if self._in_a_row >= self._most:
            raise Diverged(
                f"{where}: {self._in_a_row} steps in a row were skipped (safeguards.skipped_in_a_row); "
                "lower optimizer.learning_rate and go on from the last checkpoint"
            )
