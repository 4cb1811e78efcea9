"""What is measured while a stage trains."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from megadiff.config.schema.base import Periodic, Positive

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
