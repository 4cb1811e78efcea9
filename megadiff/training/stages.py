"""Where a stage lives on the disk and where its weights come from."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from megadiff.config.errors import UserError
from megadiff.config.layout import CHECKPOINTS
from megadiff.config.schema import Run, Stage
from megadiff.engine.checkpoint import CheckpointError, latest_checkpoint

if TYPE_CHECKING:
    from megadiff.engine.zero import ZeroEngine

log = logging.getLogger(__name__)


def stage_of(run: Run, name: str) -> Stage:
    """Raises UserError if the run has no such stage."""
    for stage in run.stages:
        if stage.name == name:
            return stage
    raise UserError(f"the run has no stage {name}; its stages: {', '.join(stage.name for stage in run.stages)}")


def stage_folder(run: Run, stage: Stage) -> Path:
    return Path(run.folder) / stage.name


def checkpoints_folder(run: Run, stage: Stage) -> Path:
    return stage_folder(run, stage) / CHECKPOINTS


def stage_seed(run: Run, stage: Stage) -> int:
    """Every stage has its own order of samples and noise, a function of the run's seed and the stage's name."""
    digest = hashlib.blake2b(f"{run.seed}/{stage.name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def newest_checkpoint(run_folder: Path, stage_names: list[str]) -> Path:
    """The newest checkpoint of the last stage that has one.

    Raises:
        CheckpointError: no stage has any.
    """
    for name in reversed(stage_names):
        found = latest_checkpoint(run_folder / name / CHECKPOINTS)
        if found:
            return found
    raise CheckpointError(f"{run_folder} has no checkpoint yet in any stage ({', '.join(stage_names)}); train it first")


def initialise(engine: ZeroEngine, run: Run, stage: Stage) -> None:
    """Give a stage that starts its first weights, by its `initialise` rule.

    Raises:
        CheckpointError: the source is missing, damaged, or does not fit.
    """
    rule = stage.initialise
    if rule.source is None:
        return
    if rule.source == "previous":
        before = run.stages[[s.name for s in run.stages].index(stage.name) - 1]
        source = latest_checkpoint(checkpoints_folder(run, before))
        if source is None:
            raise CheckpointError(
                f"stage {stage.name} starts from {before.name}, which has no checkpoint in {run.folder}; train it first"
            )
    else:
        source = Path(rule.source)
    fresh = engine.initialise_from(source, rule)
    log.info("stage %s starts from %s (%s weights); %d parameters start fresh", stage.name, source, rule.weights, len(fresh))
