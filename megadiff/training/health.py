"""Stops a run with non-finite numbers. All inputs are equal on all ranks, so all ranks decide alike."""

from __future__ import annotations

import logging
import math

from megadiff.config.errors import UserError
from megadiff.engine.api import StepResult

log = logging.getLogger(__name__)

MOST_SKIPPED_IN_A_ROW = 10
"""Consecutive skipped steps after which the run stops; every applied step resets the count."""


class Diverged(UserError):
    """The run's numbers are non-finite; training cannot continue."""


class Health:
    """Watches every step's result."""

    def __init__(self) -> None:
        self.skipped_steps = 0
        self._in_a_row = 0

    def check(self, result: StepResult, step: int) -> None:
        """Count skipped steps.

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
        log.warning("%s: the optimizer skipped the step", where)
        if self._in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise Diverged(f"{where}: {self._in_a_row} steps in a row were skipped; lower optimizer.learning_rate")
