"""Solvers one at a time, and what the sampler refuses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megadiff import rng
from megadiff.config.errors import UserError
from megadiff.config.schema import GaussianProcess, GridSpace, Sampling
from megadiff.diffusion.build import build_processes, build_solver
from megadiff.diffusion.categorical_solvers import Ancestral
from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.gaussian_solvers import Heun
from megadiff.diffusion.sampler import Conditions, Sampler
from megadiff.diffusion.solvers import Solver, SolverStep
from megadiff.types import Dense, SampledRows, TokenDraws
from tests.diffusion.ideal import GRIDS, TOKENS, IdealDenoiser
from tests.diffusion.small import model_of

KEYS = rng.sample_keys(4, torch.arange(200))
PROCESSES = build_processes(model_of())


def step_of(now: float, then: float, keys: torch.Tensor = KEYS) -> SolverStep:
    count = len(keys)
    return SolverStep(torch.full((count,), now), torch.full((count,), then), keys, then == 0)


def solver_of(name: str, keys: torch.Tensor = KEYS, **sampling) -> Solver:
    return build_solver(PROCESSES[name], Sampling(**sampling), keys, torch.ones(len(keys)))


def drawn_at(request: SampledRows, token: int = 0) -> TokenDraws:
    count = request.rows.shape[1]
    return TokenDraws(torch.full((count,), token), *torch.zeros(3, count))


def test_heun_asks_twice_except_in_the_step_to_0():
    solver = solver_of("grid")
    assert isinstance(solver, Heun)
    state = PROCESSES["grid"].prior(KEYS)
    for now, then, twice in ((1.0, 0.5, True), (0.5, 1e-6, True), (0.5, 0.0, False)):
        moved = solver.move(state, step_of(now, then), Dense(), torch.ones_like(state))
        assert (moved.slope is not None) == twice


def test_heun_moves_along_the_average_of_both_slopes():
    solver = solver_of("grid")
    state = PROCESSES["grid"].prior(KEYS)
    moved = solver.move(state, step_of(0.8, 0.6), Dense(), torch.full_like(state, 2.0))
    torch.testing.assert_close(moved.state, state - 0.2 * 2)
    corrected = solver.correct(state, step_of(0.8, 0.6), moved, torch.full_like(state, 5.0))
    torch.testing.assert_close(corrected, state - 0.2 * 3.5)


def test_ancestral_asks_about_chosen_masks_only_and_changes_nothing_else():
    solver = solver_of("tokens")
    assert isinstance(solver, Ancestral)
    clean = TOKENS[torch.arange(200) % 5]
    state = PROCESSES["tokens"].noise(clean, torch.full((200,), 0.8), KEYS).state
    request = solver.request(state, step_of(0.8, 0.4))
    rows = request.rows[0]
    chosen = torch.zeros(600, dtype=torch.bool).index_fill(0, rows, True).view(200, 3)
    assert 0 < len(rows) < (state == 5).sum()
    assert (state[chosen] == 5).all()
    moved = solver.move(state, step_of(0.8, 0.4), request, drawn_at(request))
    assert moved.slope is None
    assert (moved.state[chosen] == 0).all()
    assert torch.equal(moved.state[~chosen], state[~chosen])


def test_ancestral_asks_for_an_empty_readout_where_nothing_is_masked():
    solver = solver_of("tokens", KEYS[:5])
    step = step_of(0.5, 0.25, KEYS[:5])
    request = solver.request(TOKENS, step)
    assert request.rows.shape == (1, 0)
    assert torch.equal(solver.move(TOKENS, step, request, drawn_at(request)).state, TOKENS)


def test_a_process_without_a_solver_is_refused():
    class Other:
        name = "sound"

    with pytest.raises(TypeError, match="sound: there is no solver for a Other"):
        build_solver(Other(), Sampling(), KEYS, torch.ones(200))


@pytest.mark.parametrize("schedule", ["vp", "rectified_flow"])
def test_an_error_of_epsilon_at_time_1_is_not_multiplied_without_bound(schedule):
    """The flow's alpha is 0 there: dividing by it, or by a stand-in, turned an error of 5 % into a clean state of 50."""
    config = GaussianProcess(schedule=schedule, target="epsilon")
    process = Gaussian("grid", config, GridSpace(channels=1, height=1, width=2))
    state = process.prior(KEYS)
    clean, noise = process.clean_and_noise(1.05 * state, state, torch.ones(200))
    torch.testing.assert_close(noise, 1.05 * state)
    assert clean.abs().max() <= 0.05 / 0.0686 * state.abs().max()


