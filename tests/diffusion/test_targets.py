"""Targets and weights of Gaussian processes, schedules and bounds of categorical ones: against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import GaussianProcess, GridSpace, MaskedProcess, TokenSpace, UniformProcess
from megadiff.diffusion.categorical import Schedule
from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.masked import Masked
from megadiff.diffusion.objective import DiffusionObjective
from megadiff.diffusion.process import NoisedState
from megadiff.diffusion.uniform import Uniform
from tests.diffusion.ideal import IdealDenoiser, draw_pairs
from tests.diffusion.small import batch_of, model_of, stage_of, told

pytestmark = pytest.mark.thorough

GRID = GridSpace(channels=1, height=1, width=2)
GAUSSIAN_SCHEDULES = ("vp", "cosine", "rectified_flow")
TARGETS = ("epsilon", "clean", "v", "velocity")
SCHEDULES = ("linear", "cosine", "geometric")
COUNT = 20_000
KEYS = rng.sample_keys(11, torch.arange(COUNT))


def gaussian(schedule: str, target: str, **config) -> Gaussian:
    return Gaussian("grid", GaussianProcess(schedule=schedule, target=target, **config), GRID)


def wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]


# ------------------------------------------------------------------------------------------------------------ gaussian


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", GAUSSIAN_SCHEDULES)
def test_a_target_stands_for_the_clean_state_and_the_noise_it_was_made_of(schedule, target):
    process = gaussian(schedule, target)
    times = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    clean, noise = (torch.randn(50, 1, 1, 2, dtype=torch.float64) for _ in range(2))
    state = wide(process.alpha(times)) * clean + wide(process.sigma(times)) * noise
    found = process.clean_and_noise(process.target(clean, noise, times), state, times)
    torch.testing.assert_close(found[0], clean, atol=1e-9, rtol=0)
    torch.testing.assert_close(found[1], noise, atol=1e-9, rtol=0)


@pytest.mark.parametrize("schedule", GAUSSIAN_SCHEDULES)
@pytest.mark.parametrize("target", ["v", "velocity"])
def test_v_and_velocity_are_singular_at_no_time(schedule, target):
    process = gaussian(schedule, target)
    ends = torch.tensor([0.0, 1.0])
    clean, noise = torch.randn(2, 1, 1, 2), torch.randn(2, 1, 1, 2)
    state = wide(process.alpha(ends)) * clean + wide(process.sigma(ends)) * noise
    found = process.clean_and_noise(process.target(clean, noise, ends), state, ends)
    torch.testing.assert_close(torch.stack(found), torch.stack([clean, noise]), atol=1e-5, rtol=1e-5)


def test_the_four_targets_are_what_their_names_say():
    clean, noise, times = torch.tensor([[[[2.0]]]]), torch.tensor([[[[0.5]]]]), torch.tensor([0.3])
    alpha, sigma = gaussian("vp", "v").alpha(times), gaussian("vp", "v").sigma(times)
    values = {target: gaussian("vp", target).target(clean, noise, times).item() for target in TARGETS}
    assert values == pytest.approx(
        {"epsilon": 0.5, "clean": 2.0, "v": (alpha * 0.5 - sigma * 2.0).item(), "velocity": -1.5}, rel=1e-6
    )


@pytest.mark.parametrize("schedule", GAUSSIAN_SCHEDULES)
def test_schedules_run_from_the_data_to_noise(schedule):
    process = gaussian(schedule, "v")
    times = torch.linspace(0, 1, 101)
    alpha, sigma = process.alpha(times), process.sigma(times)
    assert (alpha[0], sigma[0]) == (1, 0)
    assert alpha[-1] == pytest.approx(0.069 if schedule == "vp" else 0.0, abs=1e-4)
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()
    if schedule != "rectified_flow":
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(101))


def test_the_shift_moves_a_flow_towards_noise_as_sd3_does():
    times = torch.linspace(0, 1, 11)
    shifted = gaussian("rectified_flow", "velocity", shift=3.0)
    torch.testing.assert_close(shifted.sigma(times), 3 * times / (1 + 2 * times))
    torch.testing.assert_close(shifted.alpha(times) + shifted.sigma(times), torch.ones(11))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", ["vp", "cosine"])
def test_min_snr_weighs_every_target_as_min_snr_gamma_does_the_clean_state(schedule, target):
    process = gaussian(schedule, target, loss_weight="min_snr", min_snr_gamma=5.0)
    times = torch.linspace(0.02, 0.98, 40)
    clean, noise = torch.randn(40, 1, 1, 2), torch.randn(40, 1, 1, 2)
    alpha, sigma = wide(process.alpha(times)), wide(process.sigma(times))
    state = alpha * clean + sigma * noise
    wrong = clean + 0.1 * torch.randn_like(clean)
    prediction = process.target(wrong, (state - alpha * wrong) / sigma, times)
    noised = NoisedState(state, process.target(clean, noise, times))
    weight = ((alpha / sigma) ** 2).clamp_max(5.0)
    expected = (weight * (wrong - clean) ** 2).flatten(1).sum(1)
    torch.testing.assert_close(process.losses(prediction, noised, times).sums, expected, rtol=2e-3, atol=1e-6)
    unweighted = (prediction - noised.target).square().flatten(1).sum(1)
    torch.testing.assert_close(process.losses(prediction, noised, times, exact=True).sums, unweighted)


@pytest.mark.parametrize("schedule", GAUSSIAN_SCHEDULES)
def test_velocity_weighs_the_clean_state_as_a_network_of_velocities_would(schedule):
    process = gaussian(schedule, "clean", loss_weight="velocity")
    times = torch.linspace(0.2, 1.0, 40)
    clean, noise = torch.randn(40, 1, 1, 2), torch.randn(40, 1, 1, 2)
    state = wide(process.alpha(times)) * clean + wide(process.sigma(times)) * noise
    prediction = clean + 0.1 * torch.randn_like(clean)
    expected = (process.slope(prediction, state, times) - (noise - clean)).square().flatten(1).sum(1)
    torch.testing.assert_close(
        process.losses(prediction, NoisedState(state, clean), times).sums, expected, rtol=2e-3, atol=1e-5
    )
    assert process.velocity_weight(torch.tensor([0.0])) == 400  # never unbounded


# --------------------------------------------------------------------------------------------------------- categorical


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_rises_from_0_to_1_and_its_weight_is_its_logarithmic_derivative(kind):
    schedule = Schedule(kind)
    times = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    step = 1e-6
    slope = (schedule.share(times + step) - schedule.share(times - step)) / (2 * step)
    torch.testing.assert_close(schedule.weight(times), slope / schedule.share(times), rtol=1e-4, atol=0)
    torch.testing.assert_close(schedule.rate(times), slope / (1 - schedule.share(times)).clamp_min(1e-6), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(schedule.time_of(schedule.share(times)), times, rtol=1e-5, atol=1e-9)
    ends = schedule.share(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)
    assert ends[0] == 0


PROBABILITIES = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
ENTROPY = -(PROBABILITIES * PROBABILITIES.log()).sum().item()
IID = torch.searchsorted(PROBABILITIES.cumsum(0), rng.uniform(KEYS, "iid", (8,)).contiguous()).clamp_max(4)
TIMES = rng.uniform(KEYS, "test times").clamp_min(1e-5)
SPACE = TokenSpace(vocabulary=5, length=8)


def assert_mean(values: Tensor, expected: float) -> None:
    assert abs(values.double().mean().item() - expected) < 4 * values.double().std().item() / len(values) ** 0.5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_masked_bound_of_a_known_categorical_is_its_entropy_in_every_schedule(schedule):
    process = Masked("tokens", MaskedProcess(schedule=schedule), SPACE)
    noised = process.noise(IID, TIMES, KEYS)
    found = process.losses(told(process, noised, TIMES, -PROBABILITIES.log()[IID]), noised, TIMES, exact=True)
    assert_mean(found.sums / found.counts, ENTROPY)


def posterior(process: Uniform, state: Tensor, times: Tensor) -> Tensor:
    """Log-probabilities [B, S, V] of independent tokens given themselves noised."""
    share = process.schedule.share(times.double())[:, None, None]
    likelihood = share / 5 + (1 - share) * torch.nn.functional.one_hot(state, 5)
    return (PROBABILITIES.double() * likelihood).log()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_uniform_bound_of_a_known_categorical_is_its_entropy_in_every_schedule(schedule):
    process = Uniform("tokens", UniformProcess(schedule=schedule), SPACE)
    noised = process.noise(IID, TIMES, KEYS)
    found = process.losses(posterior(process, noised.state, TIMES), noised, TIMES, exact=True)
    assert_mean(found.sums / found.counts, ENTROPY)


def test_a_wrong_posterior_has_a_larger_uniform_bound():
    process = Uniform("tokens", UniformProcess(), SPACE)
    noised = process.noise(IID, TIMES, KEYS)
    logits = posterior(process, noised.state, TIMES)
    right = process.losses(logits, noised, TIMES, exact=True).sums.mean()
    for wrong in (logits * 0.7, logits.roll(1, -1), torch.zeros_like(logits)):
        assert process.losses(wrong, noised, TIMES, exact=True).sums.mean() > right + 0.05


def test_the_uniform_training_losses_are_cross_entropy_or_the_bound_with_a_capped_weight():
    plain, bound = (Uniform("tokens", UniformProcess(loss=loss, weight_cap=4.0), SPACE) for loss in ("plain", "nelbo"))
    times = torch.tensor([0.05, 0.5])
    noised = plain.noise(IID[:2], times, KEYS[:2])
    logits = torch.randn(2, 8, 5)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IID[:2].flatten(), reduction="none").view(2, 8).sum(1)
    torch.testing.assert_close(plain.losses(logits, noised, times).sums, expected)
    exact = bound.losses(logits, noised, times, exact=True).sums
    torch.testing.assert_close(bound.losses(logits, noised, times).sums, exact * torch.tensor([4 * 0.05, 1.0]))
    torch.testing.assert_close(plain.losses(logits, noised, times, exact=True).sums, exact)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("now", "then"), [(0.9, 0.5), (0.5, 0.1), (1.0, 0.3), (0.4, 0.0)])
def test_going_back_with_the_clean_token_known_gives_the_marginal_of_the_earlier_time(schedule, now, then):
    process = Uniform("tokens", UniformProcess(schedule=schedule), SPACE)
    times, earlier = torch.full((COUNT,), now), torch.full((COUNT,), then)
    clean = torch.zeros(COUNT, 8, dtype=torch.int64)
    state = process.noise(clean, times, KEYS).state
    back = process.backwards(state, clean, times, earlier, rng.fold(KEYS, 1))
    share = process.schedule.share(earlier)[0].item()
    expected = torch.full((5,), share / 5).double()
    expected[0] += 1 - share
    found = torch.bincount(back.flatten(), minlength=5).double() / back.numel()
    assert ((found - expected).abs() <= 4.5 * (expected * (1 - expected) / back.numel()).sqrt() + 1e-9).all()
    # And the two are dependent as the forward process makes them: what was already clean stays it more often than not.
    kept = (back == state).double().mean()
    ratio = (1 - process.schedule.share(times)[0].item()) / (1 - share)
    assert abs(kept - (ratio + (1 - ratio) / 5)) < 0.01


def test_small_leaps_agree_with_the_exact_way_back():
    process = Uniform("tokens", UniformProcess(), SPACE)
    clean = torch.zeros(COUNT, 8, dtype=torch.int64)
    state = process.noise(clean, torch.full((COUNT,), 0.8), KEYS).state
    grid = torch.linspace(0.8, 0.3, 101)
    for index in range(100):
        now, then = (torch.full((COUNT,), grid[index + end].item()) for end in (0, 1))
        state = process.leap(state, clean, now, then, rng.fold(KEYS, index))
    found = torch.bincount(state.flatten(), minlength=5).double() / state.numel()
    expected = torch.tensor([0.7 + 0.06, 0.06, 0.06, 0.06, 0.06], dtype=torch.float64)
    assert (found - expected).abs().max() < 0.006


def test_the_plain_loss_with_a_mask_class_is_the_released_cross_entropy():
    """Over the tokens' log-probabilities and the mask's own logit beside them."""
    process = Masked("tokens", MaskedProcess(loss="plain", mask_class=True), SPACE)
    logits, mask_logit = torch.randn(3, 8, 5), torch.randn(3, 8)
    logs = logits.log_softmax(-1)
    scores = torch.cat([logs, mask_logit[..., None]], dim=-1).flatten(0, 1)
    released = torch.nn.functional.cross_entropy(scores, IID[:3].flatten(), reduction="none").view(3, 8).sum(1)
    entropies = -logs.gather(2, IID[:3][..., None])[..., 0]
    noised = process.noise(IID[:3], TIMES[:3], KEYS[:3])
    alone = told(process, noised, TIMES[:3], entropies)
    prediction = alone._replace(weighted=alone.weighted + torch.nn.functional.softplus(mask_logit))
    torch.testing.assert_close(process.losses(prediction, noised, TIMES[:3]).sums, released)
    without = Masked("tokens", MaskedProcess(loss="plain"), SPACE)
    bounds = [p.losses(x, noised, TIMES[:3], exact=True).sums for p, x in ((process, prediction), (without, alone))]
    torch.testing.assert_close(*bounds)


@pytest.mark.parametrize("tokens", [{"weight_cap": 2.0}, {"loss": "plain"}, {"kind": "uniform"}], ids=str)
def test_the_true_bound_is_reported_beside_whatever_loss_is_trained(tokens):
    model = model_of(**tokens)
    objective = DiffusionObjective(model, stage_of(400), seed=0)
    states = draw_pairs(400)
    prepared = objective.prepare(batch_of({"tokens": states["tokens"], "grid": states["grid"]}))
    prediction = IdealDenoiser(model)(prepared.noised, prepared.readout)
    terms = objective.score(prediction, prepared, {"tokens": torch.tensor(1.0), "grid": torch.tensor(1.0)})
    assert set(terms.exact) == {"tokens"}
    total, count = terms.exact["tokens"]
    exact = objective.processes["tokens"].losses(
        prediction["tokens"], prepared.states["tokens"], prepared.times["tokens"], exact=True
    )
    torch.testing.assert_close(total, exact.sums.sum())
    assert count == 400 * 3
    assert not math.isclose(total.item(), terms.sums["tokens"].item(), rel_tol=1e-3)
