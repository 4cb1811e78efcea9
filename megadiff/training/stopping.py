"""A run that is asked to stop: by a file, since signals would end the ranks' own child processes as well."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from megadiff.distributed.reduce import any_rank

LOOK_EVERY_S = 1.0
"""Between two looks for the file, which may lie on a slow file system."""


class StopFile:
    """The file that asks a run to stop; one rank looks for it, and all ranks hear of it at the same step."""

    def __init__(self, path: Path, *, looks: bool, device: torch.device) -> None:
        """Args: looks: whether this rank is the one that looks."""
        self._path, self._looks, self._device = path, looks, device
        self._looked_at, self._seen = -math.inf, False

    def asked(self) -> bool:
        """Whether the run is to stop, alike on all ranks. Collective."""
        if self._looks and not self._seen and time.monotonic() - self._looked_at >= LOOK_EVERY_S:
            self._looked_at, self._seen = time.monotonic(), self._path.exists()
        return any_rank(self._seen, self._device)

    def obey(self) -> None:
        """Delete the file, so that the next start goes on."""
        if self._looks:
            self._path.unlink(missing_ok=True)
