"""TensorBoard's events of a stage."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from megadiff.config.run_folder import Incident, StageFolder
from megadiff.training import tags
from megadiff.training.exporting import Exporter

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


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


class Board(Exporter):
    """A stage's events. Methods raise OSError where the disk is full; the next one opens them anew, also after `close`."""

    def __init__(self, paths: StageFolder, first_step: int, description: Description) -> None:
        """Args: first_step: what an earlier board wrote of later steps is hidden."""
        self._paths = paths
        self._writer: SummaryWriter | None = None
        # At the first start too: TensorBoard takes the first such mark in a log for no restart.
        self.rewind(first_step)
        self._describe(description)

    def scalars(self, numbers: Mapping[str, float], step: int) -> None:
        with self._events() as events:
            for tag, value in numbers.items():
                events.add_scalar(tag, value, step)
            events.flush()

    def picture(self, tag: str, picture: Image.Image, step: int) -> None:
        with self._events() as events:
            events.add_image(tag, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def text(self, tag: str, text: str, step: int) -> None:
        with self._events() as events:
            events.add_text(tag, text, step)

    def incident(self, incident: Incident) -> None:
        self._tell(incident, incident.step)

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def rewind(self, step: int) -> None:
        """Hide what there is of later steps, but incidents: they are told again."""
        with suppress(OSError):
            self.close()
        self._open(purge_step=step + 1)
        for incident in Incident.all_in(self._paths.of.incidents):
            if incident.stage == self._paths.name and incident.step > step:
                self._tell(incident, step)  # steps that decrease would hide what is there

    def _tell(self, incident: Incident, step: int) -> None:
        self.text(tags.INCIDENTS, incident.markdown, step)
        with self._events() as events:
            events.flush()

    @contextmanager
    def _events(self) -> Iterator[SummaryWriter]:
        """The open events; after a failure their writer is of no use."""
        try:
            yield self._writer or self._open(purge_step=None)
        except OSError:
            self._writer = None
            raise

    def _open(self, purge_step: int | None) -> SummaryWriter:
        for path in self._paths.tensorboard.iterdir():
            if path.stat().st_size == 0:  # left by a writer on a full disk
                path.unlink()
        # Imported here: other ranks need none of it, and it takes most of a second.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._paths.tensorboard), purge_step=purge_step)
        return self._writer

    def _describe(self, description: Description) -> None:
        """The tab of custom scalars, and that of hyper-parameters with the curves that runs are judged by."""
        from torch.utils.tensorboard.summary import hparams

        charts = {
            category: {title: ["Multiline", [_pattern(tag) for tag in wanted]] for title, wanted in titles.items()}
            for category, titles in tags.charts(description.losses, description.measured).items()
        }
        judged_by = [tags.TOTAL, *map(tags.of_metric, description.measured)]
        with self._events() as events:
            events.add_custom_scalars(charts)
            writer = events.file_writer
            assert writer is not None
            # Into this run's own events; SummaryWriter.add_hparams would make a run of them.
            for summary in hparams(dict(description.hyper_parameters), dict.fromkeys(judged_by, 0.0)):
                writer.add_summary(summary)


def _pattern(tag: str) -> str:
    """TensorBoard takes the tags of a chart for regular expressions."""
    return re.escape(tag) if tag.endswith("/") else f"{re.escape(tag)}$"
