"""The sampling faults S1 to S12 of the paper's released code: each shown to be impossible here.

Each test fails where its fault is put in.
"""

from __future__ import annotations

import inspect
import io
import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from megadiff import rng
from megadiff.cli.main import main
from megadiff.config.load import load_run
from megadiff.config.schema import GaussianProcess, GridSpace, Model, PixelField, Sampling
from megadiff.data.codecs.pictures import PixelCodec
from megadiff.diffusion.build import build_processes, build_solver
from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.gaussian_solvers import GAUSSIAN_SOLVERS
from megadiff.diffusion.guidance import Guided
from megadiff.diffusion.sampler import Conditions, Known, Sampler
from megadiff.diffusion.solvers import SolverStep
from megadiff.generation import generate as generating
from megadiff.generation.loading import codecs_of
from megadiff.generation.planner import Planner
from megadiff.generation.request import GenerateRequest
from megadiff.kernels.head_draw import draw_rows
from megadiff.types import DrawRule, Noised, Prediction, Readout, RowKeys, RowLogits, SampledRows
from megadiff.weights.loading import Loaded
from tests.diffusion.ideal import SHARES, IdealDenoiser, cells, draw_pairs, drawn_from
from tests.diffusion.small import model_of

ROOT = Path(__file__).parents[2]
COUNT = 1200
KEYS = rng.sample_keys(2, torch.arange(COUNT))
PAIRS = draw_pairs(COUNT, seed=4)
MODEL = model_of()
MASK = 5
ORDERS: list[dict[str, Any]] = [
    *({"order": order} for order in ("ancestral", "tau_leaping", "first_hitting", "confidence", "entropy")),
    *({"remask": remask, "remask_strength": 0.2} for remask in ("cap", "conf", "loop")),
]
SPREAD = torch.tensor([0.46, 0.3, 0.15, 0.07, 0.02], dtype=torch.float64)
KINDS = [("vp", "epsilon"), ("vp", "v"), ("cosine", "v"), ("cosine", "clean"), ("rectified_flow", "velocity")]


class Watched:
    """The ideal denoiser, which keeps what it is asked and what it answers."""

    def __init__(self, model: Model = MODEL) -> None:
        self.ideal = IdealDenoiser(model)
        self.seen: list[tuple[Noised, dict[str, Readout]]] = []
        self.said: list[Prediction] = []

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        self.seen.append((noised, dict(readout)))
        self.said.append(self.ideal(noised, readout))
        return self.said[-1]


class Constant:
    """A network to which every position's token has the same distribution whatever it sees, [V] or [S, V]."""

    def __init__(self, shares: Tensor) -> None:
        self.logs = shares.log()
        self.states: list[Tensor] = []
        self.rows: list[int] = []

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        request = readout["tokens"]
        assert isinstance(request, SampledRows)
        self.states.append(noised.states["tokens"])
        self.rows.append(request.rows.shape[1])
        return {"tokens": drawn_from(self.logs.expand(*noised.states["tokens"].shape, -1), request)}


def at(time: float, count: int) -> Tensor:
    return torch.full((count,), time)


def step_of(now: float, then: float, keys: Tensor) -> SolverStep:
    return SolverStep(at(now, len(keys)), at(then, len(keys)), keys, then == 0)


def tokens_of(sampling: Sampling, shares: Tensor = SPREAD, count: int = COUNT) -> Tensor:
    return Sampler(MODEL, sampling).sample(Constant(shares), KEYS[:count], generate=["tokens"])["tokens"]


# ---------------------------------------------------------------------------------------------------------------- S1 to S4


