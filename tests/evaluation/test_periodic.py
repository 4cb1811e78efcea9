"""Samples during training, on networks that stand for an engine's plain and averaged weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from megadiff.config.layout import Layout
from megadiff.config.load import load_run
from megadiff.config.schema import PeriodicSamples as Rule
from megadiff.config.schema import Run, Sampling
from megadiff.evaluation.periodic import PeriodicSamples
from megadiff.models.mmdit import build_model
from megadiff.types import Denoiser

ROOT = Path(__file__).parents[2]
BOTTOM_PX = 12
"""The margin under a sheet's last row."""


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # data and tokenizers are named relative to it
        yield load_run(ROOT / "tests/tiny.yaml")


class Engine:
    """Two untrained networks; counts what is asked of each."""

    device = torch.device("cpu")

    def __init__(self, run: Run) -> None:
        self.networks = {kind: network(run, seed) for seed, kind in enumerate(("ema", "raw"))}
        self.calls = dict.fromkeys(self.networks, 0)

    @contextmanager
    def denoiser(self, weights: str | None = None) -> Iterator[Denoiser]:
        kind = weights or "ema"

        def denoise(*arguments: Any) -> Any:
            self.calls[kind] += 1
            with torch.no_grad():
                return self.networks[kind](*arguments)

        yield denoise


def network(run: Run, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = build_model(run.model, list(run.model.modalities)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


class Monitor:
    def __init__(self) -> None:
        self.pictures: dict[str, Image.Image] = {}
        self.texts: dict[str, str] = {}

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.pictures[name] = picture

    def text(self, name: str, text: str, step: int) -> None:
        self.texts[name] = text


def shown(run: Run, weights: str) -> tuple[Monitor, Engine]:
    rule = Rule.model_validate({"every_steps": 1, "count": 2, "weights": weights, "sampling": Sampling(steps=2)})
    training = SimpleNamespace(
        progress=SimpleNamespace(optimizer_step=1), stage=run.stages[-1], engine=Engine(run), monitor=Monitor()
    )
    PeriodicSamples(run, run.stages[-1], rule, Layout())(training)
    return training.monitor, training.engine


def captions(monitor: Monitor, title: str) -> list[str]:
    """What `image-to-text` says under a title."""
    lines = monitor.texts["samples/image-to-text"].splitlines()
    return lines[lines.index(title) :][2:4]


def test_plain_weights_are_shown_below_the_averaged_ones_under_the_same_keys(run):
    both, engine = shown(run, "both")
    ema, raw = shown(run, "ema")[0], shown(run, "raw")[0]
    assert set(both.pictures) == {"samples/image-to-text", "samples/text-to-image", "samples/joint"}
    assert engine.calls["ema"] == engine.calls["raw"] > 0
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
    monitor, engine = shown(run, weights)
    assert engine.calls[idle] == 0 < engine.calls[weights]
    assert len(monitor.pictures) == 3


def test_the_averaged_weights_are_the_default():
    assert Rule(every_steps=1).weights == "ema"
