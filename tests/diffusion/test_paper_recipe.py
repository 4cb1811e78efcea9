"""The presets of the paper take the paper's steps: against a restatement of them, and by what they cost in closed form."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import Model, Sampling
from megadiff.diffusion.build import build_processes
from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.sampler import Conditions, Sampler
from megadiff.generation.presets import PAPER, PRESETS
from megadiff.types import Noised

Noise = Callable[[Tensor, Tensor], Tensor]
"""The exact noise, of a state [B, 1, 1, W] and its times [B]."""
MEAN, DEVIATION = 1.0, 0.2
EVEN_STEPS, DEFAULT = {"steps": 50, "grid": "uniform"}, {"steps": 50}


def model_of(width: int, schedule: str = "vp") -> Model:
    space = {"kind": "grid", "channels": 1, "height": 1, "width": width}
    number = {"space": space, "process": {"kind": "gaussian", "schedule": schedule, "target": "epsilon"}}
    return Model.model_validate({"width": 8, "heads": 1, "head_dim": 8, "joint_depth": 1, "modalities": {"number": number}})


PROCESS = build_processes(model_of(1))["number"]
assert isinstance(PROCESS, Gaussian)


def shares(times: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma), [B, 1, 1, 1] each."""
    return PROCESS.alpha(times).view(-1, 1, 1, 1), PROCESS.sigma(times).view(-1, 1, 1, 1)  # type: ignore[attr-defined]


def of_two_normals(state: Tensor, times: Tensor) -> Tensor:
    """Half of the data lie around MEAN, half around -MEAN."""
    alpha, sigma = shares(times)
    variance = (alpha * DEVIATION) ** 2 + sigma**2
    return sigma / variance * (state - alpha * MEAN * torch.tanh(alpha * MEAN * state / variance))


def of_a_spectrum(deviations: Tensor) -> Noise:
    """Independent normals."""

    def noise(state: Tensor, times: Tensor) -> Tensor:
        alpha, sigma = shares(times)
        return sigma * state / ((alpha * deviations) ** 2 + sigma**2)

    return noise


def sampled(noise: Noise, start: Tensor, **sampling: object) -> Tensor:
    def denoiser(noised: Noised, readout: object) -> dict[str, Tensor]:
        return {"number": noise(noised.states["number"].double(), noised.clocks["number"].double()).float()}

    model = model_of(start.shape[-1])
    keys = rng.sample_keys(0, torch.arange(len(start)))
    conditions = Conditions(initial={"number": start.float()})
    return Sampler(model, Sampling(**sampling)).sample(denoiser, keys, generate=["number"], conditions=conditions)["number"]  # type: ignore[arg-type]


def as_in_the_paper(noise: Noise, state: Tensor, steps: int) -> Tensor:
    """Heun's method in t for dx/dt = -beta(t) / 2 (x + score), to 1e-5, then one step of Euler's to 0; float64."""
    low, high = 0.00085**0.5, 0.012**0.5

    def slope(state: Tensor, time: float) -> Tensor:
        times = torch.full((len(state),), time, dtype=torch.float64)
        score = -noise(state, times) / shares(times)[1]
        return -500 * (low + (high - low) * time) ** 2 * (state + score)

    times = [1 - (1 - 1e-5) * index / (steps - 1) for index in range(steps)]
    for now, then in pairwise(times):
        first = slope(state, now)
        second = slope(state + (then - now) * first, then)
        state = state + (then - now) * (first + second) / 2
    return state - times[-1] * slope(state, times[-1])


