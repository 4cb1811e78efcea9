"""S1 to S4 and S7 to S10, the sampling faults of the paper's released code in steps and draws: each is impossible here.

Each test fails where its fault is put in. S5, S6, S11 and S12: ../generation/test_released_request_faults.py.
"""

import inspect
import math
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import GaussianProcess, GridSpace, Sampling
from megadiff.diffusion.build import build_processes, build_solver
from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.gaussian_solvers import GAUSSIAN_SOLVERS
from megadiff.diffusion.guidance import Guided
from megadiff.diffusion.sampler import Conditions, Sampler
from megadiff.kernels.head_draw import draw_rows, row_uniforms
from megadiff.kernels.head_draw.reference import draw_with
from megadiff.types import DrawRule, Noised, RowKeys, RowLogits, SampledRows
from tests.diffusion.ideal import IdealDenoiser
from tests.diffusion.probes import KEYS, KINDS, MASK, MODEL, ORDERS, PAIRS, SPREAD, Constant, Watched, at, step_of
from tests.diffusion.small import model_of

pytestmark = pytest.mark.thorough


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


def test_s7_nothing_can_land_in_the_place_of_a_mode():
    """S7: the released code gave its tokenizer as the `mode` of a network, and nobody noticed."""
    parameters = [name for name in inspect.signature(Sampler.sample).parameters.values() if name.name != "self"]
    assert [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY] == ["denoiser", "keys"]
    tokenizer = object()
    with pytest.raises(TypeError, match="positional"):
        Sampler(MODEL, Sampling()).sample(IdealDenoiser(MODEL), KEYS[:2], tokenizer)  # type: ignore[call-arg]
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
        Sampling(mode="multimodal")  # type: ignore[call-arg]


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
    rare = torch.logspace(-7, -10, 120, dtype=torch.float64)
    shares = torch.cat([rare[:60], 1 - rare.sum()[None], rare[60:]])
    logits = shares.log().float()
    kept = logits.double().exp()
    ends = kept.cumsum(0) / kept.sum()
    chosen = torch.arange(len(shares))
    for place in (0.1, 0.5, 0.9):  # within an id's part of (0, 1)
        inside = ends - (1 - place) * kept / kept.sum()
        uniforms = torch.stack([torch.full_like(inside, 0.5), inside], dim=-1)[:, None]
        assert draw_with(logits.expand(len(chosen), -1), uniforms, DrawRule()).ids.tolist() == chosen.tolist()
    # And the uniforms that the solvers ask with have bits below float32's.
    network = Watched()
    Sampler(MODEL, Sampling(steps=2)).sample(network, KEYS[:200], generate=["tokens"])
    uniforms = torch.cat([row_uniforms(readout["tokens"].keys, 5) for _, readout in network.seen])
    assert uniforms.dtype == torch.float64
    assert (uniforms != uniforms.float().double()).double().mean() > 0.99


def test_s10_draws_are_as_spread_as_their_distribution():
    """S10: a draw's surprise has the distribution's entropy as its mean; a lowered temperature would make it smaller."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 2
    expected = logits.double().softmax(0)
    places = torch.arange(30_000)
    ids = [
        draw_rows(logits.expand(len(part), -1), RowKeys(rng.sample_keys(7, part), "draw", part), DrawRule()).ids
        for part in places.split(6000)
    ]
    surprise = -expected.log()[torch.cat(ids)]
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
