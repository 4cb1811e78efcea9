"""A stage's seed, and the origin of its weights."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

from megadiff.config.schema import Run, Stage
from megadiff.config.schema.stage import PREVIOUS_BEST
from megadiff.weights.checkpoint import BEST, LATEST, CheckpointError
from megadiff.weights.loading import local_path

if TYPE_CHECKING:
    from megadiff.engine.engine import Engine

log = logging.getLogger(__name__)


def stage_seed(run: Run, stage: Stage) -> int:
    """The seed of a stage's order of samples and noise, a function of the run's seed and the stage's name."""
    digest = hashlib.blake2b(f"{run.seed}/{stage.name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def initialise(engine: Engine, run: Run, stage: Stage) -> None:
    """Set the first weights of a stage by its `initialise` rule.

    Raises:
        CheckpointError: the source is missing, damaged, or does not fit.
    """
    rule = stage.initialise
    if rule.source is None:
        return
    if rule.from_previous:
        before = run.stages[[s.name for s in run.stages].index(stage.name) - 1]
        which = BEST if rule.source == PREVIOUS_BEST else LATEST
        found = run.paths.stage(before.name).checkpoints.named(which)
        if found is None:
            raise CheckpointError(
                f"stage {stage.name} starts from {before.name}, which has no {which} checkpoint in {run.folder}; train it first"
            )
        source = found
    else:
        source = local_path(rule.source)
    fresh = engine.initialise_from(source, rule)
    log.info("stage %s starts from %s (%s weights); %d parameters start fresh", stage.name, source, rule.weights, len(fresh))
