"""Samples during training: every rank draws its share with the averaged weights, rank 0 shows them in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import Run, Stage
from megadiff.data.encode import build_codecs
from megadiff.data.loader import read_held_out
from megadiff.distributed.ranks import Ranks
from megadiff.distributed.reduce import gather_objects
from megadiff.evaluation.report import Cell, Section, contact_sheet
from megadiff.evaluation.tasks import Task, draw, tasks_of

SEED = 0


class PeriodicSamples:
    """A training callback: one contact sheet per task, the same conditions and keys every time, so that sheets compare."""

    def __init__(self, run: Run, stage: Stage, ranks: Ranks) -> None:
        """Raises UserError if the held-out data cannot be read."""
        self.rule, self.model, self.ranks = stage.samples, run.model, ranks
        self.codecs = build_codecs(run.data, run.model)
        predicted = [name for name, modality in stage.modalities.items() if modality.predicted]
        self.tasks = tasks_of(list(run.model.modalities), predicted)
        count = self.rule.count if self.rule else 0
        # Every rank draws equally many: under ZeRO-3 each call of the model is a collective.
        self.share = -(-count // ranks.world)
        source = run.data.held_out or run.data.train
        self.held = read_held_out(source, run.data, run.model, self.share * ranks.world).states if self.rule else {}

    def due(self, training: Any) -> bool:
        step: int = training.progress.optimizer_step
        return self.rule is not None and (step % self.rule.every_steps == 0 or step == training.stage.steps)

    def __call__(self, training: Any) -> None:
        step: int = training.progress.optimizer_step
        with training.engine.ema_denoiser() as denoiser:
            for task in self.tasks:
                sheet = self.sheet(denoiser, task, training.engine.device)
                if sheet is not None:
                    training.monitor.picture(f"samples/{task.name}", sheet, step)

    def sheet(self, denoiser: Any, task: Task, device: torch.device) -> Image.Image | None:
        """The task's contact sheet on rank 0, None elsewhere. Collective."""
        assert self.rule is not None
        count = len(next(iter(self.held.values())))
        mine = torch.arange(self.ranks.rank, count, self.ranks.world)
        keys = rng.sample_keys(SEED, mine).to(device)
        given = {name: self.held[name][mine % count] for name in task.given}
        moved = {name: state.to(device) for name, state in given.items()}
        drawn = draw(denoiser, self.model, self.rule.sampling, task, keys, moved, batch=self.share)
        rows = [self._cell(task, index, given, drawn) for index in range(len(mine))]
        shared = gather_objects(rows)
        if self.ranks.rank:
            return None
        cells = [shared[number % self.ranks.world][number // self.ranks.world] for number in range(count)]
        return contact_sheet([Section(task.name, cells)])

    def _cell(self, task: Task, index: int, given: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> Cell:
        picture: Image.Image | None = None
        texts = []
        for name in (*task.given, *task.generated):
            states = given[name] if name in task.given else drawn[name].cpu()
            value = self.codecs[name].decode(states[index])
            if isinstance(value, Image.Image):
                picture = value
            else:
                texts.append(("→ " if name in task.generated else "") + value)
        return Cell(picture, " ".join(texts))
