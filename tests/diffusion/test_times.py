"""Decoupled times: distributions, stratification over the global batch, samples that are only a condition."""

from __future__ import annotations

import pytest
import torch

from megadiff import rng
from megadiff.config.schema import LogitNormalTimes, UniformTimes
from megadiff.diffusion.times import draw_times, quantile
from megadiff.types import Batch
from tests.diffusion.small import batch_of, part_of, stage_of

pytestmark = pytest.mark.thorough

COUNT = 20_000
SEED = 7


def empty_batch(count: int = COUNT, data_step: int = 0) -> Batch:
    return batch_of({"tokens": torch.zeros(count, 3, dtype=torch.int64)}, data_step=data_step)


def logit_normal_cdf(times: torch.Tensor, location: float, scale: float, share: float) -> torch.Tensor:
    return share * times + (1 - share) * torch.special.ndtr((torch.logit(times) - location) / scale)


def distance(cumulative: torch.Tensor) -> float:
    """Kolmogorov and Smirnov's distance from the uniform distribution."""
    values = cumulative.double().sort().values
    return float((values - (torch.arange(len(values)) + 0.5) / len(values)).abs().max())


@pytest.mark.parametrize("antithetic", [True, False])
def test_uniform_times_are_uniform(antithetic):
    times = draw_times(stage_of(COUNT, antithetic=antithetic), empty_batch(), SEED).times
    for drawn in times.values():
        assert distance(drawn) < (1.01 / COUNT if antithetic else 2.3 / COUNT**0.5)


@pytest.mark.parametrize(("location", "scale", "share"), [(0.0, 1.0, 0.2), (-0.5, 1.5, 0.0), (1.0, 0.5, 0.6), (0.0, 1.0, 1.0)])
@pytest.mark.parametrize("antithetic", [True, False])
def test_logit_normal_times_have_their_distribution_with_the_uniform_share(antithetic, location, scale, share):
    section = {"times": {"kind": "logit_normal", "location": location, "scale": scale, "uniform_share": share}}
    times = draw_times(stage_of(COUNT, antithetic=antithetic, grid=section), empty_batch(), SEED).times["grid"]
    assert distance(logit_normal_cdf(times.double(), location, scale, share)) < 2.3 / COUNT**0.5


def test_a_uniform_share_keeps_both_ends_trained():
    evenly = (torch.arange(COUNT) + 0.5) / COUNT
    times = quantile(LogitNormalTimes(uniform_share=0.2), evenly)
    for low, high in ((0.0, 0.01), (0.99, 1.0)):
        inside = ((times > low) & (times < high)).double().mean().item()
        assert inside == pytest.approx(0.2 * 0.01, rel=0.05)


@pytest.mark.parametrize("distribution", [UniformTimes(), LogitNormalTimes(), LogitNormalTimes(uniform_share=0.0, scale=5.0)])
def test_times_are_finite_and_never_0_even_for_extreme_numbers(distribution):
    times = quantile(distribution, torch.tensor([0.0, 1e-9, 0.5, 1.0]))
    assert torch.isfinite(times).all()
    assert ((times > 0) & (times <= 1)).all()


@pytest.mark.parametrize("count", [1, 2, 60, 256])
def test_antithetic_times_hit_every_stratum_exactly_once(count):
    for data_step in range(5):
        times = draw_times(stage_of(count), empty_batch(count, data_step), SEED).times
        for drawn in times.values():
            # One common shift, so that all distances between neighbours are 1 / G.
            gaps = drawn.double().sort().values.diff()
            torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / count), atol=2e-5, rtol=0)
            assert sorted((drawn.double() * count).clamp_max(count - 1e-6).long().tolist()) == list(range(count))


