"""Exponential moving averages of the weights, in fp32, on each rank's own pieces of the masters. Never gathered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from megadiff.config.schema import EmaProfile
from megadiff.engine.pieces import Pieces
from megadiff.weights.posthoc import decay


class Ema:
    """Averages of every trained piece, one list per profile."""

    def __init__(self, profiles: Mapping[str, EmaProfile], pieces: Pieces) -> None:
        self.profiles = dict(profiles)
        self.pieces = pieces
        self.updates = 0
        self.averages: dict[str, list[Tensor]] = {
            name: [piece.master.clone() for piece in pieces.trained] for name in self.profiles
        }

    def reset(self) -> None:
        """Restart from the present weights."""
        self.updates = 0
        for averages in self.averages.values():
            for average, piece in zip(averages, self.pieces.trained, strict=True):
                average.copy_(piece.master)

    @torch.no_grad()
    def update(self) -> None:
        """Average in the weights of one more applied step."""
        self.updates += 1
        masters = [piece.master for piece in self.pieces.trained]
        for name, profile in self.profiles.items():
            if masters:
                torch._foreach_lerp_(self.averages[name], masters, 1 - decay(profile, self.updates))

    @contextmanager
    def swapped_in(self, profile: str | None = None) -> Iterator[None]:
        """Make the model compute with the averages (by default the first profile's) within the block. Collective."""
        averages = self.averages[profile or next(iter(self.profiles))]
        masters = [piece.master for piece in self.pieces.trained]
        originals = [master.clone() for master in masters]
        try:
            self._write(masters, averages)
            yield
        finally:
            self._write(masters, originals)

    def _write(self, masters: list[Tensor], values: list[Tensor]) -> None:
        with torch.no_grad():
            for master, value in zip(masters, values, strict=True):
                master.copy_(value)
        self.pieces.publish()
