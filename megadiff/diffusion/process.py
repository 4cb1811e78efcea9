"""The interface of a state space to the objective and the sampler.

Legend: B samples, S tokens, C channels, H height, W width. Time t = 0 is clean data, t = 1 the prior.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from megadiff.types import Readout


class NoisedState(NamedTuple):
    """A state at its time, and the network's target there (clean tokens, noise, or a mixture; the process decides)."""

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
        """The state with its known part (`where`, bool [B, ...]) replaced by a draw at `times` given the clean state."""

    def clock(self, times: Tensor) -> Tensor:
        """The network's time input, [B]."""

    def visible(self, state: Tensor, times: Tensor) -> Tensor | None:
        """bool [B, S], False for positions that are hidden from attention, though predicted; None if none ever is."""

    def lengths(self, state: Tensor, times: Tensor) -> Tensor | None:
        """int32 [B]: how many leading positions a condition of this modality has; None if always all."""

    def readout(self, noised: NoisedState, times: Tensor, scored: Tensor) -> Readout:
        """What the training loss reads out of the network; `scored` is bool [B]."""

    def counts(self, noised: NoisedState, *, exact: bool = False) -> Tensor:
        """float32 [B]: the number of scored elements per sample, which needs no prediction."""

    def losses(self, prediction: Any, noised: NoisedState, times: Tensor, *, exact: bool = False) -> Losses:
        """The losses of a prediction that `readout` describes; `exact` takes the true weight in time, not the training one."""
