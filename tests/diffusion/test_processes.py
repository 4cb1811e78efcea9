"""Processes tested as distributions: marginals, composition of noisings, conversions, losses."""

from __future__ import annotations

import math

import pytest
import torch

from megadiff import rng
from megadiff.config.schema import GaussianProcess, GridSpace, MaskedProcess, TokenSpace
from megadiff.diffusion.build import build_process, build_processes
from megadiff.diffusion.categorical import after_end
from megadiff.diffusion.gaussian import Gaussian, vp_log_alpha
from megadiff.diffusion.masked import Masked
from megadiff.types import TokenLosses
from tests.diffusion.small import model_of, told

SCHEDULES = ("vp", "rectified_flow")
TARGETS = ("epsilon", "velocity")
COUNT = 20_000
KEYS = rng.sample_keys(11, torch.arange(COUNT))
IDS = (5 * rng.uniform(KEYS, "ids", (8,))).long()
CLEAN = torch.tensor([[[[0.7, -0.3]]]])
GRID = GridSpace(channels=1, height=1, width=2)


def gaussian(schedule: str, target: str = "epsilon", clock: str = "time") -> Gaussian:
    return Gaussian("grid", GaussianProcess(schedule=schedule, target=target, clock=clock), GRID)


def masked(length: int = 8, vocabulary: int = 5, end_id: int | None = None, pad_id: int | None = None, **config) -> Masked:
    space = TokenSpace(vocabulary=vocabulary, length=length, end_id=end_id, pad_id=pad_id)
    return Masked("tokens", MaskedProcess(**config), space)


def at(time: float, count: int = COUNT) -> torch.Tensor:
    return torch.full((count,), time)


def assert_normal(values: torch.Tensor, mean: float, deviation: float) -> None:
    """Mean and variance of each column within four standard errors."""
    values = values.double()
    count = len(values)
    assert abs(values.mean() - mean) < 4 * deviation / count**0.5 + 1e-6
    assert abs(values.var() - deviation**2) < 4 * deviation**2 * (2 / count) ** 0.5 + 1e-9


def exact_vp_log_alpha(time: float) -> float:
    """-1/2 of the integral of 1000 (a + (b - a) u)^2 over 0 <= u <= time, multiplied out: no cancellation near 0."""
    a, b = math.sqrt(0.00085), math.sqrt(0.012)
    return -500 * (a * a * time + a * (b - a) * time**2 + (b - a) ** 2 * time**3 / 3)


# ------------------------------------------------------------------------------------------------------------ gaussian


