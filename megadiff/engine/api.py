"""What training asks of an engine, and what an engine asks of an objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megadiff.types import Batch, Denoiser, LossTerms, Noised, Prediction, Readout

QUARTILES = 4


class Prepared(Protocol):
    """A noised micro-batch: what the model reads, what is read out of it, and how many elements are scored."""

    @property
    def noised(self) -> Noised: ...
    @property
    def readout(self) -> Mapping[str, Readout]: ...
    @property
    def counts(self) -> Mapping[str, Tensor]: ...


class Objective(Protocol):
    """The method, the same object for every engine; it knows nothing of parallelism."""

    def prepare(self, batch: Batch) -> Any: ...
    def score(self, prediction: Prediction, prepared: Any, normaliser: Mapping[str, Tensor | float]) -> LossTerms: ...


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


class Engine(Protocol):
    """Weights, optimizer and their distribution over ranks."""

    @property
    def device(self) -> torch.device: ...
    @property
    def optimizer_step(self) -> int: ...
    def step(self, batches: Sequence[Batch], objective: Objective) -> StepResult: ...
    def raw_denoiser(self) -> AbstractContextManager[Denoiser]: ...
    def ema_denoiser(self, profile: str | None = None) -> AbstractContextManager[Denoiser]: ...
    def save(self, folder: Path, progress: Mapping[str, Any], config: str) -> None: ...
    def load(self, folder: Path) -> dict[str, Any]: ...
