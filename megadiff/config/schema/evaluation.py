"""What is measured while a stage trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megadiff.config.schema.base import LocalPath, Periodic, Positive, Section
from megadiff.config.schema.sampling import Sampling, check_for_training

Time = Annotated[float, Field(ge=0.001, le=1)]


class HeldOutLoss(Periodic):
    """Losses on pairs that are never trained on (`data.held_out`): always the same pairs, times and noise."""

    pairs: Positive = 256
    """Number of samples; the data must have so many."""
    times: Annotated[tuple[Time, ...], Field(min_length=1)] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Where on its own clock a modality's training loss is measured; each time is a curve."""
    nelbo_times: Positive = 16
    """Times per sample, one in each stratum, from which the likelihood bound of tokens and classes is estimated."""

    @field_validator("times")
    @classmethod
    def _each_has_a_name(cls, times: tuple[float, ...]) -> tuple[float, ...]:
        """Curves are named by their times, which have three decimals there."""
        names = [f"{time:.3f}" for time in times]
        if len(set(names)) < len(names):
            raise ValueError(f"times must differ by 0.001 or more: {', '.join(names)}")
        return times


class Evaluation(Section):
    """Metrics of `megadiff evaluate` while a stage trains, of the first EMA profile, and after the last step.

    One that fails, on whatever rank, fails on all of them, and training goes on.
    """

    every_steps: Positive
    metrics: Annotated[
        tuple[
            Literal[
                "fid",
                "kid",
                "cmmd",
                "fd",
                "kd",
                "precision-recall",
                "density-coverage",
                "clip-score",
                "retrieval",
                "captions",
                "likelihood",
            ],
            ...,
        ],
        Field(min_length=1),
    ] = ("fd", "likelihood")
    """As `evaluate --metrics`. Pictures and captions are drawn for the conditions of held-out pairs."""
    features: Literal["inception", "clip", "dinov2", "effnet-lite0"] = "effnet-lite0"
    """Of fd, kd, precision-recall and density-coverage."""
    inception: LocalPath | None = None
    clip: LocalPath | None = None
    dinov2: LocalPath | None = None
    """Paths of weights, as the flags of `evaluate`."""
    reference: str | None = None
    """A folder of pictures, a manifest of tar shards, or statistics.npz; None: `data.held_out`."""
    count: Positive = 256
    """Samples that are drawn, and held-out pairs; the data must have so many."""
    sampling: Sampling = Sampling(steps=20)

    @model_validator(mode="after")
    def _ranks_stay_together(self) -> Evaluation:
        check_for_training(self.sampling)
        return self


class BestCheckpoint(Section):
    """The checkpoint with the best value of a figure that is measured while training; it is written at once, and stays."""

    metric: str
    """By its name in `results.jsonl`, such as `FD-EffNetLite0` or `held-out text/NELBO given ema`."""
    goal: Literal["least", "most"] = "least"

    def better(self, value: float, than: float | None) -> bool:
        """Whether a value is better than the best so far; a NaN never is."""
        if than is None:
            return value == value
        return value < than if self.goal == "least" else value > than