@pytest.mark.parametrize("time", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noised_grids_have_the_marginal_of_their_schedule(schedule, time):
    state = gaussian(schedule).noise(CLEAN.expand(COUNT, -1, -1, -1), at(time), KEYS).state
    alpha = 1 - time if schedule == "rectified_flow" else math.exp(exact_vp_log_alpha(time))
    sigma = time if schedule == "rectified_flow" else math.sqrt(1 - alpha**2)
    for column, clean in enumerate((0.7, -0.3)):
        assert_normal(state[:, 0, 0, column], alpha * clean, sigma)


def test_vp_keeps_a_signal_share_of_0_0688_at_time_1():
    assert math.exp(vp_log_alpha(torch.tensor([1.0])).item()) == pytest.approx(0.0688, abs=2e-4)


def test_vp_schedule_agrees_with_the_product_of_the_1000_discrete_steps_of_the_paper():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    discrete = 0.5 * torch.log1p(-betas).cumsum(0)
    continuous = vp_log_alpha(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    assert ((continuous - discrete).abs() < 0.01 * discrete.abs() + 1e-5).all()


@pytest.mark.parametrize("time", [1e-5, 1e-4, 1e-3, 1e-2, 0.3, 1.0])
def test_vp_sigma_is_accurate_to_float32_down_to_the_smallest_time(time):
    sigma = gaussian("vp").sigma(torch.tensor([time]))
    exact = math.sqrt(-math.expm1(2 * exact_vp_log_alpha(float(torch.tensor(time)))))
    assert sigma.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(("now", "later"), [(0.0, 0.4), (0.2, 0.6), (0.5, 1.0), (0.3, 0.3)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_renoised_grids_have_the_marginal_of_the_later_time(schedule, now, later):
    process = gaussian(schedule)
    state = process.noise(CLEAN.expand(COUNT, -1, -1, -1), at(now), KEYS).state
    moved = process.renoise(state, at(now), at(later), KEYS)
    alpha, sigma = process.alpha(at(later, 1)).item(), process.sigma(at(later, 1)).item()
    for column, clean in enumerate((0.7, -0.3)):
        assert_normal(moved[:, 0, 0, column], alpha * clean, sigma)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_renoising_keeps_what_the_earlier_state_says_of_the_later(schedule):
    """The covariance of the states at now < later is alpha(later) / alpha(now) * sigma(now)^2, as in one Markov noising."""
    process = gaussian(schedule)
    state = process.noise(CLEAN.expand(COUNT, -1, -1, -1), at(0.3), KEYS).state
    moved = process.renoise(state, at(0.3), at(0.7), KEYS)
    now, later = at(0.3, 1), at(0.7, 1)
    expected = (process.alpha(later) / process.alpha(now) * process.sigma(now) ** 2).item()
    pair = torch.stack((state.flatten(), moved.flatten()))
    scale = (process.sigma(now) * process.sigma(later)).item()
    # Both columns have different means: remove them first.
    pair = pair - pair.view(2, COUNT, 2).mean(1, keepdim=True).expand(-1, COUNT, -1).reshape(2, -1)
    assert (pair[0] * pair[1]).mean().item() == pytest.approx(expected, abs=4 * 1.5 * scale / (2 * COUNT) ** 0.5)


# The flow's state at t = 1 holds nothing of the clean one: its epsilon is singular there, and says so.
@pytest.mark.parametrize(
    ("schedule", "target", "time"),
    [
        (schedule, target, time)
        for schedule in SCHEDULES
        for target in TARGETS
        for time in (1e-4, 0.3, 0.95, 1.0)
        if (schedule, target, time) != ("rectified_flow", "epsilon", 1.0)
    ],
)
def test_clean_and_noise_are_recovered_from_the_target(schedule, target, time):
    process = gaussian(schedule, target)
    clean, noise = CLEAN + rng.normal(KEYS[:50], "other", (1, 1, 2)), rng.normal(KEYS[:50], "noise", (1, 1, 2))
    times = at(time, 50)
    alpha, sigma = process.alpha(times)[:, None, None, None], process.sigma(times)[:, None, None, None]
    found = process.clean_and_noise(process.target(clean, noise, times), alpha * clean + sigma * noise, times)
    torch.testing.assert_close(found[0], clean, atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1], noise, atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_returns_the_target_that_belongs_to_its_own_state(schedule, target):
    process = gaussian(schedule, target)
    clean, times = CLEAN.expand(100, -1, -1, -1), torch.linspace(0.05, 0.95, 100)
    state, answer = process.noise(clean, times, KEYS[:100])
    torch.testing.assert_close(process.clean_and_noise(answer, state, times)[0], clean.contiguous(), atol=1e-5, rtol=0)
    assert process.losses(answer, process.noise(clean, times, KEYS[:100]), times).sums.abs().max() == 0


def test_flow_velocity_is_the_derivative_of_the_state_in_time():
    process = gaussian("rectified_flow", "velocity")
    clean = CLEAN.expand(10, -1, -1, -1)
    before, answer = process.noise(clean, at(0.4, 10), KEYS[:10])
    after = process.noise(clean, at(0.5, 10), KEYS[:10]).state
    torch.testing.assert_close((after - before) / 0.1, answer, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("earlier", [0.0, 0.35])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_with_the_slope_of_a_single_data_point_is_exact(schedule, target, earlier):
    process = gaussian(schedule, target)
    clean = CLEAN.expand(20, -1, -1, -1)
    state, answer = process.noise(clean, at(0.9, 20), KEYS[:20])
    moved = process.integrate(state, at(0.9, 20), at(earlier, 20), process.slope(answer, state, at(0.9, 20)))
    torch.testing.assert_close(moved, process.noise(clean, at(earlier, 20), KEYS[:20]).state, atol=2e-5, rtol=0)


def test_the_clock_tells_the_time_or_the_standard_deviation():
    times = torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(gaussian("vp").clock(times), times)
    assert torch.equal(gaussian("vp", clock="std").clock(times), gaussian("vp").sigma(times))


def test_the_prior_is_standard_normal_and_independent_of_the_training_noise():
    process = gaussian("vp")
    prior = process.prior(KEYS)[:, 0, 0, 0]
    assert_normal(prior, 0.0, 1.0)
    noise = process.noise(torch.zeros(COUNT, 1, 1, 2), at(1.0), KEYS).state[:, 0, 0, 0]
    assert abs(torch.corrcoef(torch.stack((prior, noise)))[0, 1]) < 4 / COUNT**0.5


def test_grid_losses_are_sums_of_squares_with_the_number_of_elements():
    process = gaussian("rectified_flow", "velocity")
    noised = process.noise(CLEAN.expand(4, -1, -1, -1), at(0.5, 4), KEYS[:4])
    sums, counts = process.losses(noised.target + 3, noised, at(0.5, 4))
    torch.testing.assert_close(sums, torch.full((4,), 18.0))
    assert counts.tolist() == [2.0] * 4


def test_a_process_on_the_wrong_kind_of_space_is_refused():
    modalities = model_of().modalities
    mixed = modalities["grid"].model_copy(update={"process": modalities["tokens"].process})
    with pytest.raises(TypeError, match="masked process does not run on a grid"):
        build_process("grid", mixed)
    assert list(build_processes(model_of())) == ["tokens", "grid"]


# -------------------------------------------------------------------------------------------------------------- masked


@pytest.mark.parametrize("time", [0.0, 1e-3, 0.1, 0.5, 0.97, 1.0])
def test_masked_fraction_equals_mask_rate_within_four_sigma_and_visible_tokens_are_carried_over(time):
    process = masked()
    clean = IDS
    state, target = process.noise(clean, at(time), KEYS)
    hidden = state == process.mask_id
    assert abs(hidden.double().mean() - time) <= 4 * (time * (1 - time) / hidden.numel()) ** 0.5 + 1e-12
    assert torch.equal(state[~hidden], clean[~hidden])
    assert torch.equal(target, clean)


def test_positions_of_a_sample_are_masked_independently():
    hidden = (masked().noise(torch.zeros(COUNT, 8, dtype=torch.int64), at(0.3), KEYS).state == 5).double()
    assert (torch.corrcoef(hidden.T) - torch.eye(8, dtype=torch.float64)).abs().max() < 4.5 / COUNT**0.5


@pytest.mark.parametrize(("now", "later"), [(0.0, 0.4), (0.2, 0.6), (0.5, 1.0), (0.3, 0.3), (1.0, 1.0)])
def test_renoised_tokens_are_masked_at_the_later_rate_and_none_is_unmasked(now, later):
    process = masked()
    clean = IDS
    state = process.noise(clean, at(now), KEYS).state
    moved = process.renoise(state, at(now), at(later), KEYS)
    hidden = moved == process.mask_id
    assert abs(hidden.double().mean() - later) <= 4 * (later * (1 - later) / hidden.numel()) ** 0.5 + 1e-12
    assert hidden[state == process.mask_id].all()
    assert torch.equal(moved[~hidden], clean[~hidden])


@pytest.mark.parametrize(("now", "then"), [(1.0, 0.7), (0.6, 0.5), (0.02, 0.0)])
def test_unmasking_reverses_masking_so_that_the_rate_falls_to_the_earlier_one(now, then):
    process = masked()
    state = process.noise(torch.zeros(COUNT, 8, dtype=torch.int64), at(now), KEYS).state
    left = (state == process.mask_id).double().mean() * (1 - process.unmasking_share(at(now), at(then))[0])
    assert abs(left - then) <= 4 * (now * (1 - now) / state.numel()) ** 0.5 + 1e-6


def iid_losses(process: Masked, times: torch.Tensor, clean: torch.Tensor, probabilities: torch.Tensor, *, exact: bool):
    """Losses of the exact predictor of independent tokens, which knows their frequencies."""
    noised = process.noise(clean, times, KEYS)
    prediction = told(process, noised, times, -probabilities.log()[clean])
    return process.losses(prediction, noised, times, exact=exact)


PROBABILITIES = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
ENTROPY = -(PROBABILITIES * PROBABILITIES.log()).sum().item()
IID = torch.searchsorted(PROBABILITIES.cumsum(0), rng.uniform(KEYS, "iid", (8,)).contiguous()).clamp_max(4)
TIMES = rng.uniform(KEYS, "test times")


def assert_mean(values: torch.Tensor, expected: float) -> None:
    assert abs(values.mean().item() - expected) < 4 * values.std().item() / len(values) ** 0.5


def test_exact_nelbo_of_a_known_categorical_equals_its_entropy():
    losses = iid_losses(masked(), TIMES, IID, PROBABILITIES, exact=True)
    assert_mean(losses.sums / losses.counts, ENTROPY)


@pytest.mark.parametrize("cap", [2.0, 20.0])
def test_capped_weight_lowers_the_nelbo_by_1_over_twice_the_cap(cap):
    """The integral of t * min(1 / t, c) over 0..1 is 1 - 1 / (2 c)."""
    losses = iid_losses(masked(weight_cap=cap), TIMES, IID, PROBABILITIES, exact=False)
    assert_mean(losses.sums / losses.counts, ENTROPY * (1 - 1 / (2 * cap)))


def test_exact_weight_is_1_over_t_whatever_the_cap():
    process = masked(weight_cap=2.0)
    times = torch.tensor([0.01, 0.25, 0.5, 1.0])
    torch.testing.assert_close(process.schedule.weight(times), torch.tensor([100.0, 4.0, 2.0, 1.0]))
    noised = process.noise(torch.zeros(4, 8, dtype=torch.int64), torch.ones(4), KEYS[:4])
    prediction = told(process, noised, times, torch.ones(4, 8))
    exact = process.losses(prediction, noised, times, exact=True)
    capped = process.losses(prediction, noised, times)
    torch.testing.assert_close(exact.sums, torch.tensor([800.0, 32.0, 16.0, 8.0]))
    torch.testing.assert_close(capped.sums, torch.tensor([16.0, 16.0, 16.0, 8.0]))


def test_only_masked_positions_are_scored_and_only_in_scored_samples():
    process = masked()
    noised = process.noise(IID[:50], torch.full((50,), 0.5), KEYS[:50])
    readout = process.readout(noised, torch.full((50,), 0.5), torch.arange(50) % 2 == 0)
    assert isinstance(readout, TokenLosses)
    assert torch.equal(readout.scored[::2], noised.state[::2] == process.mask_id)
    assert not readout.scored[1::2].any()
    assert readout.number == readout.scored.sum()


def test_plain_loss_is_the_mean_cross_entropy_over_every_position():
    process = masked(loss="plain", after_end_weight=0.0, end_id=1)
    noised = process.noise(IID[:50], TIMES[:50], KEYS[:50])
    readout = process.readout(noised, TIMES[:50], torch.ones(50, dtype=torch.bool))
    assert readout.scored.all()
    prediction = rng.uniform(KEYS[:50], "losses", (8,))
    losses = process.losses(told(process, noised, TIMES[:50], prediction), noised, TIMES[:50])
    torch.testing.assert_close(losses.sums, prediction.sum(1))
    assert (losses.counts == 8).all()


def test_positions_after_the_end_mark_count_with_their_own_weight_in_training_and_alike_in_evaluation():
    process = masked(end_id=4, after_end_weight=0.25, weight_cap=1.0)
    clean = torch.tensor([[0, 4, 1, 4, 1, 1, 1, 1], [0, 1, 2, 3, 0, 1, 2, 3]])
    assert after_end(clean, process.space).sum(1).tolist() == [6, 0]
    noised = process.noise(clean, torch.ones(2), KEYS[:2])
    ones = torch.ones(2)
    prediction = told(process, noised, ones, torch.ones(2, 8))
    training = process.losses(prediction, noised, ones)
    torch.testing.assert_close(training.sums, torch.tensor([2 + 6 * 0.25, 8.0]))
    torch.testing.assert_close(training.counts, torch.tensor([2 + 6 * 0.25, 8.0]))
    torch.testing.assert_close(process.counts(noised), training.counts)
    exact = process.losses(prediction, noised, ones, exact=True)
    torch.testing.assert_close(exact.sums, torch.tensor([8.0, 8.0]))
    torch.testing.assert_close(exact.counts, torch.tensor([8.0, 8.0]))


def test_a_condition_ends_at_its_end_mark_only_where_the_tokens_are_almost_clean():
    process = masked(length=4, end_id=1)
    ids = torch.tensor([[0, 1, 3, 3]]).repeat(4, 1)
    lengths = process.lengths(ids, torch.tensor([0.0, 1e-3, 2e-3, 1.0]))
    assert lengths is not None
    assert lengths.tolist() == [2, 2, 4, 4]
    assert process.visible(ids, torch.zeros(4)) is None


def test_in_pad_id_mode_every_visible_pad_is_hidden_at_any_time_and_a_masked_one_is_not():
    process = masked(length=4, pad_id=3, padding="pad_id")
    ids = torch.tensor([[0, 1, 3, process.mask_id]]).repeat(2, 1)
    visible = process.visible(ids, torch.tensor([0.0, 0.7]))
    assert visible is not None
    assert visible.tolist() == [[True, True, False, True]] * 2


def test_a_pad_is_hidden_in_the_first_place_too_as_in_the_papers_network():
    visible = masked(length=4, pad_id=3, padding="pad_id").visible(torch.tensor([[3, 0, 1, 3], [3, 3, 3, 3]]), torch.zeros(2))
    assert visible is not None
    assert visible.tolist() == [[False, True, True, False], [False] * 4]


def test_a_condition_has_at_least_one_position():
    lengths = masked(length=4, end_id=3).lengths(torch.full((2, 4), 3), torch.zeros(2))
    assert lengths is not None
    assert lengths.tolist() == [1, 1]


def test_without_an_end_mark_or_a_pad_nothing_is_ever_hidden():
    assert masked().visible(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2)) is None
    assert masked().lengths(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2)) is None
    assert masked(padding="pad_id").visible(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2)) is None
    assert not after_end(torch.zeros(2, 8, dtype=torch.int64), masked().space).any()


def test_the_prior_of_tokens_is_all_mask():
    assert (masked().prior(KEYS[:3]) == 5).all()