def quantiles(share: Tensor, time: float) -> Tensor:
    """Of the two normals noised to `time`: the probability-flow ODE keeps every state at its quantile."""
    alpha, sigma = (part.item() for part in shares(torch.tensor([time], dtype=torch.float64)))
    width = ((alpha * DEVIATION) ** 2 + sigma**2) ** 0.5
    low, high = torch.full_like(share, -6.0), torch.full_like(share, 6.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = sum(torch.special.ndtr((middle - sign * alpha * MEAN) / width) for sign in (-1, 1)) / 2 < share
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def test_the_grid_of_the_paper_is_even_to_1e_5_and_then_steps_to_0():
    for steps in (1, 2, 50):
        grid = Sampler(model_of(1), Sampling(steps=steps, grid="paper")).grid(["number"])
        assert grid == [*torch.linspace(1, 1e-5, steps, dtype=torch.float64).tolist(), 0.0]


@pytest.mark.parametrize("preset", ["paper-t2i", "paper-joint"])
def test_the_presets_take_the_papers_steps(preset):
    fields = {name: value for name, value in PRESETS[preset].items() if name != "repeat_prompt"}
    start = column(torch.linspace(-3, 3, 61, dtype=torch.float64))
    assert fields["steps"] == 50
    for noise in (of_two_normals, of_a_spectrum(torch.tensor(0.03, dtype=torch.float64))):
        expected = as_in_the_paper(noise, start, 50)
        assert torch.allclose(sampled(noise, start, **fields).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sampling", "error"), [(PAPER, 5.3e-4), (EVEN_STEPS, 2.66e-2), (DEFAULT, 5.0e-4)])
def test_the_error_on_a_mixture_of_two_normals_is_that_of_the_closed_form(sampling, error):
    share = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    ends = sampled(of_two_normals, column(quantiles(share, 1.0)), **sampling).flatten()
    assert (ends - quantiles(share, 0.0)).abs().mean().item() == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize(("sampling", "energy"), [(PAPER, 1.67), (EVEN_STEPS, 0.226), (DEFAULT, 0.932)])
def test_what_is_kept_of_the_fine_detail_of_a_picture_like_spectrum(sampling, energy):
    """Power falls as frequency^-3.5 on 128 x 128 pixels of variance 1; fine detail has 32 to 64 periods."""
    along = torch.fft.fftfreq(128, dtype=torch.float64) * 128
    frequencies = (along[:, None] ** 2 + along**2).sqrt().flatten()[1:]
    power = frequencies**-3.5
    power = power / power.mean()
    fine, count = power[(frequencies >= 32) & (frequencies <= 64)].unique(return_counts=True)
    alpha, sigma = shares(torch.ones(1, dtype=torch.float64))
    start = (alpha**2 * fine + sigma**2).sqrt().view(1, 1, 1, -1)
    ends = sampled(of_a_spectrum(fine.sqrt()), start, **sampling).flatten().double()
    assert ((ends**2 * count).sum() / (fine * count).sum()).item() == pytest.approx(energy, rel=0.01)


@pytest.mark.parametrize("schedule", ["vp", "cosine", "rectified_flow"])
def test_the_slope_in_time_is_the_derivative_of_a_noised_state(schedule):
    process = build_processes(model_of(1, schedule))["number"]
    assert isinstance(process, Gaussian)
    times, clean, noise = (torch.rand(20, dtype=torch.float64) * 0.9 + 0.05), torch.randn(20, 1, 1, 1), torch.randn(20, 1, 1, 1)

    def state(at: Tensor) -> Tensor:
        return process.alpha(at).view(-1, 1, 1, 1) * clean + process.sigma(at).view(-1, 1, 1, 1) * noise

    derivative = (state(times + 1e-5) - state(times - 1e-5)) / 2e-5
    assert torch.allclose(process.time_slope(noise, state(times), times), derivative, rtol=1e-4, atol=1e-6)


def test_a_start_at_time_0_stays_there():
    start = torch.randn(5, 1, 1, 1)
    sampler = Sampler(model_of(1), Sampling(**{**PAPER, "steps": 3}))
    conditions = Conditions(initial={"number": start}, start_at={"number": 0.0})
    keys = rng.sample_keys(0, torch.arange(5))
    ends = sampler.sample(
        lambda noised, readout: {"number": torch.ones(5, 1, 1, 1)}, keys, generate=["number"], conditions=conditions
    )
    assert torch.equal(ends["number"], start)
