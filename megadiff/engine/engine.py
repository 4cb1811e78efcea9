"""A stage's weights, averages and optimizer steps, written once over a Backend."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from megadiff.config.derived import learning_rate
from megadiff.config.run_folder import CheckpointsFolder
from megadiff.config.schema import Initialise, Stage
from megadiff.distributed.reduce import gather_objects
from megadiff.engine import saving, statistics
from megadiff.engine.api import EMA, NOISE, Backend, Objective, PreparedBatch, StepResult
from megadiff.engine.ema import Ema
from megadiff.engine.inspector import Inspector
from megadiff.engine.optimizer import hold_still
from megadiff.engine.saving import Saver
from megadiff.models.blocks import Block
from megadiff.models.idle import Idle
from megadiff.models.names import part_of
from megadiff.types import ALIGNMENT, Batch, Denoiser, LossTerms, Prediction
from megadiff.weights.checkpoint import CheckpointError, WeightSource, check_names
from megadiff.weights.fence import Fence

log = logging.getLogger(__name__)

RAW = "raw"
"""Stands for the plain weights in place of an EMA profile's name."""


class Engine:
    """One stage in training. Every method is collective."""

    def __init__(self, backend: Backend, stage: Stage, idle: Idle, blocks: Sequence[tuple[str, Block]]) -> None:
        """Wrap a backend.

        Args:
            idle: parameters that no loss of the stage reaches; they are neither stepped nor decayed.
            blocks: of the model (`inspector.blocks_of`).
        """
        self.backend, self.stage, self.idle = backend, stage, idle
        self.layout, self.device, self.pieces = backend.layout, backend.device, backend.pieces
        self.shapes = saving.all_shapes(self.pieces)
        self.parts = {name: part_of(name) for name in self.shapes}
        hold_still(self.pieces.optimizer, self.pieces.trained, idle.partial)
        self.ema = Ema(stage.ema, self.pieces)
        self.inspector = Inspector(blocks, self.shapes, list(stage.modalities), self.pieces, self.layout, self.device)
        self.optimizer_step = 0

    def step(
        self, batches: Sequence[Batch], objective: Objective, sources: Sequence[str] = (), *, inspect: bool = False
    ) -> StepResult:
        """One optimizer step over this replica's micro-batches; the averages follow if it was applied.

        It changes nothing on any rank if the loss or the gradient is not finite on one.

        Masked counts differ between ranks and micro-batches, and DeepSpeed averages over both. So all micro-batches are
        prepared first, the counts are summed once, and each micro-batch's sum is scaled to the global mean.

        The host waits for the device once, when all is computed but the averages, to read the result.

        Args:
            sources: the names of the data's sources, if their losses are told apart.
            inspect: whether to look into the network on the way; alike on all ranks.
        """
        names = objective.losses
        with record_function(NOISE):
            prepared = [objective.prepare(batch) for batch in batches]
        normaliser = statistics.normaliser_of(prepared, names, self.layout, self.backend.accumulation, self.device)
        rate = learning_rate(self.stage.optimizer, self.optimizer_step, self.stage.steps)

        def score(prediction: Prediction, micro_batch: PreparedBatch) -> LossTerms:
            terms = objective.score(prediction, micro_batch, normaliser)
            # The gradient of a loss that is not finite is never finite either: the norm over all ranks shows both.
            return replace(terms, total=terms.total * torch.where(terms.total.detach().isfinite(), 1.0, torch.nan))

        with self.inspector.looking() if inspect else nullcontext():
            outcome = self.backend.run(prepared, score, rate)
        self.optimizer_step += 1
        weights = {name: self._loss_weight(name) for name in names}
        result = statistics.step_result(outcome, batches, weights, sources, self.layout, self.device, rate)
        if result.applied:
            with record_function(EMA):
                self.ema.update()
        if not (inspect and result.applied):
            return result
        return replace(result, inspection=self.inspector.report(prepared, result.grad_norm))

    def _loss_weight(self, name: str) -> float:
        if name == ALIGNMENT and self.stage.alignment is not None:
            return self.stage.alignment.weight
        return self.stage.modalities[name].loss_weight

    @contextmanager
    def denoiser(self, weights: str | None = None) -> Iterator[Denoiser]:
        """The model for sampling and evaluation; equal numbers of calls on all ranks.

        Args:
            weights: RAW, or an EMA profile; None takes the first profile.
        """
        with self.backend.denoiser() as denoiser:
            if weights == RAW:
                yield denoiser
                return
            with self.ema.swapped_in(weights):
                yield denoiser

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save(
        self, checkpoints: CheckpointsFolder, progress: Mapping[str, Any], config: str, fence: Fence | None = None
    ) -> Path:
        """Write and publish a checkpoint of this moment; returns its folder.

        Args:
            fence: of this start of the run, if others may follow it.

        Raises:
            CheckpointError: on all ranks, if one cannot write, or a newer start of the run has taken the fence.
        """
        with closing(self.saver(checkpoints, fence)) as saver:
            saver.begin({**progress, **self.counters()}, config)
            saver.publish()
        return checkpoints.step(self.optimizer_step)

    def saver(
        self,
        checkpoints: CheckpointsFolder,
        fence: Fence | None = None,
        copy_failed: Callable[[int, str], None] = lambda step, why: log.warning("step %d is not copied: %s", step, why),
    ) -> Saver:
        """A writer of checkpoints of this stage; `counters` belong to the progress that it is given. Arguments as of Saver."""
        return Saver(checkpoints, self.pieces, self.ema, self.layout, self.device, self.stage, fence, copy_failed)

    def counters(self) -> dict[str, int]:
        """What a checkpoint of this moment has to hold beside the tensors, and `load` sets again."""
        return {
            "optimizer_step": self.optimizer_step,
            "adam_steps": max(gather_objects(self.pieces.adam_steps)),  # a pipeline stage may train nothing
            "ema_updates": self.ema.updates,
        }

    def load(self, folder: Path) -> dict[str, Any]:
        """Resume from `folder`: weights, moments, averages, counters. Returns the saved progress.

        Raises:
            DamagedCheckpoint: it is damaged; nothing of it was loaded.
            CheckpointError: its parameters or EMA profiles differ from this stage's.
        """
        reader = saving.open_checkpoint(folder, self.layout)
        saving.check_same_profiles(reader, self.ema.profiles)
        check_names(reader, self.shapes, parts=self.parts)
        self._check_same_trained(reader)
        saving.load_weights(reader, "weight", set(self.parts), self.pieces)
        saving.load_state(reader, self.pieces, self.ema)
        self.optimizer_step = reader.manifest.progress["optimizer_step"]
        return dict(reader.manifest.progress)

    def initialise_from(self, folder: Path, rule: Initialise) -> list[str]:
        """Start from another stage's weights with a fresh optimizer; returns the names that start fresh.

        Raises:
            CheckpointError: parameters are missing or unexpected and not declared new or dropped.
        """
        reader = saving.open_checkpoint(folder, self.layout)
        parts = {**{name: part_of(name) for name in reader.manifest.parameters}, **self.parts}
        names = set(check_names(reader, self.shapes, new=rule.new, dropped=rule.dropped, parts=parts))
        saving.load_weights(reader, reader.weight_kind(rule.weights, rule.ema), names, self.pieces)
        self.ema.reset()
        return [name for name in self.parts if name not in names]

    def _check_same_trained(self, reader: WeightSource) -> None:
        """Raises CheckpointError if the trained parameters are not those of the checkpoint.

        Parameters that are idle now may have been trained there: their moments are no longer needed.
        """
        frozen = {piece.name for piece in self.pieces.frozen}
        before = {name: trained and name not in self.idle.whole for name, (_, trained) in reader.manifest.parameters.items()}
        differing = gather_objects([name for name in self.pieces.shapes if before[name] == (name in frozen)])
        changed = list(dict.fromkeys(name for names in differing for name in names))
        if changed:
            raise CheckpointError(
                f"{reader.folder}: {changed[0]} and {len(changed) - 1} more were trained there and are not now, or the other "
                "way round; what is frozen or has no loss cannot change within a stage: add a stage that starts from it"
            )
