"""TensorBoard's events of a stage."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megadiff.config.run_folder import Incident
from megadiff.training import tags


@dataclass(frozen=True)
class Description:
    """What TensorBoard is told of a stage at its beginning.

    Attributes:
        hyper_parameters: what tells this run from others.
        losses: names of the training losses.
        measured: names of the figures that are measured while training.
    """

    hyper_parameters: Mapping[str, float | str | bool]
    losses: Sequence[str]
    measured: Sequence[str]


class Board:
    """A writer of events. Its methods raise OSError where the disk is full, and it is of no use after that."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        """Args: purge_step: what an earlier writer wrote of this step and later ones is hidden."""
        for path in folder.iterdir():
            if path.stat().st_size == 0:  # left by a writer on a full disk
                path.unlink()
        # Imported here: other ranks need none of it, and it takes most of a second.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, numbers: Mapping[str, float], step: int) -> None:
        """Finite numbers by their tags."""
        for tag, value in numbers.items():
            if math.isfinite(value):
                self._writer.add_scalar(tag, value, step)

    def picture(self, tag: str, picture: Image.Image, step: int) -> None:
        self._writer.add_image(tag, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def text(self, tag: str, text: str, step: int) -> None:
        """Markdown."""
        self._writer.add_text(tag, text, step)

    def incident(self, incident: Incident, no_later_than: float = math.inf) -> None:
        """Args: no_later_than: the step at which it stands at most; steps that decrease hide what is there."""
        what = f"**{incident.kind.value}** at step {incident.step}: {incident.detail}"
        self.text(tags.INCIDENTS, what, int(min(incident.step, no_later_than)))
        self.flush()

    def describe(self, description: Description) -> None:
        """The tab of custom scalars, and that of hyper-parameters with the curves that runs are judged by."""
        from torch.utils.tensorboard.summary import hparams

        charts = {
            category: {title: ["Multiline", [_pattern(tag) for tag in wanted]] for title, wanted in titles.items()}
            for category, titles in tags.charts(description.losses, description.measured).items()
        }
        self._writer.add_custom_scalars(charts)
        judged_by = [tags.TOTAL, *map(tags.of_metric, description.measured)]
        writer = self._writer.file_writer
        assert writer is not None
        # Into this run's own events; SummaryWriter.add_hparams would make a run of them.
        for summary in hparams(dict(description.hyper_parameters), dict.fromkeys(judged_by, 0.0)):
            writer.add_summary(summary)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _pattern(tag: str) -> str:
    """TensorBoard takes the tags of a chart for regular expressions."""
    return re.escape(tag) if tag.endswith("/") else f"{re.escape(tag)}$"