@pytest.mark.parametrize("steps", [10, 25, 50])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_s1_tau_leaping_loses_no_jump(schedule, steps):
    """S1: a step unmasks 1 - e^-L of what is masked; L e^-L, which drops positions that jump twice, leaves far more."""
    length = 20
    model, network = model_of(length=length), Constant(SPREAD)
    tokens = model.modalities["tokens"]
    tokens = tokens.model_copy(update={"process": tokens.process.model_copy(update={"schedule": schedule})})
    model = model.model_copy(update={"modalities": {**model.modalities, "tokens": tokens}})
    made = Sampler(model, Sampling(steps=steps, order="tau_leaping")).sample(network, KEYS[:500], generate=["tokens"])["tokens"]
    exact, released = 1.0, 1.0
    for index, state in enumerate(network.states):
        now, then = 1 - index / steps, 1 - (index + 1) / steps
        masked = (state == MASK).double().mean().item()
        assert abs(masked - exact) <= 4 * (exact * (1 - exact) / state.numel()) ** 0.5 + 1e-12
        # -alpha' / (1 - alpha) for 1 - alpha = t and sin(pi t / 2); the cosine's first rate is 0.
        rate = 1 / now if schedule == "linear" else 0.5 * math.pi / math.tan(0.5 * math.pi * now)
        jumps = rate * (now - then)
        if index < steps - 1:
            exact, released = exact * math.exp(-jumps), released * (1 - jumps * math.exp(-jumps))
    assert network.rows[-1] == int((network.states[-1] == MASK).sum())
    assert (made != MASK).all()
    # What is left to the last step: far enough from the released share for the test above to tell them apart.
    assert released > exact + 4 * (exact / (500 * length)) ** 0.5


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_s2_the_guidance_scale_does_not_change_how_fast_tokens_come(options):
    """S2: positions are chosen before the head is asked, so that w scales no rate."""
    asked = []
    for guidance in (1.0, 1.5, 3.0, 5.0):
        watched = Watched()
        sampler = Sampler(MODEL, Sampling(steps=8, guidance=guidance, **options))
        sampler.sample(watched, KEYS[:200], generate=["tokens"], conditions=Conditions(given={"grid": PAIRS["grid"][:200]}))
        assert [len(noised.states["tokens"]) for noised, _ in watched.seen] == [200 * (1 + (guidance > 1))] * len(watched.seen)
        asked.append([readout["tokens"].rows.shape[1] for _, readout in watched.seen])
    # Which visible token is the least sure depends on what was drawn; of the other orders not one row may differ.
    allowed = 15 if options.get("remask") == "conf" else 0
    for rows in asked[1:]:
        assert max(abs(one - other) for one, other in zip(rows, asked[0], strict=True)) <= allowed


