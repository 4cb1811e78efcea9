"""What is evaluated while a stage trains."""

from __future__ import annotations

from megadiff.config.schema import Run, Stage
from megadiff.evaluation.periodic import PeriodicSamples


def callbacks(run: Run, stage: Stage) -> list[PeriodicSamples]:
    """What the stage asks for, each of it a training callback.

    Raises:
        UserError: the held-out data cannot be read.
    """
    return [PeriodicSamples(run, stage, stage.samples)] if stage.samples else []
