"""Held-out losses of denoisers whose losses are known, and what of a training shows in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.errors import UserError
from megadiff.config.layout import Layout
from megadiff.config.load import load_run
from megadiff.config.schema import HeldOutLoss, Model
from megadiff.diffusion.build import build_processes
from megadiff.evaluation import held_out
from megadiff.evaluation.build import callbacks
from megadiff.evaluation.held_out import Curve, HeldOutLosses
from megadiff.types import CrossEntropy, Denoiser, Metric, Noised, Prediction, Readout, TokenLosses
from tests.diffusion.ideal import GRIDS, SHARES, TOKENS, IdealDenoiser, draw_pairs
from tests.diffusion.small import model_of, stage_of

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def losses_of(model: Model, states: dict[str, Tensor], rows: int = 64, **rule: Any) -> HeldOutLosses:
    """The callback over given states in place of a data set's."""
    run: Any = SimpleNamespace(model=model, data=SimpleNamespace(reference="held out"))
    stage = stage_of()
    stage = stage.model_copy(update={"batch": stage.batch.model_copy(update={"micro_batch": rows})})
    read = SimpleNamespace(states={name: states[name] for name in model.modalities}, ids=range(len(states["tokens"])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "read_held_out", lambda *_: read)
        patch.setattr(held_out, "of_data", lambda _: {"data": "held out"})
        return HeldOutLosses(run, stage, HeldOutLoss(every_steps=1, pairs=len(states["tokens"]), **rule))


class KnownEntropies:
    """Gives every token the cross entropy 0.5 nats where the grid is given, else 2 nats; and of the grid, zeros."""

    def __init__(self, looks: bool = True) -> None:
        self.looks = looks

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        out: Prediction = {}
        for name, request in readout.items():
            if isinstance(request, TokenLosses):
                given = (noised.clocks["grid"] == 0)[:, None] & self.looks
                entropies = torch.where(request.scored, torch.where(given, 0.5, 2.0), 0.0)
                out[name] = CrossEntropy(entropies * request.weights, entropies)
            else:
                out[name] = torch.zeros_like(noised.states[name])
        return out


def test_curves_are_a_time_each_given_and_absent_and_the_bound_of_tokens():
    losses = losses_of(model_of(), draw_pairs(8)).losses(KnownEntropies(), Layout(), CPU)
    times = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    expected = {Curve(name, time, given) for name in ("tokens", "grid") for time in times for given in (True, False)}
    assert set(losses) == expected | {Curve("tokens", None, given) for given in (True, False)}
    assert Curve("tokens", 0.1, True).name == "held-out tokens/t 0.100 given"
    assert Curve("tokens", None, False).name == "held-out tokens/NELBO absent"


def test_a_loss_at_a_time_is_that_of_training_there():
    """Of tokens the masked ones, weighted by 1 / t or the cap, over all; of the grid the square over its elements."""
    model, states = model_of(weight_cap=5.0), draw_pairs(64)
    callback = losses_of(model, states, times=(0.1, 0.5))
    losses = callback.losses(KnownEntropies(), Layout(), CPU)
    keys = rng.sample_keys(held_out.SEED, torch.arange(64))
    for time, weight in ((0.1, 5.0), (0.5, 2.0)):
        at = torch.full((64,), time)
        masked = (callback.processes["tokens"].noise(states["tokens"], at, keys).state == 5).double().mean().item()
        velocity = callback.processes["grid"].noise(states["grid"], at, keys).target
        for given, nats in ((True, 0.5), (False, 2.0)):
            assert losses[Curve("tokens", time, given)] == pytest.approx(weight * nats * masked, rel=1e-6)
            assert losses[Curve("grid", time, given)] == pytest.approx(velocity.square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_the_bound_of_the_exact_posterior_is_the_entropy_of_the_tokens_alone_and_given_the_grid(kind):
    """The pairs hold every data point in proportion to its probability, so that only times and noise are drawn. Bounds are
    four standard errors; with the capped weight the losses would be a quarter lower."""
    points = torch.arange(5).repeat_interleave((SHARES * 2400).round().long())
    model = model_of(kind=kind, weight_cap=2.0)
    losses = losses_of(model, {"tokens": TOKENS[points], "grid": GRIDS[points]}, rows=10**6, times=(0.5,))
    found = losses.losses(IdealDenoiser(model), Layout(), CPU)
    # Points 1 and 2 share the tokens; points 0 and 1 the grid, and no others do.
    alone, given = entropy(0.15, 0.45, 0.3, 0.1), 0.4 * entropy(0.375, 0.625)
    assert found[Curve("tokens", None, False)] == pytest.approx(alone / 3, rel=0.06)
    assert found[Curve("tokens", None, True)] == pytest.approx(given / 3, rel=0.16)


def entropy(*shares: float) -> float:
    return -sum(share * math.log(share) for share in shares)


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_together_find_to_the_bit_what_one_finds_and_call_the_model_equally_often(replicas, monkeypatch):
    model = model_of()
    callback, ideal = losses_of(model, draw_pairs(8), rows=5), IdealDenoiser(model)
    whole = callback.losses(ideal, Layout(), CPU)
    tables, calls = list[Tensor](), list[int]()

    def watched(table: Tensor, _: Layout) -> Tensor:
        tables.append(table)
        return torch.stack(tables).sum(0)

    monkeypatch.setattr(held_out, "sum_over_replicas", watched)
    for rank in range(replicas):
        found = callback.losses(counted := Counted(ideal), Layout(rank=rank, world=replicas), CPU)
        calls.append(counted.calls)
    assert found == whole
    assert len(set(calls)) == 1
    assert all((sum(table[pair].any() for table in tables) == 1) for pair in range(8))


class Counted:
    """Counts the calls of a denoiser."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.calls = denoiser, 0

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        self.calls += 1
        return self.denoiser(noised, readout)


# ------------------------------------------------------------------------------------------------------ planted faults


class IgnoresConditions:
    """The ideal denoiser, to which other modalities look absent."""

    def __init__(self, model: Model) -> None:
        self.ideal, self.processes = IdealDenoiser(model), build_processes(model)

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        states, clocks = dict(noised.states), dict(noised.clocks)
        for name in self.processes.keys() - readout.keys():
            keys = rng.sample_keys(1, torch.arange(len(clocks[name])))
            states[name], clocks[name] = self.processes[name].prior(keys), torch.ones_like(clocks[name])
        return self.ideal(noised._replace(states=states, clocks=clocks), readout)


def test_a_dead_condition_shows_as_two_curves_that_are_one():
    model = model_of()
    callback = losses_of(model, draw_pairs(200), rows=4000)
    alive, dead = (callback.losses(network(model), Layout(), CPU) for network in (IdealDenoiser, IgnoresConditions))
    for curve in (curve for curve in alive if curve.given):
        absent = replace(curve, given=False)
        assert dead[curve] == pytest.approx(dead[absent], rel=1e-6)
        assert alive[curve] < 0.95 * alive[absent] or alive[absent] < 1e-9  # almost clean, nothing else is needed


class BreaksAbove:
    """The ideal denoiser, but for a range of times of the modality that it predicts, where a grid is read as zeros."""

    def __init__(self, model: Model, time: float) -> None:
        self.ideal, self.time = IdealDenoiser(model), time

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        out = self.ideal(noised, readout)
        if "grid" in out:
            out["grid"] = torch.where(noised.clocks["grid"][:, None, None, None] > self.time, 0.0, out["grid"])
        return out


def test_a_broken_range_of_times_shows_in_the_curves_of_these_times_alone():
    model = model_of()
    callback = losses_of(model, draw_pairs(200), rows=4000)
    sound, broken = (callback.losses(network, Layout(), CPU) for network in (IdealDenoiser(model), BreaksAbove(model, 0.65)))
    worse = {curve for curve in sound if broken[curve] > 1.1 * sound[curve]}
    assert worse == {curve for curve in sound if curve.target == "grid" and (curve.time or 0) > 0.65}
    assert all(broken[curve] == sound[curve] for curve in sound.keys() - worse)


# ------------------------------------------------------------------------------------------------- in a run's training


class Moment:
    """Two networks for the two kinds of weights; what is recorded."""

    step, last, layout, device = 6, False, Layout(), CPU

    def __init__(self) -> None:
        self.recorded: list[Metric] = []

    @contextmanager
    def denoiser(self, weights: str | None = None) -> Iterator[Denoiser]:
        yield KnownEntropies(looks=weights is None)

    def metrics(self, metrics: Sequence[Metric]) -> None:
        self.recorded += metrics


def test_curves_of_both_kinds_of_weights_stand_side_by_side_under_sorted_names():
    moment = Moment()
    losses_of(model_of(), draw_pairs(4), times=(0.5,), nelbo_times=2)(moment)
    names = [metric.name for metric in moment.recorded]
    assert names == sorted(names)
    assert names[-4:] == [f"held-out tokens/t 0.500 {side}" for side in ("absent ema", "absent raw", "given ema", "given raw")]
    value = {metric.name: metric.value for metric in moment.recorded}
    assert value["held-out tokens/t 0.500 given raw"] == value["held-out tokens/t 0.500 absent raw"]
    assert value["held-out tokens/t 0.500 given ema"] < value["held-out tokens/t 0.500 absent ema"]
    assert moment.recorded[0].depends == {"data": "held out", "pairs": 4, "nelbo_times": 2, "seed": 0}


@pytest.mark.parametrize(("step", "last", "due"), [(6, False, True), (5, False, False), (5, True, True)])
def test_it_is_measured_every_so_often_and_at_the_end(step, last, due):
    moment = Moment()
    moment.step, moment.last = step, last
    callback = losses_of(model_of(), draw_pairs(4))
    callback.rule = HeldOutLoss(every_steps=3)
    assert callback.due(moment) is due


def test_data_with_too_few_pairs_are_refused(monkeypatch):
    monkeypatch.chdir(ROOT)  # data and tokenizers are named relative to it
    run = load_run(ROOT / "tests/tiny.yaml", ["stages.*.held_out_loss={every_steps: 1, pairs: 100000}"])
    with pytest.raises(UserError, match=r"pairs is 100000, but examples/emoji32/held_out/manifest.json has \d+ pairs"):
        callbacks(run, run.stages[0])