def test_antithetic_times_of_different_modalities_steps_and_slots_are_not_correlated():
    stage = stage_of(COUNT)
    first, second = (draw_times(stage, empty_batch(data_step=step), SEED).times for step in (0, 1))
    slots = torch.arange(COUNT).float()
    rows = torch.stack([first["tokens"], first["grid"], second["tokens"], second["grid"], slots]).double()
    assert (torch.corrcoef(rows) - torch.eye(5, dtype=torch.float64)).abs().max() < 4.5 / COUNT**0.5


def test_antithetic_times_are_uniform_over_many_steps_for_one_slot():
    stage = stage_of(4)
    batches = [part_of(empty_batch(4, step), torch.tensor([2])) for step in range(300)]
    drawn = torch.cat([draw_times(stage, batch, SEED).times["grid"] for batch in batches])
    assert distance(drawn) < 2.3 / 300**0.5


@pytest.mark.parametrize("antithetic", [True, False])
def test_times_are_the_same_for_any_split_over_ranks(antithetic):
    stage = stage_of(24, antithetic=antithetic, grid={"conditioning": {"clean": 0.2, "absent": 0.2}})
    batch = empty_batch(24)
    whole = draw_times(stage, batch, SEED)
    for parts in (torch.arange(24).chunk(4), torch.randperm(24).chunk(3), torch.arange(24)[:, None]):
        for rows in parts:
            part = draw_times(stage, part_of(batch, rows), SEED)
            for name in whole.times:
                assert torch.equal(part.times[name], whole.times[name][rows])
                assert torch.equal(part.free[name], whole.free[name][rows])


def test_times_differ_between_seeds_and_data_steps():
    stage, batch = stage_of(16), empty_batch(16)
    first = draw_times(stage, batch, SEED).times["grid"]
    assert not torch.equal(first, draw_times(stage, batch, SEED + 1).times["grid"])
    assert not torch.equal(first, draw_times(stage, empty_batch(16, 1), SEED).times["grid"])


@pytest.mark.parametrize("antithetic", [True, False])
def test_conditioning_shares_are_met_exclude_each_other_and_are_not_scored(antithetic):
    sections = {
        "tokens": {"conditioning": {"clean": 0.15, "absent": 0.1}},
        "grid": {"conditioning": {"clean": 0.2, "absent": 0.05}},
    }
    drawn = draw_times(stage_of(COUNT, antithetic=antithetic, **sections), empty_batch(), SEED)
    roles = []
    for name, section in sections.items():
        held = ~drawn.free[name]
        clean, absent = held & (drawn.times[name] == 0), held & (drawn.times[name] == 1)
        assert torch.equal(held, clean | absent)
        for role, share in ((clean, section["conditioning"]["clean"]), (absent, section["conditioning"]["absent"])):
            assert abs(role.double().mean() - share) < (2 / COUNT if antithetic else 4 * (share * (1 - share) / COUNT) ** 0.5)
            roles.append(role)
        assert (drawn.times[name][drawn.free[name]] > 0).all()
    assert torch.stack(roles).sum(0).max() == 1


def test_times_of_samples_that_are_scored_stay_uniform_beside_conditioning():
    stage = stage_of(COUNT, tokens={"conditioning": {"clean": 0.3}}, grid={"conditioning": {"clean": 0.3}})
    drawn = draw_times(stage, empty_batch(), SEED)
    for name in ("tokens", "grid"):
        times = drawn.times[name][drawn.free[name]]
        assert distance(times) < 2.3 / len(times) ** 0.5
    given = drawn.times["tokens"][~drawn.free["grid"]]
    assert distance(given) < 2.3 / len(given) ** 0.5


def test_times_do_not_follow_the_keys_of_the_noise():
    """Were a sample's time drawn from the numbers of its noise, high times would always see the same noise."""
    batch = empty_batch()
    noise = rng.normal(batch.keys, "grid noise")
    for antithetic in (True, False):
        times = draw_times(stage_of(COUNT, antithetic=antithetic), batch, SEED).times["grid"]
        assert abs(torch.corrcoef(torch.stack((times, noise)))[0, 1]) < 4 / COUNT**0.5