@pytest.mark.parametrize("guidance", [1.5, 3.0, 5.0])
@pytest.mark.parametrize("weaker", [None, IdealDenoiser(MODEL)], ids=["one network", "autoguided"])
def test_s2_guided_tokens_are_drawn_from_a_normalised_distribution(guidance, weaker):
    """S2: p_c^w p_u^(1 - w) is divided by its sum, in the draws and in what is told of them."""
    processes, count = build_processes(MODEL), 100
    times = {"tokens": at(0.7, count), "grid": at(0.0, count)}
    states = {
        "tokens": processes["tokens"].noise(PAIRS["tokens"][:count], times["tokens"], KEYS[:count]).state,
        "grid": PAIRS["grid"][:count],
    }
    rows = (states["tokens"] == MASK).flatten().nonzero()[:, 0]
    keys = RowKeys(rng.sample_keys(1, rows), "u", torch.zeros_like(rows))
    readout = {"tokens": SampledRows(rows[None], torch.ones(1, len(rows)), keys, DrawRule())}
    sampling = Sampling(guidance=guidance, autoguidance=2.0)  # a network is not weaker than itself: no effect
    found = Guided(IdealDenoiser(MODEL), processes, sampling, KEYS[:count], weaker)(states, times, readout)["tokens"]

    def logits(grid: Tensor, time: float) -> Tensor:
        noised = Noised({**states, "grid": grid}, {"tokens": times["tokens"], "grid": at(time, count)}, dict.fromkeys(states))
        return IdealDenoiser(MODEL)(noised, {"tokens": RowLogits(rows)})["tokens"].double()

    unconditional = logits(processes["grid"].prior(KEYS[:count]), 1.0)
    expected = (guidance * logits(states["grid"], 0.0) + (1 - guidance) * unconditional).softmax(-1)
    assert torch.allclose(found.log_probability.double().exp(), expected.gather(1, found.ids[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(found.entropy.double(), torch.special.entr(expected).sum(-1), atol=1e-4)


def test_s3_joint_generation_guides_both_modalities_with_conditions_noised_to_the_final_time():
    """S3: the text is guided as the picture is, and a final time below 1 holds here as well."""
    count, final = 400, 0.8
    watched = Watched()
    guided = Sampling(steps=5, guidance=3.0, guidance_final_time=final)
    made = Sampler(MODEL, guided).sample(watched, KEYS[:count], generate=["tokens", "grid"])
    firsts = [noised for noised, readout in watched.seen if set(readout) == {"tokens", "grid"}]
    assert len(firsts) == 5
    for noised, time in zip(firsts, (1.0, 0.8, 0.6, 0.4, 0.2), strict=True):
        clocks = {name: clock.view(-1, count)[:, 0].tolist() for name, clock in noised.clocks.items()}
        if time >= final:
            assert len(clocks["grid"]) == 1  # nothing is to be noised further
            continue
        assert clocks["tokens"] == pytest.approx([time, time, final])
        assert clocks["grid"] == pytest.approx([time, final, time])
        tokens, grid = (noised.states[name].view(3, count, -1) for name in ("tokens", "grid"))
        assert abs((tokens[2] == MASK).double().mean() - final) < 4 * (final * (1 - final) / tokens[2].numel()) ** 0.5
        now, later = 1 - time, 1 - final  # the flow's alpha
        added = (final**2 - (later / now * time) ** 2) ** 0.5
        noise = (grid[1] - later / now * grid[0]) / added
        assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
        assert abs(noise.square().mean() - 1) < 4 * (2 / noise.numel()) ** 0.5
    plain = Sampler(MODEL, Sampling(steps=5)).sample(IdealDenoiser(MODEL), KEYS[:count], generate=["tokens", "grid"])
    assert ((made["tokens"] != plain["tokens"]).any(1)).double().mean() > 0.05
    assert ((made["grid"] - plain["grid"]).abs().amax((1, 2, 3)) > 0.05).double().mean() > 0.05


@pytest.mark.parametrize("generate", ["grid", "tokens"])
def test_s4_the_noisy_condition_is_drawn_once(generate):
    """S4: it is the same at every call, in Heun's second evaluation and in a second run, but not in another sample."""
    given, count = ("tokens" if generate == "grid" else "grid"), 300
    noisy = []
    for _ in range(2):
        watched = Watched()
        conditions = Conditions(given={given: PAIRS[given][:1].repeat_interleave(count, 0)})
        sampling = Sampling(steps=6, guidance=2.0, guidance_final_time=0.5)
        Sampler(MODEL, sampling).sample(watched, KEYS[:count], generate=[generate], conditions=conditions)
        assert len(watched.seen) == (11 if generate == "grid" else 6)
        noisy += [noised.states[given][count:] for noised, _ in watched.seen]
    assert all(torch.equal(states, noisy[0]) for states in noisy)
    assert len(noisy[0].unique(dim=0)) == (8 if given == "tokens" else count)


def test_s4_heun_keeps_its_second_order_with_noisy_guidance():
    """S4: with a condition drawn anew at every call the error falls with the root of the steps at best."""
    sampling, count = Sampling(guidance=2.0, guidance_final_time=0.5), 100
    conditions = Conditions(given={"tokens": PAIRS["tokens"][:count]})

    def half_way(steps: int) -> Tensor:
        """There the data's few points do not yet hide errors."""
        kept: list[Tensor] = []

        def keep(_: int, clocks: Mapping[str, Tensor], states: dict[str, Tensor]) -> dict[str, Tensor]:
            kept.append(states["grid"].double())
            return states

        sampler = Sampler(MODEL, sampling.model_copy(update={"steps": steps}))
        sampler.sample(IdealDenoiser(MODEL), KEYS[:count], generate=["grid"], conditions=conditions, after_step=keep)
        return kept[steps // 2 - 1]

    truth = half_way(512)
    errors = [(half_way(steps) - truth).square().mean().sqrt().item() for steps in (32, 64, 128)]
    for coarse, fine in pairwise(errors):
        assert 3.2 < coarse / fine < 5.5, errors


# ---------------------------------------------------------------------------------------------------------------- S5 to S8


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """What planning and storing need of a model, without a network."""
    monkeypatch.chdir(ROOT)  # tokenizers are named relative to it
    run = load_run(ROOT / "tests/tiny.yaml")
    return Loaded(run.model, run.data, tuple(run.model.modalities), None, "test", "hash", "card")


@pytest.mark.parametrize("prompt", ["a", "cat", "a red heart on a green apple"])
def test_a_repeated_prompt_stands_there_ten_times_and_no_more(untrained, prompt):
    request = GenerateRequest(checkpoint="", task="text-to-image", out="", prompt=(prompt,), repeat_prompt=True)
    codec = codecs_of(untrained)["text"]
    (chunk,) = Planner(request, untrained, codecs_of(untrained)).chunks()
    ids = codec.ids(" ".join([prompt] * 10))
    assert len(ids) == 10 or prompt != "a"
    assert chunk.load()[1].given["text"][0].tolist() == [*ids[:15], 1, *[0] * (15 - len(ids))]


@pytest.mark.parametrize("repeat", [False, True])
def test_s5_a_limit_of_the_context_is_the_smaller_of_two_lengths(untrained, repeat):
    """S5: max in place of min makes every limit below the context's 16 tokens do nothing."""

    def text(limit: int | None) -> list[int]:
        request = GenerateRequest(
            checkpoint="",
            task="text-to-image",
            out="",
            prompt=("a red heart on a green apple beside a blue car",),
            limit_context_len=limit,
            repeat_prompt=repeat,
        )
        (chunk,) = Planner(request, untrained, codecs_of(untrained)).chunks()
        return chunk.load()[1].given["text"][0].tolist()

    whole, (end, pad) = text(None), (1, 0)
    length = whole.index(end) + 1
    assert length == 16 if repeat else length > 5
    for limit in (1, 2, 4, length - 1):
        assert text(limit) == [*whole[: limit - 1], end, *[pad] * (16 - limit)]
    for limit in (length, 16, 17, 500):
        assert text(limit) == whole


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
def test_s6_pictures_leave_as_8_bit_numbers_so_that_a_scorers_1_over_255_applies_once(channels, mode):
    """S6: numbers in [0, 1] given to an image processor, which divides by 255, are nearly black."""
    codec = PixelCodec(PixelField(), GridSpace(channels=channels, height=4, width=4))
    for state, value in ((-1.0, 0), (0.5, 191), (1.0, 255), (7.0, 255)):
        picture = codec.decode(torch.full((channels, 4, 4), state))
        assert isinstance(picture, Image.Image)
        assert picture.mode == mode
        pixels = np.asarray(picture)
        assert pixels.dtype == np.uint8
        assert (pixels == value).all()
        buffer = io.BytesIO()
        picture.save(buffer, "png")
        with Image.open(buffer) as stored:
            assert (np.asarray(stored) == value).all()
        assert (pixels / 255).mean() == pytest.approx((min(state, 1.0) + 1) / 2, abs=1 / 255)  # the processor's own rescaling


def test_s7_nothing_can_land_in_the_place_of_a_mode():
    """S7: the released code gave its tokenizer as the `mode` of a network, and nobody noticed."""
    parameters = [name for name in inspect.signature(Sampler.sample).parameters.values() if name.name != "self"]
    assert [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY] == ["denoiser", "keys"]
    tokenizer = object()
    with pytest.raises(TypeError, match="positional"):
        Sampler(MODEL, Sampling()).sample(IdealDenoiser(MODEL), KEYS[:2], tokenizer)
    # What else takes arguments by position takes objects of types of their own: the modes are in Sampling, all of them.
    for function in (Guided, build_solver, Sampler):
        assert all(parameter.annotation not in ("str", "Any") for parameter in inspect.signature(function).parameters.values())
    modes = [name for name, field in Sampling.model_fields.items() if "Literal" in str(field.annotation)]
    assert modes == ["grid", "solver", "order", "remask"]
    for mode in modes:
        for wrong in (tokenizer, "multimodal", "", None):
            with pytest.raises(ValidationError):
                Sampling(**{mode: wrong})
        with pytest.raises(ValidationError):
            setattr(Sampling(), mode, tokenizer)
    with pytest.raises(ValidationError):
        Sampling(mode="multimodal")


@pytest.mark.parametrize(("schedule", "target"), KINDS)
def test_s8_the_corrector_is_evaluated_at_the_steps_end_and_at_eulers_state_there(schedule, target):
    """S8: the clocks of the second call are where the step ends, and its slopes are averaged with the first's."""
    model, keys = model_of(schedule, target), KEYS[:20]
    watched, ends = Watched(model), []

    def keep(_: int, clocks: Mapping[str, Tensor], states: dict[str, Tensor]) -> dict[str, Tensor]:
        ends.append(states["grid"])
        return states

    sampler = Sampler(model, Sampling(steps=4))
    sampler.sample(watched, keys, generate=["tokens", "grid"], after_step=keep)
    process, fractions = watched.ideal.grid, sampler.grid(["grid"])
    for index, (now, then) in enumerate(pairwise(fractions)):
        (first, _), said = watched.seen[2 * index], watched.said[2 * index]["grid"]
        times, earlier = at(now, 20), at(then, 20)
        slope = process.slope(said, first.states["grid"], times)
        euler = process.integrate(first.states["grid"], times, earlier, slope)
        assert all((first.clocks[name] == times).all() for name in ("tokens", "grid"))
        if then == 0:
            assert torch.equal(ends[index], euler)
            assert len(watched.seen) == 2 * index + 1
            break
        (second, asked), again = watched.seen[2 * index + 1], watched.said[2 * index + 1]["grid"]
        assert set(asked) == {"grid"}
        assert all((second.clocks[name] == earlier).all() for name in ("tokens", "grid"))
        assert torch.equal(second.states["grid"], euler)
        assert torch.equal(second.states["tokens"], watched.seen[2 * index + 2][0].states["tokens"])  # as just unmasked
        mean = 0.5 * (slope + process.slope(again, euler, earlier))
        assert torch.allclose(ends[index], process.integrate(first.states["grid"], times, earlier, mean), atol=1e-6)
        assert not torch.allclose(ends[index], euler, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- S9 and S10


def gaussian(schedule: str, target: str) -> Gaussian:
    space = GridSpace(channels=1, height=1, width=2)
    return Gaussian("grid", GaussianProcess(schedule=schedule, target=target), space)


@pytest.mark.parametrize("time", [1e-5, 1e-4, 1e-3, 1e-2])
def test_s9_sigma_near_0_has_the_digits_of_float32(time):
    """S9: the released 1 - exp(-2 B), a difference of numbers near 1, has lost four of seven digits at 1e-5."""
    single = torch.tensor([time])
    exactly = single.double().item()
    low, high = 0.00085**0.5, 0.012**0.5
    # The integral of (low + (high - low) t)^2 from 0 to t, multiplied out: no difference of near numbers in it.
    integral = 1000 * (low**2 * exactly + low * (high - low) * exactly**2 + (high - low) ** 2 * exactly**3 / 3)
    truth = math.sqrt(-math.expm1(-integral))
    assert gaussian("vp", "epsilon").sigma(single).item() == pytest.approx(truth, rel=1e-6)
    if time < 1e-3:
        released = (1 - torch.exp(torch.tensor(-integral, dtype=torch.float32))).sqrt().item()
        assert released != pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("solver", sorted(GAUSSIAN_SOLVERS.keys() - {"heun_time"}))  # which is the paper's
@pytest.mark.parametrize(("schedule", "target"), KINDS)
def test_s9_the_step_to_0_multiplies_no_error_of_the_network(schedule, target, solver):
    """S9: an error e in the last prediction moves the result by at most about e, however small the noise in that step."""
    process, error = gaussian(schedule, target), 0.01
    for time in (1e-6, 1e-5, 1e-3, 0.05):
        step = step_of(time, 0.0, KEYS[:50])
        clean = torch.linspace(-1, 1, 100).view(50, 1, 1, 2)
        noised = process.noise(clean, step.now, KEYS[:50])
        ends = []
        for wrong in (0.0, error):
            last = build_solver(process, Sampling(solver=solver), KEYS[:50], step.now)
            ends.append(last.move(noised.state, step, last.request(noised.state, step), noised.target + wrong).state)
        # From a clean state alone less than a thousandth of noise cannot be told, and is left in.
        left = 4 * min(process.sigma(step.now)[0].item(), 1e-3) if target == "clean" else 0.0
        assert torch.allclose(ends[0], clean, atol=5e-6 + left)
        assert (ends[1] - ends[0]).abs().max() < 1.1 * error


def test_s10_a_draw_has_float64_resolution_for_ids_of_any_rareness():
    """S10: float32 Gumbel noise with its 1e-10 cannot draw the rare ids: their rate is theirs, wherever they stand."""
    rare = torch.logspace(-7, -10, 300, dtype=torch.float64)
    shares = torch.cat([rare[:150], 1 - rare.sum()[None], rare[150:]])
    logits = shares.log().float()
    kept = logits.double().exp()
    ends = kept.cumsum(0) / kept.sum()
    chosen = torch.arange(len(shares))
    for place in (0.1, 0.5, 0.9):  # within an id's part of (0, 1)
        inside = ends - (1 - place) * kept / kept.sum()
        assert draw_rows(logits.expand(len(chosen), -1), inside).ids.tolist() == chosen.tolist()
    # And the uniforms that the solvers ask with have bits below float32's.
    network = Watched()
    Sampler(MODEL, Sampling(steps=2)).sample(network, KEYS[:200], generate=["tokens"])
    uniforms = torch.cat([rng.uniform_at(*readout["tokens"].keys) for _, readout in network.seen])
    assert uniforms.dtype == torch.float64
    assert (uniforms != uniforms.float().double()).double().mean() > 0.99


def test_s10_draws_are_as_spread_as_their_distribution():
    """S10: a draw's surprise has the distribution's entropy as its mean; a lowered temperature would make it smaller."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 2
    expected = logits.double().softmax(0)
    uniforms = rng.uniform(rng.sample_keys(7, torch.arange(30_000)), "draw", dtype=torch.float64)
    surprise = torch.cat([-expected.log()[draw_rows(logits.expand(len(u), -1), u).ids] for u in uniforms.split(6000)])
    assert abs(surprise.mean() - torch.special.entr(expected).sum()) < 4 * surprise.std() / len(surprise) ** 0.5


@pytest.mark.parametrize("steps", [1, 4, 25])
@pytest.mark.parametrize("options", ORDERS[:5], ids=str)
def test_s10_the_last_step_draws_what_is_still_masked_and_puts_no_end_mark_in_its_place(options, steps):
    """S10: the end mark comes as often as the network says, 2 %, though up to all the tokens are masked before that step."""
    if options["order"] in ("confidence", "entropy"):
        options = {**options, "order_noise": 1e6}  # a random order: by sureness the frequencies of one draw would be biased
    network = Constant(SPREAD)
    model = model_of(end_id=4, pad_id=4, length=8)
    made = Sampler(model, Sampling(steps=steps, **options)).sample(network, KEYS, generate=["tokens"])["tokens"]
    if steps < 25:
        assert (network.states[-1] == MASK).double().mean() > 0.1
    shares = torch.bincount(made.flatten(), minlength=MASK + 1).double() / made.numel()
    assert shares[MASK] == 0
    deviation = (SPREAD * (1 - SPREAD) / made.numel()).sqrt()
    assert ((shares[:MASK] - SPREAD).abs() < 4 * deviation).all(), shares


# ------------------------------------------------------------------------------------------------------------ S11 and S12


@pytest.mark.parametrize(
    ("count", "batch", "world"),
    [(1, 4, 1), (8, 4, 1), (5, 2, 1), (8, 4, 3), (6, 2, 2), (7, 3, 2), (2, 1, 3), (9, 3, 4), (12, 5, 3), (3, 32, 2)],
)
def test_s11_exactly_n_samples_whatever_the_batch_and_the_processes(untrained, tmp_path, monkeypatch, count, batch, world):
    """S11: no batch too many, none too few where the world does not divide them; and the pictures are 8-bit (S6)."""
    drawn: list[int] = []
    asked: list[str] = []

    def draw(network: Any, model: Model, sampling: Sampling, task: Any, keys: Tensor, *_: Any, **named: Any) -> Any:
        drawn.extend(keys.tolist())
        return {"text": torch.ones(len(keys), 16, dtype=torch.int64), "image": torch.full((len(keys), 3, 32, 32), 0.5)}

    def load(address: str, weights: str, *_: Any, **named: Any) -> Loaded:
        asked.append(weights)
        return untrained

    monkeypatch.setattr(generating, "load", load)
    monkeypatch.setattr(generating, "draw", draw)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("rank 0 waits for a chunk that nobody has drawn"))
    if world > 1:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "1")
    request = GenerateRequest(checkpoint="", task="joint", out=str(tmp_path / "out"), n=count, batch=batch, weights="raw")
    for rank in reversed(range(world)):  # rank 0 waits for the others, and joins what all have stored
        if world > 1:
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("LOCAL_RANK", str(rank))
        records = generating.generate(request)
    numbers = [json.loads(line)["number"] for line in records.read_text().splitlines()]
    assert numbers == list(range(count))
    assert sorted(drawn) == sorted(rng.sample_keys(0, torch.arange(count)).tolist())  # each once, and nothing for nobody
    pictures = sorted((tmp_path / "out").glob("*.image.png"))
    assert len(pictures) == count
    with Image.open(pictures[0]) as picture:
        assert picture.mode == "RGB"
        assert (np.asarray(picture) == 191).all()
    assert asked == ["raw"] * world


@pytest.mark.parametrize(("flags", "weights"), [([], "ema"), (["--weights", "raw"], "raw"), (["--weights", "ema"], "ema")])
def test_s11_plain_weights_can_be_asked_for(monkeypatch, flags, weights):
    """S11: the released --use_ema could not be turned off."""
    asked: list[GenerateRequest] = []
    monkeypatch.setattr(generating, "generate", asked.append)
    command = ["sample", "--checkpoint", "x", "--task", "text-to-image", "--prompt", "p", "--limit-context-len", "7"]
    assert main([*command, "--out", "y", *flags]) == 0
    assert asked[0].weights == weights
    assert asked[0].limit_context_len == 7  # S5: it arrives


def known(name: str, values: Sequence[float], where: Sequence[bool]) -> Conditions:
    shape = (COUNT, 3) if name == "tokens" else (COUNT, 1, 1, 2)
    clean, places = torch.tensor(values), torch.tensor(where)
    return Conditions(known={name: Known(clean.expand(COUNT, -1).reshape(shape), places.expand(COUNT, -1).reshape(shape))})


def drawn_pairs(conditions: Conditions) -> dict[str, Tensor]:
    made = Sampler(MODEL, Sampling(steps=20, resample=4)).sample(
        IdealDenoiser(MODEL), KEYS, generate=["tokens", "grid"], conditions=conditions
    )
    made["point"] = cells(made["grid"], made["tokens"])
    return made


def test_s12_a_part_of_a_grid_is_filled_in():
    """S12: in-painting. The known column is points 0's and 1's alone."""
    made = drawn_pairs(known("grid", [-1.0, 0.0], [True, False]))
    assert (made["grid"][..., 0] == -1).all()
    assert (made["grid"][..., 1] + 0.6).abs().median() < 0.02
    assert (made["point"] <= 1).double().mean() > 0.75  # of the data: 0.4


@pytest.mark.parametrize(
    ("values", "where", "points"),
    [
        ([3, 0, 0], [True, False, False], {1, 2}),
        ([0, 0, 4], [True, False, True], {3}),
        ([0, 0, 2], [False, False, True], {0, 4}),
    ],
    ids=["prefix", "middle", "suffix"],
)
def test_s12_a_text_is_filled_in_before_after_and_between_what_is_known(values, where, points):
    """S12: infilling and prefixes."""
    made = drawn_pairs(known("tokens", values, where))
    assert (made["tokens"] == torch.tensor(values))[:, torch.tensor(where)].all()
    assert torch.isin(made["point"], torch.tensor(sorted(points))).double().mean() > 0.94
    assert set(made["point"].tolist()) >= points


def test_s12_variations_stay_nearer_the_smaller_their_strength():
    """S12: editing."""
    sampler, same = Sampler(MODEL, Sampling(steps=20)), []
    for strength in (0.1, 0.5, 0.9):
        start = {name: sampler.noised(name, PAIRS[name], strength, KEYS) for name in ("tokens", "grid")}
        conditions, network = Conditions(initial=start, start_at=dict.fromkeys(start, strength)), Watched()
        made = sampler.sample(network, KEYS, generate=["tokens", "grid"], conditions=conditions)
        made["point"] = cells(made["grid"], made["tokens"])
        for clock in network.seen[0][0].clocks.values():
            assert (clock == strength).all()
        # Draws of the data that are noised and denoised again are draws of the data.
        shares = torch.bincount(made["point"], minlength=6).double() / COUNT
        assert (shares[:5] - SHARES).abs().max() < 0.04
        same.append((made["point"] == PAIRS["index"]).double().mean().item())
    assert same[0] > same[1] + 0.05 > same[2] + 0.1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 0.5}, SPREAD**2),
        ({"temperature": 2.0}, SPREAD**0.5),
        ({"temperature": 0.0}, SPREAD * (SPREAD.max() == SPREAD)),
        ({"top_k": 2}, SPREAD * (SPREAD >= 0.3)),
        ({"top_p": 0.8}, SPREAD * (SPREAD >= 0.15)),
        ({"top_p": 0.8, "temperature": 0.5}, SPREAD**2 * (SPREAD >= 0.3)),
    ],
    ids=str,
)
def test_s12_temperature_top_k_and_top_p_shape_what_is_drawn(options, expected):
    """S12: and temperature comes before top-p."""
    expected = expected / expected.sum()
    made = tokens_of(Sampling(steps=3, **options)).flatten()
    shares = torch.bincount(made, minlength=5).double() / len(made)
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / len(made)).sqrt()).all(), shares


def test_s12_the_surest_positions_come_first():
    """S12: confidence, entropy and threshold; each position's sureness grows with its place here."""
    shares = torch.stack([torch.tensor([p, *[(1 - p) / 4] * 4], dtype=torch.float64) for p in (0.3, 0.6, 0.99)])
    for order, least in (("entropy", 1.0), ("confidence", 0.95)):
        network = Constant(shares)
        Sampler(MODEL, Sampling(steps=3, order=order)).sample(network, KEYS, generate=["tokens"])
        visible = [(state != MASK).double().mean(0) for state in network.states]
        assert visible[1][2] >= least
        assert visible[2][1] >= least - 0.45 * (order == "confidence")
        assert [int((state != MASK).sum(1).max()) for state in network.states] == [0, 1, 2]
    sure = Constant(shares)
    Sampler(MODEL, Sampling(steps=3, order="threshold", threshold=0.5)).sample(sure, KEYS, generate=["tokens"])
    at_once = (sure.states[1] != MASK).sum(1).double().mean()
    assert at_once == pytest.approx(0.6 + 0.99 + 0.4 * 0.01, abs=0.05)  # the third position, where neither is sure


@pytest.mark.parametrize("remask", ["none", "cap", "conf", "loop"])
def test_s12_visible_tokens_may_be_masked_again(remask):
    """S12: remasking."""
    network = Constant(SPREAD)
    Sampler(MODEL, Sampling(steps=20, remask=remask, remask_strength=0.2)).sample(network, KEYS[:200], generate=["tokens"])
    again = sum(int(((then == MASK) & (now != MASK)).sum()) for now, then in pairwise(network.states))
    assert (again > 50) == (remask != "none")
    assert (again == 0) == (remask == "none")


def test_s12_every_sample_has_its_own_seed_and_its_steps_can_be_watched_and_changed():
    """S12: seeds per sample, streaming, an interface for programs."""
    sampler, told = Sampler(MODEL, Sampling(steps=5)), []
    whole = sampler.sample(IdealDenoiser(MODEL), KEYS[:30], generate=["tokens", "grid"])
    some = torch.tensor([17, 3])

    def watch(step: int, clocks: Mapping[str, Tensor], states: dict[str, Tensor]) -> dict[str, Tensor]:
        told.append((step, round(clocks["grid"][0].item(), 6)))
        return {**states, "grid": states["grid"] * 0} if step == 4 else states

    part = sampler.sample(IdealDenoiser(MODEL), KEYS[some], generate=["tokens", "grid"], after_step=watch)
    assert torch.equal(part["tokens"], whole["tokens"][some])
    assert told == [(0, 0.8), (1, 0.6), (2, 0.4), (3, 0.2), (4, 0.0)]
    assert not part["grid"].any()
    other = sampler.sample(IdealDenoiser(MODEL), rng.fold(KEYS[:30], 1), generate=["tokens", "grid"])
    assert (other["grid"] - whole["grid"]).abs().flatten(1).amax(1).median() > 0.1
    assert not torch.equal(other["tokens"], whole["tokens"])
    assert len(whole["grid"].round(decimals=1).unique(dim=0)) > 2
