"""Evaluation during training."""

from __future__ import annotations

from megadiff.config.schema import Run, Stage
from megadiff.evaluation.held_out import HeldOutLosses
from megadiff.evaluation.in_training import InTraining
from megadiff.evaluation.periodic import PeriodicSamples


def callbacks(run: Run, stage: Stage) -> list[HeldOutLosses | PeriodicSamples | InTraining]:
    """The training callbacks of a stage.

    Raises:
        UserError: the held-out data, or the weights of a metric's network, cannot be read.
    """
    losses = [HeldOutLosses(run, stage, stage.held_out_loss)] if stage.held_out_loss else []
    samples = [PeriodicSamples(run, stage, stage.samples)] if stage.samples else []
    metrics = [InTraining(run, stage, stage.evaluation)] if stage.evaluation else []
    return [*losses, *samples, *metrics]
