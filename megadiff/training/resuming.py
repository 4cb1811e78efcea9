"""Where a stage goes on: its newest whole checkpoint, if it was trained as it is to be trained now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megadiff.config.drift import drift
from megadiff.config.errors import ConfigError
from megadiff.config.layout import Layout
from megadiff.config.load import validate
from megadiff.config.run_folder import MANIFEST, CheckpointsFolder, IncidentKind, StageFolder
from megadiff.config.schema import Run
from megadiff.distributed.joining import software
from megadiff.distributed.reduce import gather_objects
from megadiff.engine.engine import Engine
from megadiff.engine.saving import all_or_none, copies, remote_of, restore
from megadiff.training.incidents import Incidents
from megadiff.weights.checkpoint import DamagedCheckpoint, clear, read_manifest
from megadiff.weights.fence import Fence


@dataclass(frozen=True)
class Resumed:
    """The progress of the checkpoint that was loaded, and what has changed since it was made."""

    progress: dict[str, Any]
    changes: tuple[str, ...]


def resume(engine: Engine, run: Run, incidents: Incidents, *, allow_changes: bool) -> Resumed | None:
    """Load the newest checkpoint that is not damaged; None if there is no checkpoint. Collective.

    Raises:
        UserError: it was trained otherwise, and that may not change.
        CheckpointError: all are damaged, or the newest whole one does not fit the stage.
        StorageError: there is none here, and the store of their copies cannot be reached.
    """
    damaged: DamagedCheckpoint | None = None
    stage, now = engine.stage.name, software()
    for place in _checkpoints(engine, run.paths.stage(stage).checkpoints):
        if damaged is not None:
            incidents.add(IncidentKind.DAMAGED, 0, str(damaged))
        try:
            folder = place()
            changes = changes_since(folder, run, stage, now, allowed=allow_changes)
            return Resumed(engine.load(folder), changes)
        except DamagedCheckpoint as error:
            damaged = error
    if damaged is not None:
        raise damaged
    return None


def _checkpoints(engine: Engine, here: CheckpointsFolder) -> Iterator[Callable[[], Path]]:
    """The way to each of a stage's checkpoints, the newest first; those that are not here are downloaded. Collective."""
    for folder in here.newest_first():
        yield partial(Path, folder)
    if remote := remote_of(engine.stage):
        for address in copies(remote, engine.layout):
            yield partial(restore, address, here, engine.layout)


def changes_since(folder: Path, run: Run, stage: str, software: Mapping[str, str], *, allowed: bool) -> tuple[str, ...]:
    """Lines `a.b: old -> new` of the configuration and of the software, which may change at any time.

    Args:
        folder: a checkpoint of the stage.
        software: of now; see joining.software.
        allowed: whether the training may change.

    Raises:
        UserError: it does, and may not; or the checkpoint's configuration cannot be read.
        CheckpointError: as `read_manifest`.
    """
    manifest = read_manifest(folder)
    try:
        before = validate(yaml.safe_load(manifest.config), f"{folder / MANIFEST} (config)")
    except ConfigError as error:  # of a version with other keys
        if not allowed:
            raise
        configuration: tuple[str, ...] = (f"the configuration was another one: {error}",)
    else:
        configuration = drift(before, run, stage).accepted(str(folder), allowed=allowed)
    replaced = [name for name, version in manifest.software.items() if software.get(name) != version]
    return (*configuration, *(f"{name}: {manifest.software[name]} -> {software.get(name)}" for name in replaced))


def take_fence(run: Run, paths: StageFolder, layout: Layout) -> Fence:
    """The right to publish checkpoints from now on; ranks of an earlier start have lost it, with what they were writing."""
    fence: Fence | None = None
    with all_or_none(run.paths.root):
        if layout.leads:
            fence = Fence.take(run.paths)
            clear(paths.checkpoints)
    return next(one for one in gather_objects(fence) if one is not None)
