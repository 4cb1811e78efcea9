"""Evaluation during training."""

from __future__ import annotations

from megadiff.config.schema import Run, Stage
from megadiff.evaluation.held_out import HeldOutLosses
from megadiff.evaluation.periodic import PeriodicSamples


def callbacks(run: Run, stage: Stage) -> list[HeldOutLosses | PeriodicSamples]:
    """The training callbacks of a stage.

    Raises:
        UserError: the held-out data cannot be read.
    """
    losses = [HeldOutLosses(run, stage, stage.held_out_loss)] if stage.held_out_loss else []
    samples = [PeriodicSamples(run, stage, stage.samples)] if stage.samples else []
    return [*losses, *samples]
