"""The sampling faults S1 to S12 of the paper's released code: each shown to be impossible here."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from megadiff import rng
from megadiff.cli import sample as cli_sample
from megadiff.config.schema import GaussianProcess, GridSpace, Model, PixelField, Sampling
from megadiff.data.encode import PixelCodec
from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.guidance import Guided
from megadiff.diffusion.process import build_processes
from megadiff.diffusion.sampler import Conditions, Sampler
from megadiff.diffusion.solvers import Step, TauLeaping, build_solver
from megadiff.kernels.sample_rows import draw_rows
from megadiff.types import Noised, Prediction, Readout
from tests.diffusion.ideal import TOKENS, IdealDenoiser, draw_pairs
from tests.diffusion.small import model_of

COUNT = 4000
KEYS = rng.sample_keys(2, torch.arange(COUNT))
PAIRS = draw_pairs(COUNT, seed=4)
MODEL = model_of()


class Watched:
    """The ideal denoiser, which keeps what it is asked."""

    def __init__(self, model: Model = MODEL) -> None:
        self.ideal = IdealDenoiser(model)
        self.seen: list[tuple[Noised, Mapping[str, Readout]]] = []

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        self.seen.append((noised, dict(readout)))
        return self.ideal(noised, readout)


def step_of(now: float, then: float, keys: torch.Tensor) -> Step:
    return Step(torch.full((len(keys),), now), torch.full((len(keys),), then), keys, then == 0)


@pytest.mark.parametrize("steps", [10, 25, 50])
def test_s1_tau_leaping_loses_no_jump(steps):
    """P(unmask) is 1 - e^-L, not L e^-L; what the last step finds masked is the product of e^-L, not 2.7 % at 50 steps."""
    solver = build_solver(build_processes(MODEL)["tokens"], Sampling(order="tau_leaping"), KEYS, torch.ones(COUNT))
    assert isinstance(solver, TauLeaping)
    grid = torch.linspace(1, 0, steps + 1)
    state = torch.full((COUNT, 3), 5)
    left = 1.0
    for index in range(steps - 1):
        now, then = grid[index].item(), grid[index + 1].item()
        request = solver.request(state, step_of(now, then, rng.fold(KEYS, index)))
        state = state.flatten().index_fill(0, request.rows[0], 0).view(COUNT, 3)
        left *= math.exp(-(now - then) / now)
    masked = (state == 5).double().mean().item()
    assert abs(masked - left) < 4 * (left * (1 - left) / state.numel()) ** 0.5
    rates = [((grid[index] - grid[index + 1]) / grid[index]).item() for index in range(steps - 1)]
    released = math.prod(1 - rate * math.exp(-rate) for rate in rates)
    assert masked < released
    last = solver.request(state, step_of(grid[-2].item(), 0.0, rng.fold(KEYS, steps)))
    assert last.rows.shape[1] == int((state == 5).sum())


@pytest.mark.parametrize("order", ["ancestral", "tau_leaping", "first_hitting", "confidence"])
def test_s2_guidance_of_tokens_does_not_change_how_fast_they_come(order):
    asked = []
    for guidance in (1.0, 1.5, 5.0):
        watched = Watched()
        sampler = Sampler(MODEL, Sampling(steps=8, guidance=guidance, order=order))
        given = Conditions(given={"grid": PAIRS["grid"][:200]})
        sampler.sample(watched, KEYS[:200], generate=["tokens"], conditions=given)
        asked.append([readout["tokens"].rows.shape[1] for _, readout in watched.seen])
    assert asked[0] == asked[1] == asked[2]


def test_s3_joint_generation_guides_both_modalities_with_conditions_noised_to_the_final_time():
    watched = Watched()
    Sampler(MODEL, Sampling(steps=4, guidance=3.0, guidance_final_time=0.8)).sample(
        watched, KEYS[:50], generate=["tokens", "grid"]
    )
    both = [n for n, r in watched.seen if set(r) == {"tokens", "grid"} and len(n.clocks["grid"]) == 150]
    assert both
    for seen in both:
        _, for_tokens, for_grid = (
            {name: clock.view(3, 50)[i, 0].item() for name, clock in seen.clocks.items()} for i in range(3)
        )
        assert for_tokens["grid"] == for_grid["tokens"] == pytest.approx(0.8)
        assert for_tokens["tokens"] == for_grid["grid"] < 0.8


def test_s4_the_noisy_condition_is_drawn_once_so_that_heun_keeps_its_order():
    watched = Watched()
    sampling = Sampling(steps=6, guidance=2.0, guidance_final_time=0.5)
    conditions = Conditions(given={"tokens": PAIRS["tokens"][:100]})
    Sampler(MODEL, sampling).sample(watched, KEYS[:100], generate=["grid"], conditions=conditions)
    noisy = [noised.states["tokens"][100:] for noised, _ in watched.seen]
    assert len(noisy) == 11
    assert all(torch.equal(states, noisy[0]) for states in noisy)
    assert 0.3 < (noisy[0] == 5).double().mean() < 0.7

    def drawn(steps: int) -> torch.Tensor:
        """The grids half way, where the data's few points do not yet hide errors."""
        kept: list[torch.Tensor] = []
        Sampler(MODEL, sampling.model_copy(update={"steps": steps})).sample(
            IdealDenoiser(MODEL),
            KEYS[:100],
            generate=["grid"],
            conditions=conditions,
            after_step=lambda _, clocks, states: kept.append(states["grid"]) or states,  # type: ignore[func-returns-value]
        )
        return kept[steps // 2 - 1]

    truth = drawn(512)
    errors = [(drawn(steps) - truth).abs().mean().item() for steps in (16, 64)]
    assert errors[0] / errors[1] > 10  # second order: 16; first: 4


def test_s5_a_limit_of_the_context_is_the_smaller_of_two_lengths():
    """Shown on real captions in tests/interfaces/test_generate.py (prompts are repeated and cut as asked)."""
    from megadiff.interfaces.conditions import Planner
    from megadiff.interfaces.request import GenerateRequest

    class Loaded:
        model = model_of(end_id=4, pad_id=4)

    state = torch.tensor([0, 1, 2])
    for limit, expected in ((None, [0, 1, 2]), (2, [0, 4, 4]), (3, [0, 1, 2]), (500, [0, 1, 2])):
        request = GenerateRequest(checkpoint="", task="", out="", limit_context_len=limit)
        assert Planner(request, Loaded(), {})._limited("tokens", state).tolist() == expected  # type: ignore[arg-type]


def test_s6_pictures_leave_as_8_bit_numbers_so_that_a_scorers_1_over_255_applies_once():
    codec = PixelCodec(PixelField(), GridSpace(channels=3, height=4, width=4))
    picture = codec.decode(torch.full((3, 4, 4), 0.5))
    assert isinstance(picture, Image.Image)
    assert np.asarray(picture).dtype == np.uint8
    assert np.asarray(picture).mean() == pytest.approx(0.75 * 255, abs=1)


def test_s7_no_argument_can_land_in_anothers_place():
    for function, positional in ((Sampler.sample, 3), (build_solver, 5), (Guided.__init__, 6)):
        kinds = [p.kind for p in inspect.signature(function).parameters.values()]
        assert sum(kind is not inspect.Parameter.KEYWORD_ONLY for kind in kinds) <= positional
    for wrong in ({"order": object()}, {"solver": "tokenizer"}, {"mode": "multimodal"}):
        with pytest.raises(ValidationError):
            Sampling(**wrong)  # type: ignore[arg-type]


def test_s8_the_correctors_evaluation_stands_at_the_steps_end():
    watched = Watched()
    Sampler(MODEL, Sampling(steps=4)).sample(watched, KEYS[:5], generate=["grid"])
    times = [noised.clocks["grid"][0].item() for noised, _ in watched.seen]
    assert times == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("time", [1e-5, 1e-4, 1e-3, 1e-2])
def test_s9_small_noise_has_all_its_digits_and_the_last_step_divides_by_nothing_small(time):
    process = Gaussian("grid", GaussianProcess(schedule="vp", target="epsilon"), GridSpace(channels=1, height=1, width=1))
    single, double = (process.sigma(torch.tensor([time], dtype=kind)).item() for kind in (torch.float32, torch.float64))
    assert single == pytest.approx(double, rel=1e-6)
    solver = build_solver(process, Sampling(), KEYS[:1], torch.ones(1))
    state, step = torch.ones(1, 1, 1, 1), step_of(time, 0.0, KEYS[:1])
    ends = [solver.move(state, step, None, torch.full((1, 1, 1, 1), guess)).state.item() for guess in (0.0, 0.1)]
    assert abs(ends[1] - ends[0]) < 0.11 * double / process.alpha(torch.tensor([time])).item()


def test_s10_draws_are_as_spread_as_their_distribution_and_no_mask_becomes_an_end_mark():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 2
    expected = logits.double().softmax(0)
    uniforms = rng.uniform(rng.sample_keys(7, torch.arange(200_000)), "draw", dtype=torch.float64)
    surprise = torch.cat([-expected.log()[draw_rows(logits.expand(len(u), -1), u).ids] for u in uniforms.split(20_000)])
    entropy = -(expected * expected.log()).sum()
    assert abs(surprise.mean() - entropy) < 4 * surprise.std() / len(surprise) ** 0.5
    watched = Watched(model_of(end_id=4))
    made = Sampler(model_of(end_id=4), Sampling(steps=1, order="tau_leaping")).sample(watched, KEYS, generate=["tokens"])
    assert (made["tokens"] < 5).all()
    share = (made["tokens"] == 4).double().mean().item()
    truth = (draw_pairs(100_000, seed=9)["tokens"] == 4).double().mean().item()
    assert abs(share - truth) < 0.02


@pytest.mark.parametrize("count", [1, 5, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_s11_every_sample_is_drawn_once_by_some_process(count, world):
    from megadiff.interfaces.conditions import _parts

    for batch in (1, 2, 3, 8):
        parts = _parts(count, batch)
        drawn = [n for rank in range(world) for part in parts[rank::world] for n in range(part.start, part.stop)]
        assert sorted(drawn) == list(range(count))


def test_s11_plain_weights_can_be_asked_for():
    from megadiff.cli.main import parse

    parsed = parse(["sample", "--checkpoint", "x", "--task", "joint", "--out", "y", "--weights", "raw"])
    assert parsed.weights == "raw"


def test_s12_what_the_released_code_lacks_is_there():
    """In-painting, variations, resampled seeds and the rest are shown by test_sampling_matrix and tests/interfaces."""
    flags = {f"--{flag[0].replace('_', '-')}" for flag in cli_sample.SAMPLING}
    assert {"--order", "--temperature", "--top-p", "--remask", "--resample"} <= flags
    hot, cold = (
        Sampler(MODEL, Sampling(steps=8, temperature=temperature)).sample(IdealDenoiser(MODEL), KEYS, generate=["tokens"])[
            "tokens"
        ]
        for temperature in (1.0, 0.3)
    )
    likeliest = (TOKENS[:, 1] == 1).double()  # token 1 in the middle has the largest share
    assert likeliest.sum() > 1
    assert (cold[:, 1] == 1).double().mean() > (hot[:, 1] == 1).double().mean() + 0.1
