"""The learning rate and the averages as functions of the step."""

from __future__ import annotations

import pytest
import torch

from megadiff.config.derived import learning_rate
from megadiff.config.schema import ConstantEma, Optimizer, PowerEma
from megadiff.engine.optimizer import build_optimizer, clip_and_skip, hold_still
from megadiff.engine.pieces import Piece
from megadiff.weights.boxes import Extent
from megadiff.weights.posthoc import decay, power_exponent

pytestmark = pytest.mark.thorough


def test_the_warm_up_is_linear_and_reaches_the_peak() -> None:
    config = Optimizer(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(config, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_decaying_schedule_ends_at_the_final_ratio(schedule: str) -> None:
    config = Optimizer(learning_rate=2.0, warmup_steps=0, schedule=schedule, final_ratio=0.1)  # type: ignore[arg-type]
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(2.0)
    assert rates[50] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[100] == pytest.approx(0.2)
    assert rates == sorted(rates, reverse=True)


def test_only_named_weights_are_decayed_unless_all_are() -> None:
    module = torch.nn.Linear(2, 2)
    some = build_optimizer(module, Optimizer(weight_decay=0.5), ["weight"])
    assert {group["weight_decay"]: len(group["params"]) for group in some.param_groups} == {0.5: 1, 0.0: 1}
    everything = build_optimizer(module, Optimizer(weight_decay=0.5, decay_all=True), ["weight"])
    assert [len(group["params"]) for group in everything.param_groups] == [2]


@pytest.mark.parametrize("largest", [0.0, 0.5, 100.0])
def test_clipping_within_the_optimizer_equals_clipping_before_it(largest: float) -> None:
    modules = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    modules[1].load_state_dict(modules[0].state_dict())
    gradients = [torch.randn_like(parameter) for parameter in modules[0].parameters()]
    for module in modules:
        optimizer = build_optimizer(module, Optimizer(eps=1e-2), ["weight"])
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        norm = torch.nn.utils.get_total_norm(gradients)
        if module is modules[0]:
            clip_and_skip(optimizer, norm, largest)
        elif largest:
            torch.nn.utils.clip_grads_with_norm_(module.parameters(), largest, norm)
        optimizer.step()
    for own, other in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(own, other)


def test_a_norm_that_is_not_finite_leaves_weights_and_moments_as_they_are() -> None:
    module = torch.nn.Linear(3, 2)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer = build_optimizer(module, Optimizer(), ["weight"])
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    clip_and_skip(optimizer, torch.tensor(torch.inf), 1.0)
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(module.parameters(), before, strict=True))
    assert all(not state[name].any() for state in optimizer.state.values() for name in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize(("start", "stop"), [(0, 12), (3, 10), (0, 4)])
def test_numbers_that_are_held_still_are_neither_stepped_nor_decayed(start: int, stop: int) -> None:
    parameter = torch.nn.Parameter(torch.arange(1.0, 13).view(4, 3))
    flat = torch.nn.Parameter(torch.cat([torch.zeros(2), parameter.detach().flatten()[start:stop]]))
    optimizer = torch.optim.AdamW([flat], lr=0.1, weight_decay=0.5)
    shards = [Piece("weight", (4, 3), Extent(start, stop), flat, offset=2, owned=True)]
    hold_still(optimizer, shards, {"weight": (slice(1, 3),), "another": (slice(None),)})
    for _ in range(3):
        flat.grad = torch.ones_like(flat)
        optimizer.step()
    moved = torch.ones(4, 3, dtype=torch.bool)
    moved[1:3] = False
    assert torch.equal(shards[0].master != parameter.flatten()[start:stop], moved.flatten()[start:stop])


def test_numbers_that_are_held_still_are_found_in_a_shard_of_columns() -> None:
    parameter = torch.nn.Parameter(torch.arange(1.0, 13).view(4, 3))
    flat = torch.nn.Parameter(parameter.detach()[:, 1:].flatten()[1:])
    optimizer = torch.optim.AdamW([flat], lr=0.1, weight_decay=0.5)
    shards = [Piece("weight", (4, 3), Extent(1, 8, (((0, 4), (1, 3)),)), flat, offset=0, owned=True)]
    hold_still(optimizer, shards, {"weight": (slice(1, 3),)})
    before = flat.detach().clone()
    flat.grad = torch.ones_like(flat)
    optimizer.step()
    assert (flat != before).tolist() == [True, False, False, False, False, True, True]


def test_a_constant_average_is_dominated_by_recent_weights_while_it_warms_up() -> None:
    assert decay(ConstantEma(decay=0.9999), 1) == pytest.approx(0.1)
    assert decay(ConstantEma(decay=0.9999), 10**6) == 0.9999
    assert decay(ConstantEma(decay=0.9999, warmup=False), 1) == 0.9999


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2])
def test_the_power_profile_has_the_relative_deviation_it_is_named_by(length: float) -> None:
    steps = 20_000
    weights = torch.ones(steps, dtype=torch.float64)
    decays = torch.tensor([decay(PowerEma(length=length), update) for update in range(1, steps + 1)], dtype=torch.float64)
    # The weight of update t in the average after all: (1 - decay_t) * product of all later decays.
    later = torch.flip(torch.cumprod(torch.flip(decays, [0]), 0), [0]).roll(-1)
    later[-1] = 1.0
    weights = (1 - decays) * later
    times = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    assert weights.sum() == pytest.approx(1.0)
    mean = (weights * times).sum()
    deviation = ((weights * (times - mean) ** 2).sum()).sqrt()
    assert deviation == pytest.approx(length, rel=1e-2)
    assert power_exponent(length) > 0
