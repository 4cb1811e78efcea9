"""Samples during training, on networks that stand for an engine's plain and averaged weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from megadiff.config.layout import Layout
from megadiff.config.load import load_run
from megadiff.config.schema import Run, SampleSheets, Sampling
from megadiff.evaluation.periodic import PeriodicSamples
from megadiff.models.mmdit import build_model
from megadiff.types import Denoiser, Metric

ROOT = Path(__file__).parents[2]
BOTTOM_PX = 12
"""The margin under a sheet's last row."""


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # data and tokenizers are named relative to it
        yield load_run(ROOT / "tests/tiny.yaml")


class Moment:
    """Two untrained networks, of which it counts what is asked, and what is recorded."""

    step, last, layout, device = 1, False, Layout(), torch.device("cpu")

    def __init__(self, run: Run) -> None:
        self.networks = {kind: network(run, seed) for seed, kind in enumerate(("ema", "raw"))}
        self.calls = dict.fromkeys(self.networks, 0)
        self.pictures: dict[str, Image.Image] = {}
        self.texts: dict[str, str] = {}

    @contextmanager
    def denoiser(self, weights: str | None = None) -> Iterator[Denoiser]:
        kind = weights or "ema"

        def denoise(*arguments: Any) -> Any:
            self.calls[kind] += 1
            with torch.no_grad():
                return self.networks[kind](*arguments)

        yield denoise

    def picture(self, tag: str, picture: Image.Image) -> None:
        self.pictures[tag] = picture

    def text(self, tag: str, text: str) -> None:
        self.texts[tag] = text

    def scalar(self, tag: str, value: float) -> None:
        raise AssertionError("samples are no numbers")

    def metrics(self, metrics: Sequence[Metric]) -> None:
        raise AssertionError("samples are no figures")


def network(run: Run, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = build_model(run.model, list(run.model.modalities)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def shown(run: Run, weights: str) -> Moment:
    rule = SampleSheets.model_validate({"every_steps": 1, "count": 2, "weights": weights, "sampling": Sampling(steps=2)})
    moment = Moment(run)
    PeriodicSamples(run, run.stages[-1], rule)(moment)
    return moment


def captions(moment: Moment, title: str) -> list[str]:
    """What `image-to-text` says under a title."""
    lines = moment.texts["samples/image-to-text"].splitlines()
    return lines[lines.index(title) :][2:4]


def test_plain_weights_are_shown_below_the_averaged_ones_under_the_same_keys(run):
    both, ema, raw = (shown(run, weights) for weights in ("both", "ema", "raw"))
    assert set(both.pictures) == {"samples/image-to-text", "samples/text-to-image", "samples/joint"}
    assert both.calls["ema"] == both.calls["raw"] > 0
    for title, alone in (("averaged weights:", ema), ("plain weights:", raw)):
        assert captions(both, title) == captions(alone, title)
    assert captions(both, "averaged weights:") != captions(both, "plain weights:")
    for name, picture in both.pictures.items():
        above = ema.pictures[name]
        box = (0, 0, above.width, above.height - BOTTOM_PX)
        assert picture.height > above.height
        assert picture.crop(box).tobytes() == above.crop(box).tobytes()


@pytest.mark.parametrize(("weights", "idle"), [("ema", "raw"), ("raw", "ema")])
def test_one_kind_of_weights_draws_alone(run, weights, idle):
    moment = shown(run, weights)
    assert moment.calls[idle] == 0 < moment.calls[weights]
    assert len(moment.pictures) == 3


def test_a_sheet_has_as_many_samples_as_were_asked_for_whatever_the_number_of_ranks(run):
    rule = SampleSheets.model_validate({"every_steps": 1, "count": 3, "sampling": Sampling(steps=1)})
    moment, samples = Moment(run), PeriodicSamples(run, run.stages[-1], rule)
    with moment.denoiser() as denoiser:
        assert len(samples.cells(denoiser, samples.tasks[-1], Layout(), moment.device)) == 3


@pytest.mark.parametrize(("step", "last", "due"), [(4, False, True), (5, False, False), (5, True, True)])
def test_samples_are_due_every_so_often_and_at_the_end(run, step, last, due):
    moment = Moment(run)
    moment.step, moment.last = step, last
    assert PeriodicSamples(run, run.stages[-1], SampleSheets(every_steps=4)).due(moment) is due


def test_the_averaged_weights_are_the_default():
    assert SampleSheets(every_steps=1).weights == "ema"
