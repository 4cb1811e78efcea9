"""Every solver and every order of unmasking, in every task, against the exact posterior of a finite data set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.errors import UserError
from megadiff.config.schema import Model, Sampling
from megadiff.diffusion.sampler import Conditions, Known, Sampler
from tests.diffusion.ideal import GRIDS, SHARES, TOKENS, IdealDenoiser, cells, draw_pairs
from tests.diffusion.small import model_of

pytestmark = pytest.mark.thorough

COUNT = 1500
KEYS = rng.sample_keys(1, torch.arange(COUNT))
POINTS = len(SHARES)
PAIRS = draw_pairs(COUNT, seed=3)
NOISE_FLOOR = 0.04
"""Total variation between the data set and COUNT draws of it: 0.5 * sum of sqrt(2 p (1 - p) / (pi COUNT)) is 0.019."""
SOLVERS = ("euler", "heun", "dpmpp_2m", "sde_euler", "sde_dpmpp_2m")
PROCESSES = [("vp", "epsilon"), ("cosine", "v"), ("rectified_flow", "velocity"), ("rectified_flow", "clean"), ("vp", "clean")]
UNBIASED: list[dict[str, Any]] = [
    {},
    {"order": "tau_leaping"},
    {"order": "first_hitting"},
    {"remask": "cap"},
    {"remask": "conf"},
    {"remask": "loop"},
]
BIASED: list[dict[str, Any]] = [{"order": order} for order in ("confidence", "entropy", "margin", "threshold")]


def run(model: Model, sampling: Sampling, generate: list[str], conditions: Conditions, start: Tensor | None = None) -> Any:
    """VP starts from its true marginal at t = 1, given draws of what is to be generated."""
    denoiser = IdealDenoiser(model)
    if start is not None and denoiser.grid.config.schedule == "vp" and "grid" in generate:
        noised = denoiser.grid.noise(start, torch.ones(COUNT), rng.fold(KEYS, "start")).state
        conditions = conditions._replace(initial={"grid": noised})
    return Sampler(model, sampling).sample(denoiser, KEYS, generate=generate, conditions=conditions)


def distance(made: dict[str, Tensor], expected: Tensor) -> tuple[float, float]:
    """(total variation from the expected shares, share of samples that are no data point)."""
    shares = torch.bincount(cells(made["grid"], made["tokens"]), minlength=POINTS + 1).double() / len(made["grid"])
    away = shares[POINTS].item()
    return 0.5 * ((shares[:POINTS] - expected).abs().sum().item() + away), away


def shares_where(fits: Tensor) -> Tensor:
    expected = torch.where(fits, SHARES, 0.0)
    return expected / expected.sum()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("schedule", "target"), PROCESSES)
def test_grids_given_tokens(schedule, target, solver):
    fits = (TOKENS[1] == TOKENS).all(1)
    expected = shares_where(fits)
    drawn = torch.searchsorted(expected.cumsum(0), rng.uniform(KEYS, "point", dtype=torch.float64).contiguous())
    given = {"tokens": TOKENS[1].expand(COUNT, -1).contiguous()}
    sampling = Sampling(steps=20, solver=solver)
    made = run(model_of(schedule, target), sampling, ["grid"], Conditions(given=given), GRIDS[drawn.clamp_max(POINTS - 1)])
    assert distance(made, expected)[0] < NOISE_FLOOR
    nearest = (made["grid"][:, None] - GRIDS[fits]).abs().flatten(2).amax(2).amin(1)
    assert nearest.quantile(0.99) < 0.01


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", ["vp", "cosine", "rectified_flow"])
def test_pairs_from_nothing_with_every_solver(schedule, solver):
    """A share O(1 / steps) mixes two data points: within a step the modalities move without looking at each other."""
    made = run(model_of(schedule, "v"), Sampling(steps=40, solver=solver), ["tokens", "grid"], Conditions(), PAIRS["grid"])
    assert distance(made, SHARES)[0] < NOISE_FLOOR + 0.02


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_a_shifted_flow_gives_the_data_back(shift):
    model = model_of()
    grid = model.modalities["grid"]
    shifted = grid.model_copy(update={"process": grid.process.model_copy(update={"shift": shift})})
    model = model.model_copy(update={"modalities": {**model.modalities, "grid": shifted}})
    assert distance(run(model, Sampling(steps=40), ["tokens", "grid"], Conditions()), SHARES)[0] < NOISE_FLOOR + 0.02


@pytest.mark.parametrize("grid", ["uniform", "square", "karras", "shifted"])
def test_every_grid_of_times_leads_to_the_data(grid):
    sampling = Sampling(steps=40, grid=grid, solver="dpmpp_2m")
    assert distance(run(model_of(), sampling, ["tokens", "grid"], Conditions()), SHARES)[0] < NOISE_FLOOR + 0.06


@pytest.mark.parametrize("options", UNBIASED, ids=str)
def test_tokens_given_a_grid_in_every_unbiased_order(options):
    fits = (GRIDS[0] == GRIDS).flatten(1).all(1)
    given = {"grid": GRIDS[0].expand(COUNT, -1, -1, -1).contiguous()}
    made = run(model_of(), Sampling(steps=40, **options), ["tokens"], Conditions(given=given))
    gap, away = distance(made, shares_where(fits))
    assert gap < NOISE_FLOOR + away
    assert away < 0.04
    if options == {"order": "first_hitting"}:
        assert away == 0  # one token at a time: exact


@pytest.mark.parametrize("options", UNBIASED, ids=str)
def test_pairs_from_nothing_in_every_unbiased_order(options):
    assert distance(run(model_of(), Sampling(steps=40, **options), ["tokens", "grid"], Conditions()), SHARES)[0] < 0.07


@pytest.mark.parametrize("options", BIASED, ids=str)
@pytest.mark.parametrize("generate", [["tokens"], ["tokens", "grid"]], ids=str)
def test_orders_by_sureness_change_frequencies_but_make_data_points_only(options, generate):
    given = {} if "grid" in generate else {"grid": GRIDS[0].expand(COUNT, -1, -1, -1).contiguous()}
    made = run(model_of(), Sampling(steps=40, **options), generate, Conditions(given=given))
    assert distance(made, SHARES)[1] < 0.005


@pytest.mark.parametrize("schedule", ["linear", "cosine", "geometric"])
@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_every_categorical_schedule(kind, schedule):
    model = model_of(kind=kind)
    tokens = model.modalities["tokens"]
    changed = tokens.model_copy(update={"process": tokens.process.model_copy(update={"schedule": schedule})})
    model = model.model_copy(update={"modalities": {**model.modalities, "tokens": changed}})
    given = {"grid": GRIDS[0].expand(COUNT, -1, -1, -1).contiguous()}
    expected = shares_where((GRIDS[0] == GRIDS).flatten(1).all(1))
    away = {
        steps: distance(run(model, Sampling(steps=steps), ["tokens"], Conditions(given=given)), expected) for steps in (10, 60)
    }
    assert away[60][0] < NOISE_FLOOR + away[60][1]
    assert away[60][1] < 0.05
    assert away[60][1] <= 0.5 * away[10][1] + 0.005


@pytest.mark.parametrize("order", ["ancestral", "tau_leaping"])
def test_pairs_from_nothing_with_the_uniform_process(order):
    model = model_of(kind="uniform")
    assert (
        distance(run(model, Sampling(steps=40, order=order), ["tokens", "grid"], Conditions()), SHARES)[0] < NOISE_FLOOR + 0.01
    )


@pytest.mark.parametrize("options", [*BIASED, {"order": "first_hitting"}, {"remask": "cap"}], ids=str)
def test_an_order_that_needs_masks_is_refused_for_the_uniform_process(options):
    with pytest.raises(UserError, match=r"tokens has no mask state, which .* needs; take ancestral or tau_leaping"):
        Sampler(model_of(kind="uniform"), Sampling(**options))


# ------------------------------------------------------------------------------------------------------------- in-painting


def known_tokens(position: int, token: int) -> dict[str, Known]:
    where = torch.zeros(COUNT, 3, dtype=torch.bool)
    where[:, position] = True
    return {"tokens": Known(torch.full((COUNT, 3), token), where)}


def known_grid(column: int, value: float) -> dict[str, Known]:
    where = torch.zeros(COUNT, 1, 1, 2, dtype=torch.bool)
    where[..., column] = True
    return {"grid": Known(torch.full((COUNT, 1, 1, 2), value), where)}


@pytest.mark.parametrize("options", UNBIASED[:5], ids=str)
def test_a_span_of_tokens_is_filled_in_exactly(options):
    made = run(model_of(), Sampling(steps=40, **options), ["tokens", "grid"], Conditions(known=known_tokens(0, 3)))
    assert (made["tokens"][:, 0] == 3).all()
    assert distance(made, shares_where(TOKENS[:, 0] == 3))[0] < NOISE_FLOOR + 0.02


def test_a_region_of_a_grid_is_filled_in_and_resampling_brings_it_closer():
    """Replacing the known part by its noised truth is an approximation; going back and forth (RePaint) mends most of it."""
    away = []
    for resample in (1, 8):
        conditions = Conditions(known=known_grid(0, -1.0))
        made = run(model_of(), Sampling(steps=20, resample=resample), ["grid"], conditions)
        assert (made["grid"][..., 0] == -1.0).all()
        away.append(((made["grid"] - GRIDS[0]).abs().flatten(1).amax(1) > 0.3).double().mean().item())
    assert away[1] < 0.65 * away[0] < 0.12


def test_a_region_and_a_span_are_filled_in_together():
    known = {**known_grid(0, -1.0), **known_tokens(1, 1)}
    made = run(model_of(), Sampling(steps=40, resample=4), ["tokens", "grid"], Conditions(known=known))
    fits = (GRIDS[:, 0, 0, 0] == -1.0) & (TOKENS[:, 1] == 1)
    assert distance(made, shares_where(fits))[0] < 0.09
    assert (made["tokens"][:, 1] == 1).all()
    assert (made["grid"][..., 0] == -1.0).all()


def test_whole_known_tokens_are_as_good_as_given_ones():
    known = {"tokens": Known(TOKENS[4].expand(COUNT, -1), torch.ones(COUNT, 3, dtype=torch.bool))}
    made = run(model_of(), Sampling(steps=20), ["tokens", "grid"], Conditions(known=known))
    assert distance(made, shares_where((TOKENS[4] == TOKENS).all(1)))[0] < 0.01


# -------------------------------------------------------------------------------------------- starts, and noisy conditions


def test_a_sample_noised_to_the_end_and_started_from_there_is_a_fresh_one():
    model = model_of()
    sampler = Sampler(model, Sampling(steps=30))
    start = {name: sampler.noised(name, PAIRS[name][:1].expand_as(PAIRS[name]), 1.0, KEYS) for name in ("tokens", "grid")}
    made = run(model, Sampling(steps=30), ["tokens", "grid"], Conditions(initial=start))
    assert distance(made, SHARES)[0] < NOISE_FLOOR + 0.03


def test_variations_stay_the_nearer_to_their_start_the_smaller_the_strength():
    model = model_of()
    sampler = Sampler(model, Sampling(steps=20))
    same = []
    for strength in (0.05, 0.4, 0.8):
        start = {name: sampler.noised(name, PAIRS[name], strength, KEYS) for name in ("tokens", "grid")}
        conditions = Conditions(initial=start, start_at=dict.fromkeys(start, strength))
        made = run(model, Sampling(steps=20), ["tokens", "grid"], conditions)
        found = cells(made["grid"], made["tokens"])
        # Draws of the data, noised and denoised again, are draws of the data.
        assert distance(made, SHARES)[0] < NOISE_FLOOR + 0.03
        same.append((found == PAIRS["index"]).double().mean().item())
    assert same[0] > 0.95
    assert same[0] > same[1] + 0.05 > same[2] + 0.1


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_at_time_0_is_already_there(solver):
    conditions = Conditions(initial={"grid": PAIRS["grid"]}, start_at={"grid": 0.0})
    made = run(model_of("vp", "epsilon"), Sampling(steps=3, solver=solver), ["grid"], conditions)
    assert torch.equal(made["grid"], PAIRS["grid"])


def test_heun_does_not_ask_a_clean_target_for_noise_that_is_too_small_to_tell():
    """On the karras grid the last steps but one end where sigma is 2e-3 and less."""
    model = model_of("rectified_flow", "clean")
    start = Sampler(model, Sampling()).noised("grid", PAIRS["grid"], 0.5, KEYS)
    conditions = Conditions(given={"tokens": PAIRS["tokens"]}, initial={"grid": start}, start_at={"grid": 0.5})
    made = [
        Sampler(model, Sampling(steps=7, grid="karras", solver=solver)).sample(
            IdealDenoiser(model), KEYS, generate=["grid"], conditions=conditions
        )["grid"]
        for solver in ("heun", "euler")
    ]
    nearest = [(state[:, None] - GRIDS).abs().flatten(2).amax(2).amin(1) for state in made]
    assert nearest[0].max() < 0.01
    assert nearest[1].max() < 1e-3


def test_a_condition_held_at_a_time_above_0_says_less():
    model = model_of()
    given = {"tokens": TOKENS[0].expand(COUNT, -1).contiguous()}
    held = []
    for time in (0.0, 0.5, 1.0):
        conditions = Conditions(given=given, held_at={"tokens": time})
        made = run(model, Sampling(steps=20), ["grid"], conditions)
        near = ((made["grid"] - GRIDS[0]).abs().flatten(1).amax(1) < 0.3).double().mean().item()
        held.append(near)
    assert held[0] > 0.99
    assert abs(held[2] - (SHARES[0] + SHARES[1])) < NOISE_FLOOR
    assert held[2] + 0.1 < held[1] < held[0] - 0.03


# ------------------------------------------------------------------------------------------------------- cost, determinism


class Counted:
    """How often the network is asked, and about how many rows of tokens."""

    def __init__(self, model: Model) -> None:
        self.ideal = IdealDenoiser(model)
        self.calls = 0
        self.rows: list[int] = []

    def __call__(self, noised: Any, readout: Any) -> Any:
        self.calls += 1
        if "tokens" in readout:
            self.rows.append(readout["tokens"].rows.shape[1])
        return self.ideal(noised, readout)


def test_first_hitting_costs_one_evaluation_a_token_whatever_the_steps():
    model = model_of()
    for steps in (1, 7, 500):
        denoiser = Counted(model)
        made = Sampler(model, Sampling(steps=steps, order="first_hitting")).sample(denoiser, KEYS[:50], generate=["tokens"])
        assert denoiser.calls == 3
        assert denoiser.rows == [50, 50, 50]
        assert (made["tokens"] < 5).all()


def test_a_threshold_ends_when_all_are_sure():
    model = model_of()
    denoiser, told = Counted(model), []
    given = {"grid": GRIDS[4].expand(50, -1, -1, -1)}
    Sampler(model, Sampling(steps=30, order="threshold")).sample(
        denoiser,
        KEYS[:50],
        generate=["tokens"],
        conditions=Conditions(given=given),
        progress=lambda done, total: told.append((done, total)),
    )
    assert denoiser.calls == 1  # this grid has one sentence: all tokens are sure at once
    assert told == [(30, 30)]


@pytest.mark.parametrize("order", ["confidence", "entropy", "margin"])
def test_an_order_by_sureness_unmasks_as_the_schedule_says(order):
    model = model_of(length=3)
    denoiser = Counted(model)
    Sampler(model, Sampling(steps=3, order=order)).sample(denoiser, KEYS[:20], generate=["tokens"])
    assert denoiser.rows == [60, 40, 20]


ALL: list[dict[str, Any]] = [{"solver": solver} for solver in SOLVERS] + UNBIASED + BIASED


@pytest.mark.parametrize("options", ALL, ids=str)
def test_a_sample_depends_on_its_key_alone(options):
    """Seeds are per sample: the same in any batch, at any place in it, and so on any process."""
    model = model_of("vp", "epsilon")
    sampler = Sampler(model, Sampling(steps=6, guidance=2.0, guidance_final_time=0.7, resample=2, **options))
    known = known_tokens(1, 1)["tokens"]

    def drawn(rows: Tensor) -> dict[str, Tensor]:
        part = Known(known.clean[rows], known.where[rows])
        return sampler.sample(
            IdealDenoiser(model), KEYS[rows], generate=["tokens", "grid"], conditions=Conditions(known={"tokens": part})
        )

    whole = drawn(torch.arange(40))
    for rows in (torch.tensor([7]), torch.tensor([31, 2, 9])):
        part = drawn(rows)
        assert torch.equal(part["tokens"], whole["tokens"][rows])
        torch.testing.assert_close(part["grid"], whole["grid"][rows], atol=1e-4, rtol=0)
