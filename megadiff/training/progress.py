"""How far a stage has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self


@dataclass
class Progress:
    """Counters of a stage. `skipped` holds ranges of data steps that are left out, first and last; `best_step` and `best_value`
    are of the best checkpoint."""

    optimizer_step: int = 0
    data_step: int = 0
    samples: int = 0
    loader: dict[str, Any] = field(default_factory=dict)
    skipped: list[tuple[int, int]] = field(default_factory=list)
    best_step: int | None = None
    best_value: float | None = None

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Self:
        """Of a checkpoint, whose progress holds the optimizer's counters too."""
        return cls(**{own.name: saved[own.name] for own in fields(cls) if own.name in saved})

    def next_data_step(self, data_step: int) -> int:
        """The first one from `data_step` on that is not left out."""
        for first, last in sorted(self.skipped):
            if first <= data_step <= last:
                data_step = last + 1
        return data_step
