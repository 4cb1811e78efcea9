"""Guidance against closed forms: a number that is one of two normals with its label, and a categorical with its class."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import Model, Sampling
from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.guidance import Guided
from megadiff.diffusion.process import build_processes
from megadiff.diffusion.sampler import Conditions, Sampler
from megadiff.types import Dense, Drawn, DrawRule, Noised, Prediction, Readout, RowLogits, SampledRows
from tests.diffusion.ideal import drawn_from

MEANS, DEVIATION = torch.tensor([-1.0, 0.8], dtype=torch.float64), 0.3
SHARES = torch.tensor([0.4, 0.6], dtype=torch.float64)
TABLE = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
"""p(token | class)."""
COUNT = 20_000
KEYS = rng.sample_keys(3, torch.arange(COUNT))


def model_of(schedule: str = "rectified_flow", target: str = "velocity") -> Model:
    def tokens(vocabulary: int) -> dict[str, object]:
        return {"space": {"kind": "tokens", "vocabulary": vocabulary, "length": 1}, "process": {"kind": "masked"}}

    number = {
        "space": {"kind": "grid", "channels": 1, "height": 1, "width": 1},
        "process": {"kind": "gaussian", "schedule": schedule, "target": target},
    }
    modalities = {"label": tokens(2), "word": tokens(4), "number": number}
    return Model.model_validate({"width": 8, "heads": 1, "head_dim": 8, "joint_depth": 1, "modalities": modalities})


class Exact:
    """label ~ SHARES; number ~ N(MEANS[label], DEVIATION^2); word ~ TABLE[label]. `bias` makes a weaker network of it."""

    def __init__(self, model: Model, bias: float = 0.0) -> None:
        process = build_processes(model)["number"]
        assert isinstance(process, Gaussian)
        self.number, self.bias = process, bias

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        label = noised.states["label"][:, 0]
        of_label = torch.where((label == 2)[:, None], SHARES, torch.nn.functional.one_hot(label.clamp_max(1), 2).double())
        found: Prediction = {}
        if "number" in readout:
            state, times = noised.states["number"][:, 0, 0, 0].double(), noised.clocks["number"].double()
            clean, noise = self.clean_and_noise(state, times, of_label)
            wide = [value[:, None, None, None] for value in (clean + self.bias, noise)]
            found["number"] = self.number.target(*wide, times).float()
        if "word" in readout:
            logits = (of_label @ TABLE + self.bias).log()[:, None]
            request = readout["word"]
            found["word"] = logits[:, 0][request.rows] if isinstance(request, RowLogits) else drawn_from(logits, request)  # type: ignore[arg-type]
        return found

    def clean_and_noise(self, state: Tensor, times: Tensor, of_label: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.number.alpha(times)[:, None], self.number.sigma(times)[:, None]
        variance = (alpha * DEVIATION) ** 2 + sigma**2
        gap = state[:, None] - alpha * MEANS
        weights = (of_label.log() - gap**2 / (2 * variance)).softmax(1)
        clean = (weights * (MEANS + alpha * DEVIATION**2 / variance * gap)).sum(1)
        return clean, (state - alpha[:, 0] * clean) / sigma[:, 0].clamp_min(1e-12)


def given_label(value: int, count: int) -> Conditions:
    return Conditions(given={"label": torch.full((count, 1), value)})


def integrated(process: Gaussian, start: Tensor, weight: float, interval: tuple[float, float], steps: int = 2000) -> Tensor:
    """The guided probability-flow ODE of label 1 by the classical Runge-Kutta method, in float64."""
    exact = Exact(model_of())
    known = torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(len(start), 2)
    unknown = SHARES.expand(len(start), 2)

    def velocity(state: Tensor, time: float) -> Tensor:
        times = torch.full((len(state),), time, dtype=torch.float64)
        sides = []
        for of_label in (known, unknown):
            clean, noise = exact.clean_and_noise(state, times, of_label)
            sides.append(noise - clean)
        w = weight if interval[0] <= time <= interval[1] else 1.0
        return w * sides[0] + (1 - w) * sides[1]

    state, h = start.double(), -1.0 / steps
    for index in range(steps):
        time = 1 + index * h
        first = velocity(state, time)
        second = velocity(state + h / 2 * first, time + h / 2)
        third = velocity(state + h / 2 * second, time + h / 2)
        fourth = velocity(state + h * third, max(time + h, 1e-9))
        state = state + h / 6 * (first + 2 * second + 2 * third + fourth)
    return state


@pytest.mark.parametrize("weight", [0.0, 1.5, 3.0])
def test_a_guided_mixture_follows_the_closed_form_ode(weight):
    model = model_of()
    start = build_processes(model)["number"].prior(KEYS[:50])
    sampler = Sampler(model, Sampling(steps=200, guidance=weight))
    made = sampler.sample(Exact(model), KEYS[:50], generate=["number"], conditions=given_label(1, 50))["number"]
    expected = integrated(build_processes(model)["number"], start[:, 0, 0, 0], weight, (0.0, 1.0))  # type: ignore[arg-type]
    assert (made[:, 0, 0, 0] - expected).abs().max() < 2e-3
    if weight > 1:
        plain = Sampler(model, Sampling(steps=200)).sample(
            Exact(model), KEYS[:50], generate=["number"], conditions=given_label(1, 50)
        )["number"]
        assert (made - plain).mean() > 0.02  # guided away from the other component


def test_guidance_in_an_interval_follows_the_closed_form_ode():
    model = model_of()
    start = build_processes(model)["number"].prior(KEYS[:50])
    sampler = Sampler(model, Sampling(steps=400, guidance=4.0, guidance_interval=(0.301, 0.699)))
    made = sampler.sample(Exact(model), KEYS[:50], generate=["number"], conditions=given_label(1, 50))["number"]
    expected = integrated(build_processes(model)["number"], start[:, 0, 0, 0], 4.0, (0.3, 0.7))  # type: ignore[arg-type]
    assert (made[:, 0, 0, 0] - expected).abs().max() < 1e-2


@pytest.mark.parametrize(("schedule", "target"), [("rectified_flow", "velocity"), ("vp", "epsilon"), ("cosine", "v")])
@pytest.mark.parametrize("final", [1.0, 0.6])
def test_a_guided_prediction_is_the_weighted_sum_of_two_closed_forms(schedule, target, final):
    """Below 1 the label is hidden with that probability: the unconditional side is then one of the two, per sample."""
    model, count, weight, time = model_of(schedule, target), 400, 3.0, 0.4
    processes, exact = build_processes(model), Exact(model)
    states = {
        "label": torch.ones(count, 1, dtype=torch.int64),
        "word": torch.full((count, 1), 4),
        "number": torch.linspace(-2, 2, count)[:, None, None, None],
    }
    times = {"label": torch.zeros(count), "word": torch.ones(count), "number": torch.full((count,), time)}
    guided = Guided(exact, processes, Sampling(guidance=weight, guidance_final_time=final), KEYS[:count])
    found = guided(states, times, {"number": Dense()})["number"]

    def prediction(label: int) -> Tensor:
        noised = Noised({**states, "label": torch.full((count, 1), label)}, {"number": times["number"]}, {})
        return exact(noised, {"number": Dense()})["number"]

    conditional, unconditional = prediction(1), weight * prediction(1) + (1 - weight) * prediction(2)
    is_plain = (found - conditional).abs().flatten() < 1e-5
    is_guided = (found - unconditional).abs().flatten() < 1e-5
    assert (is_plain | is_guided).all()
    assert abs(is_guided.double().mean() - final) < (0.1 if final < 1 else 1e-9) + 4 * (final * (1 - final) / count) ** 0.5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0, 5.0])
def test_a_guided_categorical_is_drawn_from_its_closed_form(weight, temperature):
    model = model_of()
    sampler = Sampler(model, Sampling(steps=1, guidance=weight, temperature=temperature))
    made = sampler.sample(Exact(model), KEYS, generate=["word"], conditions=given_label(1, COUNT))["word"][:, 0]
    expected = ((weight * TABLE[1].log() + (1 - weight) * (SHARES @ TABLE).log()) / temperature).softmax(0)
    found = torch.bincount(made, minlength=4).double()
    assert ((found - COUNT * expected) ** 2 / (COUNT * expected)).sum() < 22  # three degrees of freedom: 99.99 %


def test_autoguidance_adds_what_the_weaker_network_lacks():
    """D_cfg + (v - 1)(D_conditional - D_weak), for grids as they are and for tokens in logits."""
    model, count = model_of(), 200
    processes, exact, weak = build_processes(model), Exact(model), Exact(model, bias=0.2)
    states = {
        "label": torch.zeros(count, 1, dtype=torch.int64),
        "word": torch.full((count, 1), 4),
        "number": torch.linspace(-2, 2, count)[:, None, None, None],
    }
    times = {"label": torch.zeros(count), "word": torch.ones(count), "number": torch.full((count,), 0.5)}
    sampling, keys = Sampling(guidance=2.0, autoguidance=1.5), KEYS[:count]
    uniforms = rng.uniform(keys, "word", dtype=torch.float64)
    rows = SampledRows(torch.arange(count)[None], torch.ones(1, count), uniforms, DrawRule())
    found = Guided(exact, processes, sampling, keys, weak)(states, times, {"number": Dense(), "word": rows})
    cfg = Guided(exact, processes, Sampling(guidance=2.0), keys)(states, times, {"number": Dense()})["number"]
    noised = Noised(states, times, {})
    gap = exact(noised, {"number": Dense()})["number"] - weak(noised, {"number": Dense()})["number"]
    torch.testing.assert_close(found["number"], cfg + 0.5 * gap, atol=1e-5, rtol=0)
    of_class, of_none = TABLE[0], SHARES @ TABLE
    # Normalisers of the rows differ, and do not matter.
    logits = 2 * of_class.log() - of_none.log() + 0.5 * (of_class.log() - (of_class + 0.2).log())
    wanted = drawn_from(logits.expand(count, 1, 4), rows)
    assert isinstance(found["word"], Drawn)
    assert torch.equal(found["word"].ids, wanted.ids)
    torch.testing.assert_close(found["word"].log_probability, wanted.log_probability.float(), atol=1e-5, rtol=1e-5)
