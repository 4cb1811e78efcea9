"""Samples during training: every rank draws its share, rank 0 shows them in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image

from megadiff import rng
from megadiff.config import parameters
from megadiff.config.layout import Layout
from megadiff.config.schema import Run, SampleSheets, Stage
from megadiff.data.codecs.build import build_codecs
from megadiff.data.reading.loader import read_held_out
from megadiff.diffusion.sampler import Conditions
from megadiff.distributed.reduce import gather_objects
from megadiff.generation.tasks import Task, draw, shown_cell, tasks_of
from megadiff.report.sheet import Cell, SheetSection, contact_sheet
from megadiff.types import Denoiser, Moment

SEED = 0
TITLES = {"ema": "averaged weights", "raw": "plain weights"}


class PeriodicSamples:
    """A training callback: one contact sheet per task, always with the same conditions and keys, so that sheets compare."""

    measures: Sequence[str] = ()

    def __init__(self, run: Run, stage: Stage, rule: SampleSheets) -> None:
        """Raises UserError if the held-out data cannot be read."""
        self.rule, self.model = rule, run.model
        self.codecs = build_codecs(run.data, run.model)
        self.tasks = tasks_of(list(run.model.modalities), parameters.predicted(stage))
        self.held_out = read_held_out(run.data.reference, run.data, run.model, rule.count).states

    def due(self, moment: Moment) -> bool:
        return moment.step % self.rule.every_steps == 0 or moment.last

    def __call__(self, moment: Moment) -> None:
        sheets: dict[str, dict[str, list[Cell]]] = {task.name: {} for task in self.tasks}
        for kind in self.rule.kinds:
            with moment.denoiser(None if kind == "ema" else kind) as denoiser:
                for task in self.tasks:
                    sheets[task.name][kind] = self.cells(denoiser, task, moment.layout, moment.device)
        for name, cells in sheets.items():
            moment.picture(f"samples/{name}", sheet(name, cells))
            moment.text(f"samples/{name}", listing(cells))

    def cells(self, denoiser: Denoiser, task: Task, layout: Layout, device: torch.device) -> list[Cell]:
        """The task's samples, equal on all ranks. Collective."""
        # Every replica draws equally many: under ZeRO-3 each call of the model is a collective.
        replicas = layout.data_ranks
        share = -(-self.rule.count // replicas)
        mine = torch.arange(layout.data_rank, share * replicas, replicas)
        keys = rng.sample_keys(SEED, mine).to(device)
        # A source with fewer samples than that gives some conditions twice.
        conditions = {name: self.held_out[name][mine % len(self.held_out[name])] for name in task.given}
        on_device = Conditions(given=conditions).to(device)
        samples = draw(denoiser, self.model, self.rule.sampling, task, keys, on_device, batch=share)
        states = {**conditions, **{name: state.cpu() for name, state in samples.items()}}
        cells = [shown_cell(task, states, index, self.codecs) for index in range(len(mine))]
        own = (layout.data_rank, cells) if layout.speaks else None
        by_replica = dict(pair for pair in gather_objects(own) if pair is not None)
        return [by_replica[number % replicas][number // replicas] for number in range(self.rule.count)]


def sheet(task: str, cells: Mapping[str, list[Cell]]) -> Image.Image:
    """A task's samples, by the weights that drew them; few and large, since TensorBoard shrinks pictures."""
    sections = [SheetSection(f"{task}, {TITLES[kind]}", samples) for kind, samples in cells.items()]
    return contact_sheet(sections, columns=4, cell_px=128, text_px=16)


def listing(cells: Mapping[str, list[Cell]]) -> str:
    """The captions of cells as Markdown."""
    return "\n\n".join(
        "\n".join([f"{TITLES[kind]}:", "", *(f"- {cell.caption}" for cell in samples)]) for kind, samples in cells.items()
    )
