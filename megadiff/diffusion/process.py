"""What every state space offers to the objective and the sampler.

Legend: B samples, S tokens, C channels, H height, W width. Time t = 0 is clean data, t = 1 the prior.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from megadiff.types import Readout


class NoisedState(NamedTuple):
    """A state at its time, and what the network is to predict there (its own clean or mixed form; the process knows)."""

    state: Tensor
    target: Tensor


class Losses(NamedTuple):
    """Per-sample loss sums and numbers of scored elements, float32 [B] each."""

    sums: Tensor
    counts: Tensor


class Process(Protocol):
    """A Markov noising of one modality. `keys` are int64 [B]; times float32 [B]; states have a leading axis B."""

    name: str
    bounded: bool
    """Whether the exact losses are a bound on the negative log-likelihood, reported beside the training loss."""

    def noise(self, clean: Tensor, times: Tensor, keys: Tensor) -> NoisedState:
        """A draw of the state at `times` given the clean one."""

    def prior(self, keys: Tensor) -> Tensor:
        """Draws of the state at t = 1."""

    def renoise(self, state: Tensor, times: Tensor, later: Tensor, keys: Tensor) -> Tensor:
        """Move states at `times` further to `later` (>= times) with the noise that belongs to the keys."""

    def pin(self, state: Tensor, clean: Tensor, where: Tensor, times: Tensor, keys: Tensor) -> Tensor:
        """The state with its known part, `where` bool [B, ...], as it is at `times` given the clean one."""

    def clock(self, times: Tensor) -> Tensor:
        """What the network is told of the time."""

    def visible(self, state: Tensor, times: Tensor) -> Tensor | None:
        """bool [B, S], False where a position is hidden from attention, though predicted; None if none ever is."""

    def lengths(self, state: Tensor, times: Tensor) -> Tensor | None:
        """int32 [B], how many leading positions there are where the modality is only a condition; None if always all."""

    def readout(self, noised: NoisedState, times: Tensor, scored: Tensor) -> Readout:
        """What the training loss needs from the network; `scored` is bool [B]."""

    def counts(self, noised: NoisedState, *, exact: bool = False) -> Tensor:
        """How many elements each sample is scored on, float32 [B]; known before any prediction."""

    def losses(self, prediction: Any, noised: NoisedState, times: Tensor, *, exact: bool = False) -> Losses:
        """The loss of what `readout` gave; `exact` takes the true weight in time instead of the training one."""
