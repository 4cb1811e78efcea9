"""Samples during training: every rank draws its share, rank 0 shows them in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from megadiff import rng
from megadiff.config import parameters
from megadiff.config.layout import Layout
from megadiff.config.schema import PeriodicSamples as Rule
from megadiff.config.schema import Run, Stage
from megadiff.data.codecs.build import build_codecs
from megadiff.data.reading.loader import read_held_out
from megadiff.diffusion.sampler import Conditions
from megadiff.distributed.reduce import gather_objects
from megadiff.generation.tasks import Task, cell_of, draw, tasks_of
from megadiff.report.sheet import Cell, Section, contact_sheet

SEED = 0
TITLES = {"ema": "averaged weights", "raw": "plain weights"}


class PeriodicSamples:
    """A training callback: one contact sheet per task, the same conditions and keys every time, so that sheets compare."""

    def __init__(self, run: Run, stage: Stage, rule: Rule, layout: Layout) -> None:
        """Raises UserError if the held-out data cannot be read."""
        self.rule, self.model, self.layout = rule, run.model, layout
        self.codecs = build_codecs(run.data, run.model)
        self.tasks = tasks_of(list(run.model.modalities), parameters.predicted(stage))
        # Every rank draws equally many: under ZeRO-3 each call of the model is a collective.
        self.share = -(-rule.count // layout.data_ranks)
        source = run.data.reference
        self.held = read_held_out(source, run.data, run.model, self.share * layout.data_ranks).states

    def due(self, training: Any) -> bool:
        step: int = training.progress.optimizer_step
        return step % self.rule.every_steps == 0 or bool(step == training.stage.steps)

    def __call__(self, training: Any) -> None:
        step: int = training.progress.optimizer_step
        engine = training.engine
        kinds = ("ema", "raw") if self.rule.weights == "both" else (self.rule.weights,)
        drawn: dict[str, dict[str, list[Cell]]] = {task.name: {} for task in self.tasks}
        for kind in kinds:
            with engine.denoiser(None if kind == "ema" else kind) as denoiser:
                for task in self.tasks:
                    drawn[task.name][kind] = self.cells(denoiser, task, engine.device)
        for name, cells in drawn.items():
            training.monitor.picture(f"samples/{name}", sheet(name, cells), step)
            training.monitor.text(f"samples/{name}", listing(cells), step)

    def cells(self, denoiser: Any, task: Task, device: torch.device) -> list[Cell]:
        """The task's samples, equal on all ranks. Collective."""
        replicas = self.layout.data_ranks
        count = self.share * replicas
        mine = torch.arange(self.layout.data_rank, count, replicas)
        keys = rng.sample_keys(SEED, mine).to(device)
        # A source with fewer samples than that gives some of its conditions twice.
        given = {name: self.held[name][mine % len(self.held[name])] for name in task.given}
        moved = {name: state.to(device) for name, state in given.items()}
        drawn = draw(denoiser, self.model, self.rule.sampling, task, keys, Conditions(given=moved), batch=self.share)
        states = {**given, **{name: state.cpu() for name, state in drawn.items()}}
        values = [
            {name: self.codecs[name].decode(state[index]) for name, state in states.items()} for index in range(len(mine))
        ]
        own = (self.layout.data_rank, [cell_of(task, value) for value in values]) if self.layout.speaks else None
        shared = dict(spoken for spoken in gather_objects(own) if spoken is not None)
        return [shared[number % replicas][number // replicas] for number in range(count)]


def sheet(task: str, cells: Mapping[str, list[Cell]]) -> Image.Image:
    """A task's samples by the weights that drew them; few and large, since TensorBoard shows pictures small."""
    sections = [Section(f"{task}, {TITLES[kind]}", samples) for kind, samples in cells.items()]
    return contact_sheet(sections, columns=4, cell_px=128, text_px=16)


def listing(cells: Mapping[str, list[Cell]]) -> str:
    """Their captions as Markdown."""
    return "\n\n".join(
        "\n".join([f"{TITLES[kind]}:", "", *(f"- {cell.caption}" for cell in samples)]) for kind, samples in cells.items()
    )
