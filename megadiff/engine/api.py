"""What an engine is made of: a Backend distributes the weights, an Objective is the method; neither knows of the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megadiff.config.layout import Layout
from megadiff.engine.pieces import Pieces
from megadiff.types import Batch, Denoiser, LossTerms, Noised, Prediction, Readout

QUARTILES = 4


class PreparedBatch(Protocol):
    """A noised micro-batch: what the model reads, what is read out of it, and how many elements are scored."""

    @property
    def noised(self) -> Noised: ...
    @property
    def readout(self) -> Mapping[str, Readout]: ...
    @property
    def counts(self) -> Mapping[str, Tensor]: ...


class Objective(Protocol):
    """The method, the same object for every engine; it knows nothing of parallelism."""

    @property
    def losses(self) -> Sequence[str]:
        """Names of its losses: the scored modalities, and the alignment's."""

    def prepare(self, batch: Batch) -> Any: ...
    def score(self, prediction: Prediction, prepared: Any, normaliser: Mapping[str, Tensor]) -> LossTerms: ...


Score = Callable[[Prediction, PreparedBatch], LossTerms]
"""A prediction's loss terms, normalised for the whole step."""


@dataclass(frozen=True)
class Outcome:
    """What a backend did in one optimizer step.

    Attributes:
        terms: of every micro-batch, where this rank speaks for its replica; else empty.
        grad_norm: over all parameters and ranks, before clipping.
        applied: False if the optimizer skipped the step (non-finite gradients).
    """

    terms: list[LossTerms]
    grad_norm: float
    applied: bool


class Backend(Protocol):
    """All that ZeRO, pipeline and tensor parallelism differ in."""

    layout: Layout
    device: torch.device
    accumulation: int
    """Micro-batches of a step on this replica."""
    pieces: Pieces

    def run(self, prepared: Sequence[PreparedBatch], score: Score, learning_rate: float) -> Outcome:
        """Forward, backward and one optimizer step. Collective; ranks that do not read pass nothing."""

    def denoiser(self) -> AbstractContextManager[Denoiser]:
        """The model as it is, in evaluation mode and without gradients; equal numbers of calls on all ranks."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks; equal on all of them.

    Attributes:
        losses: per modality the mean loss per scored element; NaN if nothing was scored.
        quartiles: per modality the mean loss in each quarter of the time axis; NaN where nothing fell.
        total: the weighted sum that was minimised.
        grad_norm: before clipping.
        learning_rate: that was used.
        applied: False if the optimizer skipped the step (non-finite gradients).
        samples: samples that were scored (readable ones).
        nelbo: per categorical modality the likelihood bound in nats per token, whatever loss is minimised.
    """

    losses: dict[str, float]
    quartiles: dict[str, list[float]]
    total: float
    grad_norm: float
    learning_rate: float
    applied: bool
    samples: int
    nelbo: dict[str, float] = field(default_factory=dict)
