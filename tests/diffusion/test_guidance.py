"""Guidance: what the second branch sees, when it runs, and how two predictions are mixed."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import Model, Sampling
from megadiff.diffusion import guidance
from megadiff.diffusion.guidance import Guided
from megadiff.diffusion.objective import ragged_of
from megadiff.diffusion.sampler import Conditions, Sampler
from megadiff.types import Dense, DrawRule, Noised, Prediction, Readout, RowKeys, RowLogits, SampledRows
from tests.diffusion.ideal import GRIDS, TOKENS, IdealDenoiser, draw_pairs
from tests.diffusion.small import model_of

COUNT = 12
KEYS = rng.sample_keys(2, torch.arange(COUNT))
MODEL = model_of()
PROCESSES = Sampler(MODEL, Sampling()).processes
PAIRS = draw_pairs(COUNT, seed=4)
ALL_MASKED = torch.full((COUNT, 3), 5)


class Watched:
    """The ideal denoiser, which notes what it is asked."""

    def __init__(self, model: Model = MODEL) -> None:
        self.ideal = IdealDenoiser(model)
        self.seen: list[Noised] = []

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        self.seen.append(noised)
        return self.ideal(noised, readout)

    @property
    def batches(self) -> list[int]:
        return [len(noised.states["grid"]) for noised in self.seen]


def states_at(times: Mapping[str, float]) -> dict[str, Tensor]:
    return {
        name: process.noise(PAIRS[name], torch.full((COUNT,), times[name]), KEYS).state for name, process in PROCESSES.items()
    }


def noised_at(states: Mapping[str, Tensor], times: Mapping[str, float]) -> Noised:
    clocks = {name: torch.full((COUNT,), time) for name, time in times.items()}
    return Noised(dict(states), clocks, dict.fromkeys(states))


def rows_of(state: Tensor) -> SampledRows:
    return draws_at((state == 5).flatten().nonzero()[:, 0])


def draws_at(rows: Tensor) -> SampledRows:
    keys = RowKeys(torch.full_like(rows, 3), "draw", rows)
    return SampledRows(rows[None], torch.ones(1, len(rows)), keys, DrawRule())


def at(times: Mapping[str, float]) -> dict[str, Tensor]:
    return {name: torch.full((COUNT,), time) for name, time in times.items()}


class Mixed(Watched):
    """Notes the distribution that tokens are drawn from."""

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        self.seen.append(noised)
        request = readout["tokens"]
        assert isinstance(request, SampledRows)
        logits = self.ideal(noised, {"tokens": RowLogits(request.rows.flatten())})["tokens"].view(*request.rows.shape, -1)
        self.mixture = (request.weights[..., None] * logits).sum(0).log_softmax(-1)
        return self.ideal(noised, readout)


@pytest.mark.parametrize("generate", [["tokens"], ["grid"], ["tokens", "grid"]])
def test_a_weight_of_1_is_no_guidance_and_one_evaluation_per_stage(generate):
    given = {name: PAIRS[name] for name in ("tokens", "grid") if name not in generate}
    watched = Watched()
    made = Sampler(MODEL, Sampling(steps=4, guidance=1.0)).sample(
        watched, KEYS, generate=generate, conditions=Conditions(given=given)
    )
    assert watched.batches == [COUNT] * (4 if generate == ["tokens"] else 7)
    nearly = Sampler(MODEL, Sampling(steps=4, guidance=1.0 + 1e-9)).sample(
        Watched(), KEYS, generate=generate, conditions=Conditions(given=given)
    )
    for name in made:
        torch.testing.assert_close(made[name], nearly[name], atol=1e-4, rtol=0)


def test_outside_the_interval_no_second_branch_runs():
    watched = Watched()
    sampling = Sampling(steps=4, guidance=3.0, guidance_interval=(0.3, 0.6))
    Sampler(MODEL, sampling).sample(watched, KEYS, generate=["tokens"], conditions=Conditions(given={"grid": PAIRS["grid"]}))
    assert watched.batches == [COUNT, COUNT, 2 * COUNT, COUNT]  # at 1, 0.75, 0.5, 0.25
    grids = Watched()
    Sampler(MODEL, sampling).sample(grids, KEYS, generate=["grid"], conditions=Conditions(given={"tokens": PAIRS["tokens"]}))
    assert grids.batches == [COUNT * branches for branches in (1, 1, 1, 2, 2, 1, 1)]  # Heun's evaluations at their own time


def test_nothing_to_noise_means_no_second_branch():
    """Where the condition is absent, or already noisier than the final time, both branches would be the same."""
    absent = Watched()
    Sampler(MODEL, Sampling(steps=3, guidance=2.0)).sample(absent, KEYS, generate=["tokens"], conditions=Conditions(given={}))
    assert absent.batches == [COUNT] * 3
    joint = Watched()
    Sampler(MODEL, Sampling(steps=4, guidance=2.0, guidance_final_time=0.6)).sample(
        joint, KEYS, generate=["tokens", "grid"], conditions=Conditions(given={})
    )
    branches = [int(noised.clocks["grid"][0] < 0.6) for noised in joint.seen]
    # Tokens and grid at the first evaluation of a step, the grid alone at Heun's second.
    assert joint.batches == [COUNT * (1 + b * w) for b, w in zip(branches, (2, 1, 2, 1, 2, 1, 2), strict=True)]
    assert any(branches)
    assert not all(branches)


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0, 5.0])
def test_guided_tokens_follow_the_closed_form(weight):
    times = {"tokens": 0.8, "grid": 0.4}
    states = states_at(times)
    readout = {"tokens": rows_of(states["tokens"])}
    denoiser = Mixed()
    Guided(denoiser, PROCESSES, Sampling(guidance=weight), KEYS)(states, at(times), readout)
    mixed = denoiser.mixture
    ideal = IdealDenoiser(MODEL)
    logits = {"tokens": RowLogits(readout["tokens"].rows[0])}
    log_p = ideal(noised_at(states, times), logits)["tokens"].double().log_softmax(-1)
    # At t = 1 the flow's grid says nothing: the unconditional branch is the tokens' own posterior.
    absent = {"tokens": states["tokens"], "grid": PROCESSES["grid"].prior(KEYS)}
    log_q = ideal(noised_at(absent, {**times, "grid": 1.0}), logits)["tokens"].double().log_softmax(-1)
    expected = (weight * log_p + (1 - weight) * log_q).softmax(-1)
    torch.testing.assert_close(mixed.double().softmax(-1), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(len(mixed)))
    if weight > 1:
        assert not torch.allclose(expected, log_p.exp(), atol=1e-2)


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_guided_grids_are_w_conditional_and_1_minus_w_unconditional(weight):
    times = {"tokens": 0.0, "grid": 0.7}
    states = states_at(times)
    mixed = Guided(IdealDenoiser(MODEL), PROCESSES, Sampling(guidance=weight), KEYS)(states, at(times), {"grid": Dense()})[
        "grid"
    ]
    ideal = IdealDenoiser(MODEL)
    conditional = ideal(noised_at(states, times), {"grid": Dense()})["grid"]
    masked = {"tokens": ALL_MASKED, "grid": states["grid"]}
    unconditional = ideal(noised_at(masked, {**times, "tokens": 1.0}), {"grid": Dense()})["grid"]
    assert not torch.allclose(conditional, unconditional, atol=1e-2)
    torch.testing.assert_close(mixed, weight * conditional + (1 - weight) * unconditional, atol=1e-5, rtol=0)


def test_noisy_guidance_noises_the_condition_to_the_final_time_with_the_same_noise_at_every_call():
    watched = Watched()
    sampling = Sampling(steps=4, guidance=2.0, guidance_final_time=0.5)
    Sampler(MODEL, sampling).sample(watched, KEYS, generate=["tokens"], conditions=Conditions(given={"grid": PAIRS["grid"]}))
    assert watched.batches == [2 * COUNT] * 4
    branches = [(noised.states["grid"][COUNT:], noised.clocks["grid"][COUNT:]) for noised in watched.seen]
    for noised, (state, clock) in zip(watched.seen, branches, strict=True):
        assert (clock == 0.5).all()
        assert torch.equal(state, branches[0][0])
        assert torch.equal(noised.states["grid"][:COUNT], PAIRS["grid"])
        assert (noised.clocks["grid"][:COUNT] == 0).all()
        assert torch.equal(noised.states["tokens"][COUNT:], noised.states["tokens"][:COUNT])
        assert torch.equal(noised.clocks["tokens"][COUNT:], noised.clocks["tokens"][:COUNT])
    noise = (branches[0][0] - 0.5 * PAIRS["grid"]) / 0.5  # the flow at t = 0.5
    assert noise.std() > 0.5
    assert len(noise.unique()) == noise.numel()


def test_noisy_guidance_masks_tokens_at_the_final_time_and_the_same_ones_at_every_call():
    count = 2000
    keys, tokens = rng.sample_keys(2, torch.arange(count)), draw_pairs(count)["tokens"]
    watched = Watched()
    Sampler(MODEL, Sampling(steps=3, guidance=2.0, guidance_final_time=0.3)).sample(
        watched, keys, generate=["grid"], conditions=Conditions(given={"tokens": tokens})
    )
    first = watched.seen[0].states["tokens"][count:]
    assert abs((first == 5).double().mean() - 0.3) < 4 * (0.3 * 0.7 / first.numel()) ** 0.5
    assert torch.equal(first[first != 5], tokens[first != 5])
    assert all(torch.equal(noised.states["tokens"][count:], first) for noised in watched.seen)


def test_the_joint_task_guides_every_modality_by_noising_the_others():
    times = {"tokens": 0.4, "grid": 0.4}
    states = states_at(times)
    watched = Mixed()
    sampling = Sampling(guidance=2.0, guidance_final_time=0.9)
    readout = {"tokens": rows_of(states["tokens"]), "grid": Dense()}
    mixed = Guided(watched, PROCESSES, sampling, KEYS)(states, at(times), readout)
    (seen,) = watched.seen
    conditional, for_tokens, for_grid = (
        {name: (seen.states[name][part], seen.clocks[name][part]) for name in states}
        for part in (slice(0, COUNT), slice(COUNT, 2 * COUNT), slice(2 * COUNT, 3 * COUNT))
    )
    for name in states:
        assert torch.equal(conditional[name][0], states[name])
    for branch, target, other in ((for_tokens, "tokens", "grid"), (for_grid, "grid", "tokens")):
        assert torch.equal(branch[target][0], states[target])
        assert not torch.equal(branch[other][0], states[other])
        torch.testing.assert_close(branch[target][1], torch.full((COUNT,), 0.4))
        torch.testing.assert_close(branch[other][1], torch.full((COUNT,), 0.9))
    ideal = IdealDenoiser(MODEL)
    logits = {"tokens": RowLogits(readout["tokens"].rows[0]), "grid": Dense()}  # type: ignore[attr-defined]
    plain = ideal(noised_at(states, times), logits)
    weaker = ideal(noised_at({name: for_grid[name][0] for name in states}, {"tokens": 0.9, "grid": 0.4}), logits)
    torch.testing.assert_close(mixed["grid"], 2 * plain["grid"] - weaker["grid"], atol=1e-5, rtol=0)
    other = ideal(noised_at({name: for_tokens[name][0] for name in states}, {"tokens": 0.4, "grid": 0.9}), logits)
    expected = 2 * plain["tokens"].log_softmax(-1) - other["tokens"].log_softmax(-1)  # type: ignore[attr-defined]
    torch.testing.assert_close(watched.mixture, expected.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_guidance_sharpens_the_conditional_towards_what_the_condition_favours():
    """Points 0 and 1 share a grid; guidance must not move to sentences that the grid excludes, and keeps the likelier ones."""
    count = 1500
    keys = rng.sample_keys(6, torch.arange(count))
    grid = GRIDS[1].expand(count, -1, -1, -1).contiguous()
    made = Sampler(MODEL, Sampling(steps=30, guidance=3.0)).sample(
        Watched(), keys, generate=["tokens"], conditions=Conditions(given={"grid": grid})
    )
    fits = torch.stack([(made["tokens"] == TOKENS[point]).all(1) for point in (0, 1)]).any(0)
    assert fits.double().mean() > 0.95


@pytest.mark.parametrize("weaker", [None, IdealDenoiser(MODEL)], ids=["guidance", "autoguidance"])
def test_guidance_with_no_row_to_unmask_asks_for_none(weaker):
    times = {"tokens": 0.4, "grid": 0.0}
    states = {"tokens": PAIRS["tokens"], "grid": PAIRS["grid"]}
    readout = {"tokens": draws_at(torch.empty(0, dtype=torch.int64))}
    sampling = Sampling(guidance=2.0, autoguidance=1.5)
    mixed = Guided(IdealDenoiser(MODEL), PROCESSES, sampling, KEYS, weaker)(states, at(times), readout)
    assert mixed["tokens"].ids.shape == (0,)


def test_lengths_of_both_branches_are_joined():
    """In the conditional branch a clean caption ends at its end mark; the noised one has every position."""
    model = model_of(end_id=4)
    processes = Sampler(model, Sampling()).processes
    watched = Watched(model)
    times = {"tokens": 0.0, "grid": 0.5}
    states = {"tokens": torch.tensor([[0, 4, 4]]).repeat(COUNT, 1), "grid": PAIRS["grid"]}
    Guided(watched, processes, Sampling(guidance=2.0), KEYS)(states, at(times), {"grid": Dense()})
    ragged = watched.seen[0].ragged
    assert list(ragged) == ["tokens"]
    assert ragged["tokens"].lengths.tolist() == [2] * COUNT + [3] * COUNT
    assert ragged["tokens"].total == 5 * COUNT


def test_a_modality_that_is_read_out_is_never_ragged():
    model = model_of(end_id=4)
    watched = Watched(model)
    states = {"tokens": torch.tensor([[0, 4, 4]]).repeat(COUNT, 1), "grid": PAIRS["grid"]}
    readout = {"grid": Dense(), "tokens": draws_at(torch.tensor([2]))}
    Guided(watched, Sampler(model, Sampling()).processes, Sampling(), KEYS)(states, at({"tokens": 0.0, "grid": 0.5}), readout)
    assert not watched.seen[0].ragged


def test_the_length_of_a_condition_that_stays_is_asked_for_once(monkeypatch):
    """Every answer waits for the device."""
    asked = []
    monkeypatch.setattr(guidance, "ragged_of", lambda *a: asked.append(a) or ragged_of(*a))
    model = model_of(end_id=4)
    guided = Guided(Watched(model), Sampler(model, Sampling()).processes, Sampling(guidance=2.0), KEYS)
    states = {"tokens": torch.tensor([[0, 4, 4]]).repeat(COUNT, 1), "grid": PAIRS["grid"]}
    for time in (0.9, 0.5, 0.1):
        guided(states, at({"tokens": 0.0, "grid": time}), {"grid": Dense()})
    assert len(asked) == 1
    guided({**states, "tokens": states["tokens"].clone()}, at({"tokens": 0.0, "grid": 0.1}), {"grid": Dense()})
    assert len(asked) == 2


def test_a_condition_noisier_than_the_final_time_stays_as_it_is_while_a_cleaner_one_is_noised():
    model = model_of()
    model = Model.model_validate({**model.model_dump(), "modalities": {**model.modalities, "other": model.modalities["grid"]}})
    processes = Sampler(model, Sampling()).processes
    times = {"tokens": 0.4, "grid": 0.2, "other": 0.9}
    states = {"tokens": ALL_MASKED, "grid": PAIRS["grid"], "other": PAIRS["grid"]}
    watched = Watched()
    sampling = Sampling(guidance=2.0, guidance_final_time=0.5)
    Guided(watched, processes, sampling, KEYS)(states, at(times), {"tokens": draws_at(torch.arange(3))})
    (seen,) = watched.seen
    later = {name: clock[COUNT:].unique().item() for name, clock in seen.clocks.items()}
    assert later == pytest.approx({"tokens": 0.4, "grid": 0.5, "other": 0.9})
    assert torch.equal(seen.states["other"][COUNT:], states["other"])
    assert not torch.equal(seen.states["grid"][COUNT:], states["grid"])


def test_a_modality_is_read_in_the_first_branch_and_its_own_alone():
    seen = []

    def noting(noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        seen.append({name: wanted.samples for name, wanted in readout.items()})  # type: ignore[union-attr]
        return IdealDenoiser(MODEL)(noised, readout)

    Sampler(MODEL, Sampling(steps=2, guidance=2.0)).sample(noting, KEYS, generate=["tokens", "grid"])
    first, second_of_heun, both, *_ = seen
    assert first == {"tokens": None, "grid": None}  # at t = 1 nothing is noised further: one branch
    assert second_of_heun == {"grid": None}  # two branches, both its own
    own = torch.arange(COUNT)
    for branch, name in enumerate(both, 1):
        assert torch.equal(both[name], torch.cat([own, own + branch * COUNT]))
