"""Evaluation during training."""

from __future__ import annotations

from megadiff.config.schema import Run, Stage
from megadiff.evaluation.periodic import PeriodicSamples


def callbacks(run: Run, stage: Stage) -> list[PeriodicSamples]:
    """The training callbacks of a stage.

    Raises:
        UserError: the held-out data cannot be read.
    """
    return [PeriodicSamples(run, stage, stage.samples)] if stage.samples else []
