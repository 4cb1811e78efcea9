"""What happens to a run besides its steps, a line each; rank 0 writes it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict

from megadiff.config.run_folder import Incident, IncidentKind, StageFolder
from megadiff.training.monitor import LineFile

log = logging.getLogger(__name__)


class Incidents:
    """The run's file of incidents; on ranks that do not write it, the rank's log alone hears of them."""

    def __init__(self, paths: StageFolder, *, writes: bool) -> None:
        self._paths, self._writes = paths, writes
        self._tell: Callable[[Incident], None] | None = None
        self._untold: list[Incident] = []

    def told_to(self, tell: Callable[[Incident], None]) -> None:
        """Tell of those so far, and of each from now on."""
        self._tell = tell
        while self._untold:
            tell(self._untold.pop(0))

    def add(self, kind: IncidentKind, step: int, detail: str = "") -> None:
        """A disk that is full or gone stops no training."""
        incident = Incident(kind, self._paths.name, step, time.time(), detail)
        log.info("%s at step %d of %s %s", kind.value, step, incident.stage, detail)
        if not self._writes:
            return
        if self._tell is None:
            self._untold.append(incident)
        else:
            self._tell(incident)
        try:
            with closing(LineFile(self._paths.of.incidents)) as lines:
                lines.append(json.dumps(asdict(incident)))
        except OSError as error:
            log.warning("an incident (%s) cannot be written: %s", kind.value, error)