def test_a_flow_that_predicts_epsilon_gives_the_data_set_back_too():
    model = model_of("rectified_flow", "epsilon")
    given = {"tokens": TOKENS[1].expand(200, -1).contiguous()}
    made = Sampler(model, Sampling(steps=20)).sample(
        IdealDenoiser(model), KEYS, generate=["grid"], conditions=Conditions(given=given)
    )["grid"]
    nearest = (made[:, None] - GRIDS[1:3]).abs().flatten(2).amax(2).amin(1)
    assert nearest.quantile(0.95) < 1e-2


@pytest.mark.parametrize(
    ("generate", "given", "initial", "sentence"),
    [
        ([], [], [], "nothing is to be generated; name at least one modality of tokens, grid"),
        (["sound"], [], [], "this model has no modality sound; it has tokens, grid"),
        (["grid"], [], ["sound"], "this model has no modality sound; it has tokens, grid"),
        (["tokens"], ["tokens"], [], "tokens cannot be given and generated at once"),
        (["grid"], ["tokens"], ["tokens"], "initial states are for generated modalities, and tokens is not one of them"),
    ],
)
def test_an_impossible_task_is_refused_in_one_sentence(generate, given, initial, sentence):
    model = model_of()
    sampler = Sampler(model, Sampling(steps=2))
    with pytest.raises(UserError, match=f"^{sentence}"):
        sampler.sample(
            IdealDenoiser(model),
            KEYS[:5],
            generate=generate,
            conditions=Conditions(given=dict.fromkeys(given, TOKENS), initial=dict.fromkeys(initial, TOKENS)),
        )


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers read on the host, and shapes that depend on data."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        self.count += function.name() in names or (function.name() == "aten::index.Tensor" and args[1][0].dtype == torch.bool)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", ["ancestral", "tau_leaping", "first_hitting", "confidence", "entropy", "margin"])
def test_positions_to_unmask_are_counted_before_the_run_and_no_step_waits_for_the_device(order):
    keys, sampling = KEYS[:20], Sampling(steps=6, order=order)
    process = PROCESSES["tokens"]
    planned, plain = (build_solver(process, sampling, keys, torch.ones(20)) for _ in range(2))
    ends = torch.linspace(1, 0, 7).tolist()
    steps = [step_of(now, then, rng.fold(keys, index)) for index, (now, then) in enumerate(pairwise(ends))]
    state = expected = process.prior(keys)
    planned.plan(state, steps)
    for step in steps:
        with Waits() as waits:
            request = planned.request(state, step)
            state = planned.move(state, step, request, drawn_at(request)).state
        assert waits.count == 0
        with Waits() as waits:
            request = plain.request(expected, step)
            expected = plain.move(expected, step, request, drawn_at(request)).state
        assert waits.count > 0
        assert torch.equal(state, expected)
    assert not (state == process.mask_id).any()  # type: ignore[attr-defined]


def test_where_states_may_be_changed_from_outside_nothing_is_planned():
    sampler = Sampler(model_of(), Sampling(steps=4))

    def masks_again(index, clocks, states):
        masked = torch.full_like(states["tokens"], PROCESSES["tokens"].mask_id)  # type: ignore[attr-defined]
        return {**states, "tokens": masked if index == 1 else states["tokens"]}

    drawn = sampler.sample(IdealDenoiser(model_of()), KEYS[:10], generate=["tokens"], after_step=masks_again)
    assert not (drawn["tokens"] == PROCESSES["tokens"].mask_id).any()  # type: ignore[attr-defined]
