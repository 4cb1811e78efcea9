"""The conditioning gap on denoisers whose gap is known."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from megadiff.config.schema import GaussianProcess, GridSpace, MaskedProcess, Modality, Model, TokenSpace
from megadiff.evaluation.gap import bootstrap_interval, conditioning_gap
from megadiff.types import CrossEntropy, Noised, Prediction, Readout, TokenLosses

MODEL = Model(
    modalities={
        "word": Modality(space=TokenSpace(vocabulary=4, length=1), process=MaskedProcess()),
        "number": Modality(space=GridSpace(channels=1, height=1, width=1), process=GaussianProcess()),
    },
    width=8,
    heads=1,
    head_dim=8,
    joint_depth=1,
)


def pairs(count: int = 64) -> dict[str, Tensor]:
    """The number is the word."""
    words = torch.arange(count) % 4
    return {"word": words[:, None], "number": words.float()[:, None, None, None]}


class Reader:
    """Knows that the number is the word; looks at its condition only if `looks`."""

    def __init__(self, looks: bool) -> None:
        self.looks = looks

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        out: Prediction = {}
        for name, request in readout.items():
            if isinstance(request, TokenLosses):
                told = noised.states["number"][:, 0, 0, 0].round().long()
                right = (told == request.targets[:, 0]) if self.looks else torch.zeros(len(told), dtype=torch.bool)
                losses = torch.where(right, 0.1, 1.5)[:, None]
                losses = torch.where(request.scored, losses, 0.0)
                out[name] = CrossEntropy(losses * request.weights, losses)
            else:
                state, time = noised.states["number"], noised.clocks["number"][:, None, None, None]
                known = noised.states["word"].float()[:, :, None, None]
                clean = known if self.looks else torch.full_like(state, 1.5)
                out[name] = (state - clean) / time
        return out


@pytest.mark.parametrize("target", ["word", "number"])
def test_a_model_that_uses_its_condition_has_a_gap_above_zero(target: str) -> None:
    gap = conditioning_gap(Reader(looks=True), MODEL, pairs(), target=target, seed=1)
    assert gap.excludes_zero
    assert gap.low < gap.mean < gap.high
    assert gap.mean == pytest.approx(gap.wrong - gap.right)


@pytest.mark.parametrize("target", ["word", "number"])
def test_a_model_that_ignores_its_condition_has_no_gap(target: str) -> None:
    gap = conditioning_gap(Reader(looks=False), MODEL, pairs(), target=target, seed=1)
    assert gap.mean == pytest.approx(0.0, abs=1e-9)
    assert not gap.excludes_zero
    assert "NOT above 0" in str(gap)


def test_the_gap_does_not_depend_on_the_batch_size() -> None:
    whole = conditioning_gap(Reader(looks=True), MODEL, pairs(), target="word", seed=1, batch=64)
    parts = conditioning_gap(Reader(looks=True), MODEL, pairs(), target="word", seed=1, batch=7)
    assert parts == whole


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(60):
        low, high = bootstrap_interval(torch.randn(50, generator=generator), seed=trial)
        covered += low < 0 < high
    assert 50 <= covered <= 60
