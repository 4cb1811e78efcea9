"""The sampler with an ideal denoiser gives the data set back; and its bookkeeping."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.errors import UserError
from megadiff.config.schema import GaussianProcess, GridSpace, Model, Sampling
from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.sampler import Conditions, Sampler
from megadiff.types import Dense, Noised, Prediction, Readout, SampledRows
from tests.diffusion.ideal import GRIDS, SHARES, TOKENS, IdealDenoiser, cells, draw_pairs
from tests.diffusion.small import model_of

pytestmark = pytest.mark.thorough

COUNT = 3000
KINDS = [("rectified_flow", "velocity"), ("vp", "epsilon"), ("vp", "velocity")]
POINTS = len(SHARES)


def keys_of(count: int, seed: int = 1) -> Tensor:
    return rng.sample_keys(seed, torch.arange(count))


def start_of(denoiser: IdealDenoiser, keys: Tensor, grids: Tensor) -> dict[str, Tensor]:
    """The flow starts from its prior. VP still holds 0.0688 of the clean state at t = 1: it starts from its true marginal, or
    its samples would be biased towards the data set's mean. `grids` are draws of what is to be generated.
    """
    if denoiser.grid.config.schedule != "vp":
        return {}
    return {"grid": denoiser.grid.noise(grids, torch.ones(len(keys)), rng.fold(keys, "start")).state}


def run(
    model: Model, keys: Tensor, generate: list[str], given: dict[str, Tensor], steps: int, grids: Tensor
) -> dict[str, Tensor]:
    denoiser = IdealDenoiser(model)
    sampler = Sampler(model, Sampling(steps=steps))
    initial = start_of(denoiser, keys, grids) if "grid" in generate else {}
    return sampler.sample(denoiser, keys, generate=generate, conditions=Conditions(given=given, initial=initial))


def assert_frequencies(labels: Tensor, expected: Tensor, bias: float) -> None:
    """Every frequency within four standard errors and a bias, and no sample outside the expected support but for the bias.

    Tokens unmasked in the same step are drawn independently given the state before it, and grids move along with the tokens of
    the step's beginning. So a share O(1 / steps) of the samples mixes two data points; it is what `bias` allows.
    """
    count = len(labels)
    shares = torch.bincount(labels, minlength=POINTS + 1).double() / count
    assert shares[POINTS:].sum() <= bias, shares
    tolerance = 4 * (expected * (1 - expected) / count).sqrt() + bias * (expected > 0)
    assert ((shares[:POINTS] - expected).abs() <= tolerance).all(), (shares, expected)
    likely = expected > 0
    chi_square = (count * (shares[:POINTS] - expected).square()[likely] / expected[likely]).sum()
    assert chi_square < 30, (shares, expected)  # four degrees of freedom at most: four sigma is 24.5, the rest is the bias


@pytest.mark.parametrize(("schedule", "target"), KINDS)
def test_joint_samples_of_the_ideal_denoiser_have_the_frequencies_of_the_data_set(schedule, target):
    pairs = draw_pairs(COUNT, seed=3)
    made = run(model_of(schedule, target), keys_of(COUNT), ["tokens", "grid"], {}, 100, pairs["grid"])
    assert_frequencies(cells(made["grid"], made["tokens"]), SHARES, bias=0.01)


def test_joint_samples_that_mix_two_data_points_vanish_as_1_over_steps():
    shares = []
    for steps in (10, 40):
        made = run(model_of(), keys_of(8000), ["tokens", "grid"], {}, steps, GRIDS)
        shares.append((cells(made["grid"], made["tokens"]) == POINTS).double().mean().item())
    assert shares[0] > 0.02
    assert 0.15 < shares[1] / shares[0] < 0.4


@pytest.mark.parametrize(("schedule", "target"), KINDS)
@pytest.mark.parametrize("point", [0, 3])
def test_tokens_given_a_grid_have_the_conditional_frequencies(schedule, target, point):
    given = {"grid": GRIDS[point].expand(COUNT, -1, -1, -1).contiguous()}
    made = run(model_of(schedule, target), keys_of(COUNT), ["tokens"], given, 60, GRIDS)
    fits = (GRIDS[point] == GRIDS).flatten(1).all(1)
    expected = torch.where(fits, SHARES, 0.0)
    assert_frequencies(cells(made["grid"], made["tokens"]), expected / expected.sum(), bias=0.012)
    assert torch.equal(made["grid"], given["grid"])


@pytest.mark.parametrize(("schedule", "target"), KINDS)
@pytest.mark.parametrize("point", [1, 4])
def test_grids_given_tokens_have_the_conditional_frequencies(schedule, target, point):
    given = {"tokens": TOKENS[point].expand(COUNT, -1).contiguous()}
    fits = (TOKENS[point] == TOKENS).all(1)
    expected = torch.where(fits, SHARES, 0.0)
    expected /= expected.sum()
    index = torch.searchsorted(expected.cumsum(0), rng.uniform(keys_of(COUNT, 8), "point", dtype=torch.float64).contiguous())
    made = run(model_of(schedule, target), keys_of(COUNT), ["grid"], given, 40, GRIDS[index.clamp_max(POINTS - 1)])
    labels = cells(made["grid"], made["tokens"])
    assert_frequencies(labels, expected, bias=0.0)
    assert torch.equal(made["tokens"], given["tokens"])
    nearest = (made["grid"] - GRIDS[labels]).abs().flatten(1).amax(1)
    assert nearest.quantile(0.99) < 1e-3


def test_tokens_alone_have_their_marginal_frequencies_while_the_grid_is_absent():
    made = run(model_of(), keys_of(COUNT), ["tokens"], {}, 60, GRIDS)
    sentences, of_point = TOKENS.unique(dim=0, return_inverse=True)
    expected = torch.zeros(len(sentences), dtype=torch.float64).index_add_(0, of_point, SHARES)
    fits = (made["tokens"][:, None] == sentences).all(2)
    assert (~fits.any(1)).double().mean() <= 0.03
    shares = fits.double().mean(0)
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / COUNT).sqrt() + 0.03).all(), (shares, expected)


def test_vp_from_the_prior_instead_of_its_marginal_differs_but_stays_in_the_data_set():
    """The bias of starting VP at pure noise (what the paper does) is small and only in the frequencies."""
    model = model_of("vp", "epsilon")
    given = {"tokens": TOKENS[1].expand(500, -1).contiguous()}
    made = Sampler(model, Sampling(steps=40)).sample(
        IdealDenoiser(model), keys_of(500), generate=["grid"], conditions=Conditions(given=given)
    )
    labels = cells(made["grid"], made["tokens"])
    assert set(labels.tolist()) == {1, 2}


# ------------------------------------------------------------------------------------------------------ order of solvers

MEAN, DEVIATION = 0.4, 0.5


class GaussianData:
    """The exact denoiser of one number that is normal with MEAN and DEVIATION."""

    def __init__(self, process: Gaussian) -> None:
        self.process = process

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        state, times = noised.states["number"].double(), noised.clocks["number"].double()
        alpha, sigma = (share(times)[:, None, None, None] for share in (self.process.alpha, self.process.sigma))
        clean = MEAN + alpha * DEVIATION**2 / ((alpha * DEVIATION) ** 2 + sigma**2) * (state - alpha * MEAN)
        return {"number": self.process.target(clean, (state - alpha * clean) / sigma, times).float()}


def number_model(schedule: str, target: str) -> Model:
    space = {"kind": "grid", "channels": 1, "height": 1, "width": 1}
    modality = {"space": space, "process": {"kind": "gaussian", "schedule": schedule, "target": target}}
    return Model.model_validate({"width": 8, "heads": 1, "head_dim": 8, "joint_depth": 1, "modalities": {"number": modality}})


def start_and_end(process: Gaussian) -> tuple[Tensor, Tensor]:
    """The probability-flow ODE moves a state along its quantile: x(t) = alpha m + sqrt(alpha^2 s^2 + sigma^2) z."""
    quantiles = torch.linspace(-2, 2, 21, dtype=torch.float64).view(-1, 1, 1, 1)
    one = torch.ones(1, dtype=torch.float64)
    alpha, sigma = process.alpha(one), process.sigma(one)
    start = alpha * MEAN + ((alpha * DEVIATION) ** 2 + sigma**2).sqrt() * quantiles
    return start.float(), MEAN + DEVIATION * quantiles


@pytest.mark.parametrize(("schedule", "target"), KINDS)
def test_the_error_of_heun_falls_with_the_square_of_the_steps_and_that_of_euler_with_the_steps(schedule, target):
    model = number_model(schedule, target)
    process = Gaussian("number", GaussianProcess(schedule=schedule, target=target), GridSpace(channels=1, height=1, width=1))
    denoiser = GaussianData(process)
    start, end = start_and_end(process)
    heun, euler = [], []
    for steps in (32, 64, 128):
        sampler = Sampler(model, Sampling(steps=steps))
        made = sampler.sample(
            denoiser, keys_of(len(start)), generate=["number"], conditions=Conditions(given={}, initial={"number": start})
        )
        heun.append((made["number"] - end).square().mean().sqrt().item())
        state = start
        for now, then in pairwise(sampler.grid(["number"])):
            at, earlier = torch.full((len(state),), now), torch.full((len(state),), then)
            noised = Noised({"number": state}, {"number": at}, {"number": None})
            slope = process.slope(denoiser(noised, {"number": Dense()})["number"], state, at)
            state = process.integrate(state, at, earlier, slope)
        euler.append((state - end).square().mean().sqrt().item())
    for coarse, fine in pairwise(heun):
        assert 3.2 < coarse / fine < 5.5, heun
    for coarse, fine in pairwise(euler):
        assert 1.7 < coarse / fine < 2.4, euler
    assert heun[-1] < 0.05 * euler[-1]


# -------------------------------------------------------------------------------------------------------- bookkeeping


class Watched:
    """The ideal denoiser, which notes and checks what it is asked."""

    def __init__(self, model: Model) -> None:
        self.ideal = IdealDenoiser(model)
        self.calls: list[tuple[Noised, dict[str, Readout]]] = []

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        self.calls.append((noised, dict(readout)))
        return self.ideal(noised, readout)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(("generate", "given"), [(["tokens", "grid"], []), (["grid"], ["tokens"]), (["tokens"], ["grid"])])
def test_no_mask_is_left_given_states_stay_and_only_masked_rows_are_asked_for(steps, generate, given):
    model, count = model_of(), 50
    denoiser = Watched(model)
    pairs = draw_pairs(count)
    states = {name: pairs[name].clone() for name in given}
    done = []
    made = Sampler(model, Sampling(steps=steps)).sample(
        denoiser,
        keys_of(count),
        generate=generate,
        conditions=Conditions(given=states),
        progress=lambda at, of: done.append((at, of)),
    )
    assert done == [(step + 1, steps) for step in range(steps)]
    assert list(made) == ["tokens", "grid"]
    assert (made["tokens"] < 5).all()
    for name in given:
        assert torch.equal(made[name], pairs[name])
    asked = []
    for noised, readout in denoiser.calls:
        assert set(readout) <= set(generate)
        if "tokens" in readout:
            assert isinstance(readout["tokens"], SampledRows)
            rows = readout["tokens"].rows[0]
            assert (noised.states["tokens"].flatten()[rows] == 5).all()
            asked.append(rows)
    if "tokens" in generate:
        assert torch.cat(asked).sort().values.tolist() == list(range(count * 3))  # every position exactly once
    evaluations = 2 * steps - 1 if "grid" in generate else steps
    assert len(denoiser.calls) == evaluations


def test_every_evaluation_sees_generated_clocks_together_given_ones_at_0_and_absent_ones_at_1():
    model = model_of()
    for generate, given in ((["tokens", "grid"], {}), (["grid"], {"tokens": TOKENS}), (["tokens"], {})):
        denoiser = Watched(model)
        Sampler(model, Sampling(steps=4)).sample(denoiser, keys_of(5), generate=generate, conditions=Conditions(given=given))
        heun = "grid" in generate
        expected = [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25] if heun else [1.0, 0.75, 0.5, 0.25]
        for (noised, _), time in zip(denoiser.calls, expected, strict=True):
            for name in ("tokens", "grid"):
                held = 0.0 if name in given else 1.0
                assert noised.clocks[name].tolist() == [time if name in generate else held] * 5


def test_a_vp_grid_takes_smaller_steps_near_0_where_its_sigma_is_steep():
    denoiser = Watched(model_of("vp", "epsilon"))
    Sampler(model_of("vp", "epsilon"), Sampling(steps=4)).sample(
        denoiser, keys_of(5), generate=["tokens", "grid"], conditions=Conditions(given={})
    )
    times = [noised.clocks["grid"][0].item() for noised, _ in denoiser.calls]
    assert times == [1.0, 0.5625, 0.5625, 0.25, 0.25, 0.0625, 0.0625]
    assert all(torch.equal(noised.clocks["grid"], noised.clocks["tokens"]) for noised, _ in denoiser.calls)


def test_the_number_of_masks_falls_with_the_clock():
    model, count = model_of(), 2000
    denoiser = Watched(model)
    Sampler(model, Sampling(steps=5)).sample(denoiser, keys_of(count), generate=["tokens"], conditions=Conditions(given={}))
    for noised, _ in denoiser.calls:
        rate = noised.clocks["tokens"][0].item()
        share = (noised.states["tokens"] == 5).double().mean().item()
        assert abs(share - rate) <= 4 * (rate * (1 - rate) / (3 * count)) ** 0.5 + 1e-12


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("generate", [["tokens", "grid"], ["tokens"], ["grid"]])
def test_the_same_keys_give_the_same_samples_in_any_batch(generate, guidance):
    model, keys, pairs = model_of(), keys_of(40), draw_pairs(40)
    sampler = Sampler(model, Sampling(steps=6, guidance=guidance, guidance_final_time=0.6))
    given = {name: pairs[name] for name in ("tokens", "grid") if name not in generate}
    whole = sampler.sample(IdealDenoiser(model), keys, generate=generate, conditions=Conditions(given=given))
    for rows in (torch.tensor([7]), torch.tensor([31, 2, 9, 10]), torch.arange(40).flip(0)):
        part = sampler.sample(
            IdealDenoiser(model),
            keys[rows],
            generate=generate,
            conditions=Conditions(given={name: state[rows] for name, state in given.items()}),
        )
        assert torch.equal(part["tokens"], whole["tokens"][rows])
        torch.testing.assert_close(part["grid"], whole["grid"][rows], atol=1e-4, rtol=0)


def test_other_keys_give_other_samples():
    model = model_of()
    sampler = Sampler(model, Sampling(steps=6))
    first, second = (
        sampler.sample(IdealDenoiser(model), keys_of(50, s), generate=["tokens"], conditions=Conditions(given={}))
        for s in (1, 2)
    )
    assert not torch.equal(first["tokens"], second["tokens"])


@pytest.mark.parametrize(
    ("generate", "given", "named"),
    [
        (["sound"], [], "sound"),
        (["tokens"], ["sound"], "sound"),
        (["tokens"], ["tokens"], "tokens"),
        ([], ["tokens"], "nothing"),
    ],
)
def test_an_impossible_task_is_a_user_error_that_names_the_modality(generate, given, named):
    model = model_of()
    with pytest.raises(UserError, match=named):
        Sampler(model, Sampling(steps=2)).sample(
            IdealDenoiser(model), keys_of(5), generate=generate, conditions=Conditions(given=dict.fromkeys(given, TOKENS))
        )


def test_a_grid_is_drawn_at_every_pixel_of_a_larger_space():
    """Shapes and broadcasting: channels, height and width all differ."""
    model = model_of(grid={"channels": 2, "height": 3, "width": 4})

    def zero(noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        return {"grid": torch.zeros_like(noised.states["grid"])}

    made = Sampler(model, Sampling(steps=2)).sample(
        zero, keys_of(6), generate=["grid"], conditions=Conditions(given={"tokens": TOKENS[[0] * 6]})
    )
    assert made["grid"].shape == (6, 2, 3, 4)
    assert len(made["grid"].unique()) == 6 * 24
