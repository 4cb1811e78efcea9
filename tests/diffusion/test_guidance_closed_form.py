"""Guidance against closed forms: a number that is one of two normals with its label, and a categorical with its class.

label ~ SHARES; number ~ N(MEANS[label], DEVIATION^2); word ~ TABLE[label]; number and word are independent given the label.
Legend: B samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import Model, Sampling
from megadiff.diffusion.build import build_processes
from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.guidance import Guided
from megadiff.diffusion.sampler import Conditions, Sampler
from megadiff.types import Dense, DrawRule, Noised, Prediction, Readout, RowKeys, RowLogits, SampledRows, TokenDraws
from tests.diffusion.ideal import drawn_from

pytestmark = pytest.mark.thorough

MEANS, DEVIATION = torch.tensor([-1.0, 0.8], dtype=torch.float64), 0.3
SHARES = torch.tensor([0.4, 0.6], dtype=torch.float64)
TABLE = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
"""p(word | label)."""
UNKNOWN, NO_WORD = 2, 4
"""The mask states."""
COUNT = 20_000
KEYS = rng.sample_keys(3, torch.arange(COUNT))
KINDS = [("rectified_flow", "velocity"), ("vp", "epsilon"), ("cosine", "v")]
CRITICAL = 21.1
"""Chi-square with three degrees of freedom exceeds it once in 10,000 times."""


def model_of(schedule: str = "rectified_flow", target: str = "velocity") -> Model:
    def tokens(vocabulary: int) -> dict[str, Any]:
        return {"space": {"kind": "tokens", "vocabulary": vocabulary, "length": 1}, "process": {"kind": "masked"}}

    number = {
        "space": {"kind": "grid", "channels": 1, "height": 1, "width": 1},
        "process": {"kind": "gaussian", "schedule": schedule, "target": target},
    }
    modalities = {"label": tokens(2), "word": tokens(4), "number": number}
    return Model.model_validate({"width": 8, "heads": 1, "head_dim": 8, "joint_depth": 1, "modalities": modalities})


class Exact:
    """The exact posteriors. A weaker network has wider normals, and a flatter table."""

    def __init__(self, model: Model, *, deviation: float = DEVIATION, flatness: float = 0.0) -> None:
        process = build_processes(model)["number"]
        assert isinstance(process, Gaussian)
        self.process, self.deviation = process, deviation
        self.table = (1 - flatness) * TABLE + flatness / 4
        self.seen: list[Noised] = []

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        self.seen.append(noised)
        label, word = noised.states["label"][:, 0], noised.states["word"][:, 0]
        state = noised.states["number"][:, 0, 0, 0].double()
        alpha, sigma = (share(noised.clocks["number"].double()) for share in (self.process.alpha, self.process.sigma))
        of_label, of_word = torch.zeros(len(label), 2, dtype=torch.float64), torch.zeros(len(label), 2, dtype=torch.float64)
        of_label[label == 0, 1] = of_label[label == 1, 0] = -torch.inf
        shown = word != NO_WORD
        of_word[shown] = self.table.log().T[word[shown]]
        logs = SHARES.log() + of_label + of_word
        variance = ((alpha * self.deviation) ** 2 + sigma**2)[:, None]
        gap = state[:, None] - alpha[:, None] * MEANS
        shares = (logs - gap**2 / (2 * variance)).softmax(1)  # of the label, given all that is seen
        found: Prediction = {}
        for name, request in readout.items():
            if name == "number":
                clean = (shares * (MEANS + alpha[:, None] * self.deviation**2 / variance * gap)).sum(1)
                noise = (state - alpha * clean) / sigma.clamp_min(1e-12)
                wide = [value[:, None, None, None] for value in (clean, noise)]
                found[name] = self.process.target(*wide, noised.clocks["number"].double()).float()  # type: ignore[call-arg]
                continue
            # A label is known by its own token, too: the head of a visible position is never asked.
            probability = shares if name == "label" else shares @ self.table
            logits = probability.log()[:, None]
            found[name] = logits[:, 0][request.rows] if isinstance(request, RowLogits) else drawn_from(logits, request)
        return found


def full(value: int, count: int) -> Tensor:
    return torch.full((count, 1), value)


def given_label(value: int, count: int) -> Conditions:
    return Conditions(given={"label": full(value, count)})


def states_of(numbers: Tensor, label: int) -> dict[str, Tensor]:
    count = len(numbers)
    return {"label": full(label, count), "word": full(NO_WORD, count), "number": numbers.float().view(-1, 1, 1, 1)}


def clocks_of(count: int, label: float, word: float, number: float) -> dict[str, Tensor]:
    return {name: torch.full((count,), time) for name, time in (("label", label), ("word", word), ("number", number))}


# ------------------------------------------------------------------------------------- the guided ODE, written anew in numpy

Share = Callable[[float], tuple[float, float, float, float]]


def _vp(u: float) -> tuple[float, float, float, float]:
    low, high = 0.00085**0.5, 0.012**0.5
    t, root = u * u, low + (high - low) * u * u
    exponent = 1000 * (low**2 * t + low * (high - low) * t**2 + (high - low) ** 2 * t**3 / 3)  # of alpha^2
    alpha, sigma = math.exp(-exponent / 2), math.sqrt(-math.expm1(-exponent))
    rate = 1000 * root**2 * 2 * u
    return alpha, sigma, -alpha * rate / 2, alpha**2 * rate / (2 * sigma)


def _cosine(u: float) -> tuple[float, float, float, float]:
    angle, rate = math.pi / 2 * u * u, math.pi * u
    return math.cos(angle), math.sin(angle), -math.sin(angle) * rate, math.cos(angle) * rate


def _flow(u: float) -> tuple[float, float, float, float]:
    return 1 - u * u, u * u, -2 * u, 2 * u


SCHEDULES: dict[str, Share] = {"vp": _vp, "cosine": _cosine, "rectified_flow": _flow}
"""alpha, sigma and their derivatives in u = sqrt(t), in which none of them is steep."""


def _clean(x: np.ndarray, alpha: float, sigma: float, shares: np.ndarray, deviation: float) -> np.ndarray:
    """E[number | x] for a mixture of two normals with these shares."""
    variance = (alpha * deviation) ** 2 + sigma**2
    gap = x[:, None] - alpha * MEANS.numpy()
    weights = shares * np.exp(-(gap**2) / (2 * variance))
    weights /= weights.sum(1, keepdims=True)
    return (weights * (MEANS.numpy() + alpha * deviation**2 / variance * gap)).sum(1)


def integrated(
    schedule: str,
    start: Tensor,
    weight: np.ndarray | float,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    weaker: tuple[float, float] | None = None,
    steps: int = 250,
) -> Tensor:
    """Label 1's guided probability-flow ODE dx = alpha' D + sigma' N by the classical Runge-Kutta method, float64 [B].

    D = w D_known + (1 - w) D_unknown, with one w or one per sample; N = (x - alpha D) / sigma.

    Args:
        weaker: (v, deviation): (v - 1) (D_known - that of wider normals) is added to D.
    """
    x, share = start.double().flatten().numpy(), SCHEDULES[schedule]
    known, unknown = np.array([0.0, 1.0]), SHARES.numpy()

    def clean(x: np.ndarray, u: float, inside: bool) -> np.ndarray:
        alpha, sigma, *_ = share(u)
        of_known = _clean(x, alpha, sigma, known, DEVIATION)
        found = weight * of_known + (1 - weight) * _clean(x, alpha, sigma, unknown, DEVIATION) if inside else of_known
        return found if weaker is None else found + (weaker[0] - 1) * (of_known - _clean(x, alpha, sigma, known, weaker[1]))

    def slope(x: np.ndarray, u: float, inside: bool) -> np.ndarray:
        alpha, sigma, of_clean, of_noise = share(u)
        aim = clean(x, u, inside)
        return of_clean * aim + of_noise * (x - alpha * aim) / sigma

    # The right-hand side jumps at the interval's ends: no step may lie across one.
    ends = [1.0, *(math.sqrt(t) for t in reversed(interval) if 0 < t < 1), 1e-4]
    for first, last in pairwise(ends):
        inside = interval[0] <= ((first + last) / 2) ** 2 <= interval[1]
        count = max(round(steps * (first - last)), 20)
        h = (last - first) / count
        for index in range(count):
            u = first + index * h
            one = slope(x, u, inside)
            two = slope(x + h / 2 * one, u + h / 2, inside)
            three = slope(x + h / 2 * two, u + h / 2, inside)
            four = slope(x + h * three, u + h, inside)
            x = x + h / 6 * (one + 2 * two + 2 * three + four)
    return torch.from_numpy(clean(x, 1e-4, interval[0] == 0))


def sampled(model: Model, sampling: Sampling, count: int, guide: Exact | None = None) -> tuple[Tensor, Tensor, Exact]:
    """(where the numbers start, where they end, the network) given label 1."""
    network, start = Exact(model), build_processes(model)["number"].prior(KEYS[:count])
    conditions = given_label(1, count)._replace(initial={"number": start})
    made = Sampler(model, sampling).sample(network, KEYS[:count], generate=["number"], conditions=conditions, guide=guide)
    return start[:, 0, 0, 0], made["number"][:, 0, 0, 0], network


def test_the_runge_kutta_reference_keeps_the_quantiles_of_a_normal():
    """Unguided, every schedule moves a state along its quantile; the reference is then known in closed form."""
    for schedule, share in SCHEDULES.items():
        alpha, sigma, *_ = share(1.0)
        quantile = torch.linspace(-2, 2, 9, dtype=torch.float64)
        start = alpha * MEANS[1] + math.sqrt((alpha * DEVIATION) ** 2 + sigma**2) * quantile
        assert torch.allclose(integrated(schedule, start, 1.0), MEANS[1] + DEVIATION * quantile, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- (a) numbers


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize(("schedule", "target"), KINDS)
def test_a_guided_prediction_is_the_weighted_sum_of_two_closed_forms(schedule, target, weight):
    model, count = model_of(schedule, target), 41
    processes, states = build_processes(model), states_of(torch.linspace(-2, 2, count), label=1)
    for time in (0.02, 0.3, 0.7, 0.99):
        times = clocks_of(count, 0.0, 1.0, time)
        found = Guided(Exact(model), processes, Sampling(guidance=weight), KEYS[:count])(states, times, {"number": Dense()})
        alpha, sigma, *_ = SCHEDULES[schedule](math.sqrt(time))
        x = states["number"].double().flatten().numpy()
        sides = (_clean(x, alpha, sigma, shares, DEVIATION) for shares in (np.array([0.0, 1.0]), SHARES.numpy()))
        clean = weight * next(sides) + (1 - weight) * next(sides)
        noise = (x - alpha * clean) / sigma
        # All targets are linear in (clean, noise), and the weights add up to 1: so guided targets are those of guided ones.
        expected = {"velocity": noise - clean, "epsilon": noise, "v": alpha * noise - sigma * clean}[target]
        scale = 1 / sigma if target != "v" else 1.0
        assert np.abs(found["number"].flatten().numpy() - expected).max() < 2e-5 * scale * (1 + weight)


@pytest.mark.parametrize("weight", [0.5, 3.0])
@pytest.mark.parametrize(("schedule", "target"), KINDS)
def test_guided_samples_follow_the_closed_form_ode(schedule, target, weight):
    start, made, _ = sampled(model_of(schedule, target), Sampling(steps=200, guidance=weight), 40)
    assert (made - integrated(schedule, start, weight)).abs().max() < 1e-3
    unguided = integrated(schedule, start, 1.0)
    if weight > 1:
        assert (made - unguided).mean() > 0.02  # away from the other component


@pytest.mark.parametrize(("schedule", "target"), [KINDS[0], KINDS[2]])
def test_guidance_in_an_interval_follows_the_closed_form_ode(schedule, target):
    """The ends lie in the middle of a step, whose two evaluations then stand on either side of it."""
    interval = (0.3025, 0.6975)
    sampling = Sampling(steps=200, guidance=4.0, guidance_interval=interval)
    start, made, network = sampled(model_of(schedule, target), sampling, 40)
    assert (made - integrated(schedule, start, 4.0, interval=interval)).abs().max() < 1e-3
    assert (made - integrated(schedule, start, 4.0)).abs().max() > 0.01
    for noised in network.seen:
        time = noised.clocks["number"][0].item()
        assert len(noised.states["number"]) == (80 if 0.3025 <= time <= 0.6975 else 40)


@pytest.mark.parametrize(("schedule", "target"), KINDS)
def test_noisy_guidance_follows_the_closed_form_ode_of_each_samples_own_noise(schedule, target):
    """A final time of 0.6 hides the label from the other branch with that probability, once and for all of a run."""
    count, weight = 60, 3.0
    sampling = Sampling(steps=200, guidance=weight, guidance_final_time=0.6)
    start, made, network = sampled(model_of(schedule, target), sampling, count)
    others = [noised.states["label"][count:, 0] for noised in network.seen]
    assert len(others) == 399
    assert all(torch.equal(labels, others[0]) for labels in others)
    assert all((noised.clocks["label"][count:] == 0.6).all() for noised in network.seen)
    hidden = others[0] == UNKNOWN
    assert (others[0][~hidden] == 1).all()
    assert abs(hidden.double().mean() - 0.6) < 4 * (0.24 / count) ** 0.5
    of_sample = np.where(hidden.numpy(), weight, 1.0)  # where the label is seen both branches are the same
    assert (made - integrated(schedule, start, of_sample)).abs().max() < 1e-3


def test_noisy_guidance_hides_the_condition_with_the_final_times_probability():
    model, final = model_of(), 0.6
    states, times = states_of(torch.zeros(COUNT), label=1), clocks_of(COUNT, 0.0, 1.0, 0.4)
    network = Exact(model)
    Guided(network, build_processes(model), Sampling(guidance=2.0, guidance_final_time=final), KEYS)(
        states, times, {"number": Dense()}
    )
    hidden = (network.seen[0].states["label"][COUNT:] == UNKNOWN).double().mean().item()
    assert abs(hidden - final) < 4 * (final * (1 - final) / COUNT) ** 0.5


# -------------------------------------------------------------------------------------------------------- (b) categoricals


def assert_drawn_from(words: Tensor, expected: Tensor) -> None:
    """Chi-square; nothing of probability 0."""
    found, expected = torch.bincount(words.flatten(), minlength=len(expected)).double(), expected / expected.sum()
    possible = expected > 0
    assert found[~possible].sum() == 0
    aim = len(words) * expected[possible]
    assert ((found[possible] - aim) ** 2 / aim).sum() < CRITICAL, (found, expected)


def guided_words(weight: float, label: int = 1) -> Tensor:
    """p_c^w p_u^(1 - w), before its normalisation."""
    return TABLE[label] ** weight * (SHARES @ TABLE) ** (1 - weight)


@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 5, "order": "tau_leaping"}, {"order": "first_hitting"}], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0, 5.0])
def test_a_guided_categorical_is_drawn_from_its_closed_form(weight, temperature, options):
    sampler = Sampler(model_of(), Sampling(guidance=weight, temperature=temperature, **options))
    made = sampler.sample(Exact(model_of()), KEYS, generate=["word"], conditions=given_label(1, COUNT))["word"]
    assert_drawn_from(made, guided_words(weight) ** (1 / temperature))
    if weight > 1:
        with pytest.raises(AssertionError):
            assert_drawn_from(made, TABLE[1] ** (1 / temperature))


def test_the_likeliest_words_are_chosen_after_guidance():
    """Before it a nucleus of 0.75 holds words 1, 2 and 3 of label 1; after guidance at 5, word 3 alone has 0.71."""
    sampling = Sampling(steps=1, guidance=5.0, top_p=0.75)
    made = Sampler(model_of(), sampling).sample(Exact(model_of()), KEYS, generate=["word"], conditions=given_label(1, COUNT))
    guided = guided_words(5.0) / guided_words(5.0).sum()
    assert 0.6 < guided[3] < 0.75 < guided[2] + guided[3]
    assert_drawn_from(made["word"], guided * torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_temperature_is_that_of_the_guided_words_and_comes_before_top_p():
    """At temperature 0.7 guided word 3 has more than 0.75 by itself."""
    sampling = Sampling(steps=1, guidance=5.0, top_p=0.75, temperature=0.7)
    made = Sampler(model_of(), sampling).sample(Exact(model_of()), KEYS, generate=["word"], conditions=given_label(1, COUNT))
    assert (made["word"] == 3).all()


def test_what_is_told_of_a_guided_draw_is_that_of_the_guided_distribution():
    """Orders by sureness read it: it is normalised, and before the temperature."""
    count, processes = 4000, build_processes(model_of())
    keys = RowKeys(KEYS[:count], "word", torch.zeros(count, dtype=torch.int64))
    rows = SampledRows(torch.arange(count)[None], torch.ones(1, count), keys, DrawRule(temperature=0.7))
    states, times = states_of(torch.zeros(count), label=1), clocks_of(count, 0.0, 1.0, 1.0)
    found = Guided(Exact(model_of()), processes, Sampling(guidance=2.0), KEYS[:count])(states, times, {"word": rows})["word"]
    expected = guided_words(2.0) / guided_words(2.0).sum()
    torch.testing.assert_close(found.log_probability, expected.log().float()[found.ids], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropy, torch.special.entr(expected).sum().float().expand(count), atol=1e-5, rtol=1e-5)
    assert sorted(found.ids.unique().tolist()) == [0, 1, 2, 3]


def test_noisy_guidance_of_words_is_a_mixture_of_two_closed_forms():
    """Where the other branch still sees the label there is nothing to go away from."""
    sampling = Sampling(steps=1, guidance=3.0, guidance_final_time=0.6)
    made = Sampler(model_of(), sampling).sample(Exact(model_of()), KEYS, generate=["word"], conditions=given_label(0, COUNT))
    guided = guided_words(3.0, label=0)
    assert_drawn_from(made["word"], 0.6 * guided / guided.sum() + 0.4 * TABLE[0])


# ------------------------------------------------------------------------------------------------------- (c) autoguidance


@pytest.mark.parametrize("away", [0.0, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("weight", [1.0, 2.5])
@pytest.mark.parametrize(("schedule", "target"), KINDS)
def test_autoguided_numbers_go_away_from_the_weaker_network(schedule, target, weight, away):
    """v D + (1 - v) D_weak; with classifier-free guidance D_cfg + (v - 1) (D_conditional - D_weak)."""
    model, count = model_of(schedule, target), 41
    exact, weak = Exact(model), Exact(model, deviation=0.6)
    states, times = states_of(torch.linspace(-2, 2, count), label=1), clocks_of(count, 0.0, 1.0, 0.5)
    sampling = Sampling(guidance=weight, autoguidance=away)
    found = Guided(exact, build_processes(model), sampling, KEYS[:count], weak)(states, times, {"number": Dense()})["number"]

    def prediction(network: Exact, label: int) -> Tensor:
        noised = Noised({**states, "label": full(label, count)}, times, {})
        return network(noised, {"number": Dense()})["number"]

    calls, batches = len(weak.seen), [len(noised.states["number"]) for noised in exact.seen]
    strong, weaker, free = prediction(exact, 1), prediction(weak, 1), prediction(exact, UNKNOWN)
    if weight == 1:
        expected = away * strong + (1 - away) * weaker
    else:
        expected = weight * strong + (1 - weight) * free + (away - 1) * (strong - weaker)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert batches == [count * (1 + (weight != 1))]
    assert calls == (away != 1)
    assert (strong - weaker).abs().max() > 0.1
    # The weaker network sees what the conditional branch sees.
    assert all((noised.states["label"] == 1).all() for noised in weak.seen)


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_autoguided_samples_follow_the_closed_form_ode(weight):
    model, away, wider = model_of(), 1.6, 0.5
    sampling = Sampling(steps=200, guidance=weight, autoguidance=away)
    start, made, _ = sampled(model, sampling, 40, guide=Exact(model, deviation=wider))
    assert (made - integrated("rectified_flow", start, weight, weaker=(away, wider))).abs().max() < 1e-3
    assert (made - integrated("rectified_flow", start, weight)).abs().max() > 0.02


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("weight", "away"), [(1.0, 0.0), (1.0, 2.0), (2.0, 1.5), (0.5, 3.0), (2.0, 1.0)])
def test_autoguided_words_are_drawn_from_their_closed_form(weight, away, temperature):
    """p_cfg (p_conditional / p_weak)^(v - 1), normalised, then the temperature."""
    model, weak = model_of(), Exact(model_of(), flatness=0.5)
    sampler = Sampler(model, Sampling(steps=2, guidance=weight, autoguidance=away, temperature=temperature))
    made = sampler.sample(Exact(model), KEYS, generate=["word"], conditions=given_label(1, COUNT), guide=weak)["word"]
    expected = guided_words(weight) * (TABLE[1] / weak.table[1]) ** (away - 1)
    assert_drawn_from(made, expected ** (1 / temperature))
    assert bool(weak.seen) == (away != 1)


def test_numbers_and_words_are_autoguided_together_each_with_its_own_branch():
    """Three branches of the network, one of the weaker one; probabilities told of draws are the mixture's."""
    model, count = model_of(), 500
    processes, exact, weak = build_processes(model), Exact(model), Exact(model, deviation=0.5, flatness=0.3)
    states, times = states_of(torch.linspace(-2, 2, count), label=0), clocks_of(count, 0.0, 0.5, 0.5)
    keys = RowKeys(KEYS[:count], "word", torch.zeros(count, dtype=torch.int64))
    rows = SampledRows(torch.arange(count)[None], torch.ones(1, count), keys, DrawRule())
    readout = {"number": Dense(), "word": rows}
    found = Guided(exact, processes, Sampling(guidance=2.0, autoguidance=1.5), KEYS[:count], weak)(states, times, readout)
    assert [len(noised.states["word"]) for noised in exact.seen] == [3 * count]
    assert [len(noised.states["word"]) for noised in weak.seen] == [count]
    numbers, words = (exact.seen[0].states[name].view(3, count) for name in ("number", "word"))
    assert (words == NO_WORD).all()
    # The number's branch keeps the number and hides the label; the word's branch hides both.
    labels = exact.seen[0].states["label"].view(3, count)
    kept = [torch.equal(branch, numbers[0]) for branch in numbers]
    assert sorted(kept) == [False, True, True]
    assert (labels[0] == 0).all()
    assert (labels[1:] == UNKNOWN).all()
    expected = guided_words(2.0, label=0) * (TABLE[0] / weak.table[0]) ** 0.5
    expected = expected / expected.sum()
    assert isinstance(found["word"], TokenDraws)
    wanted = drawn_from(expected.log().expand(count, 1, 4), rows)
    assert torch.equal(found["word"].ids, wanted.ids)
    torch.testing.assert_close(found["word"].log_probability, wanted.log_probability.float(), atol=1e-5, rtol=1e-5)

    def prediction(network: Exact, label: int) -> Tensor:
        noised = Noised({**states, "label": full(label, count)}, times, {})
        return network(noised, {"number": Dense()})["number"]

    strong = prediction(exact, 0)
    wanted_number = 2 * strong - prediction(exact, UNKNOWN) + 0.5 * (strong - prediction(weak, 0))
    torch.testing.assert_close(found["number"], wanted_number, atol=2e-5, rtol=0)
