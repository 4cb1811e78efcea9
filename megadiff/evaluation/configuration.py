"""What a run's configuration means, as a picture: times, noise, the learning rate and the averages' spans of every stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from megadiff.config.derived import learning_rate
from megadiff.config.schema import EmaProfile, Model, Run, Stage
from megadiff.diffusion.build import build_processes
from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.times import quantile
from megadiff.weights.posthoc import decay

BINS, POINTS = 50, 400
MOST_UPDATES = 20_000
"""Of a longer stage the averages' spans are followed in strides."""


def picture(run: Run) -> Image.Image:
    """A row of panels per stage."""
    # Without pyplot, which would change the backend of a notebook that calls this.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 3.2 * len(run.stages)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    rows = figure.subplots(len(run.stages), 4, squeeze=False)
    for stage, axes in zip(run.stages, rows, strict=True):
        _times(axes[0], stage)
        _noise(axes[1], run.model)
        _rate(axes[2], stage)
        _spans(axes[3], stage)
        for axis in axes:
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=8)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8, frameon=False)
        axes[0].set_ylabel(stage.name, fontsize=11, fontweight="bold")
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")


def _times(axis: Any, stage: Stage) -> None:
    uniforms = (torch.arange(100_000) + 0.5) / 100_000
    for name, modality in stage.modalities.items():
        own = modality.conditioning
        free = 1 - own.clean - own.absent
        if not modality.scored:
            axis.plot([], [], label=f"{name}: a condition only")
            continue
        heights, edges = np.histogram(quantile(modality.times, uniforms).numpy(), BINS, (0, 1), density=True)
        given = f", {100 * own.clean:g} % clean, {100 * own.absent:g} % absent" if free < 1 else ""
        axis.stairs(heights * free, edges, label=name + given)
    axis.set_ylim(bottom=0)
    axis.set_title("density of times where scored", fontsize=10)


def _noise(axis: Any, model: Model) -> None:
    times = torch.linspace(0, 1, POINTS)
    for name, process in build_processes(model).items():
        if isinstance(process, Gaussian):
            axis.plot(times, process.alpha(times), label=f"{name}: signal")
            axis.plot(times, process.sigma(times), label=f"{name}: noise", linestyle="--")
        else:
            share = process.schedule.share(times)  # type: ignore[attr-defined]
            axis.plot(times, share, label=f"{name}: share replaced", linewidth=5, alpha=0.3)  # seen under another curve
    axis.set_title("noise over time", fontsize=10)


def _rate(axis: Any, stage: Stage) -> None:
    steps = np.unique(np.linspace(0, stage.steps - 1, POINTS).astype(int))
    axis.plot(steps + 1, [learning_rate(stage.optimizer, int(step), stage.steps) for step in steps])
    axis.set_ylim(bottom=0)
    axis.set_title("learning rate over steps", fontsize=10)


def _spans(axis: Any, stage: Stage) -> None:
    for name, profile in stage.ema.items():
        axis.plot(*spans(profile, stage.steps), label=name)
    axis.set_title("mean age of what is averaged, in steps", fontsize=10)


def spans(profile: EmaProfile, steps: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Updates, and after each the mean age of the weights in the average, in updates: a <- decay (a + 1), from 0."""
    points = list(_ages(profile, steps, -(-steps // MOST_UPDATES)))
    return np.array([step for step, _ in points]), np.array([age for _, age in points])


def _ages(profile: EmaProfile, steps: int, stride: int) -> Iterator[tuple[int, float]]:
    """Every `stride` updates; within a stride the decay counts as that of its end."""
    age = 0.0
    for update in range(stride, steps + 1, stride):
        kept = decay(profile, update)
        settled = kept / (1 - kept)
        age = settled + (age - settled) * kept**stride
        yield update, age
