"""Names inside a run's folder that more than one room reads or writes."""

from __future__ import annotations

import re
from pathlib import Path

RUN = "run.yaml"
"""The resolved run."""
DEEPSPEED = "deepspeed.json"
"""The DeepSpeed JSON that the run was last launched with."""
LOCK, RANKS_LOCK = ".lock", ".ranks"
"""Held by a launch, and by every rank."""
DONE = "DONE"
"""In a stage's folder: it has been trained to its end."""
CHECKPOINTS, STEP, MANIFEST = "checkpoints", "step_", "manifest.json"
"""In a stage's folder: the checkpoints' folder; how the name of each of them begins; what a whole one holds."""


def is_run_folder(folder: Path) -> bool:
    """Whether something was launched in it, or a rank has run there."""
    return any((folder / name).exists() for name in (DEEPSPEED, LOCK, RANKS_LOCK))


def published(checkpoints: Path) -> dict[int, Path]:
    """By step a stage's whole checkpoints, oldest first; a user's copies under other names are none of them."""
    named = {re.fullmatch(rf"{STEP}(\d{{8,}})", path.name): path for path in checkpoints.glob(f"{STEP}*")}
    whole = {int(match[1]): path for match, path in named.items() if match and (path / MANIFEST).exists()}
    return dict(sorted(whole.items()))


def has_checkpoint(run_folder: Path, stage: str) -> bool:
    """Whether a stage has a whole checkpoint."""
    return bool(published(run_folder / stage / CHECKPOINTS))
