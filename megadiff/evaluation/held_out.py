"""Losses on held-out pairs while a stage trains: a curve per modality, time and weights, its condition given and absent.

Overfitting shows as a curve that turns up while the training loss falls, a dead condition as two curves that are one (given and
absent share their noise), a broken range of times as the curves of these times alone.
Legend: N held-out pairs, P pairs of one replica, K times of each, C curves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config import parameters
from megadiff.config.errors import UserError
from megadiff.config.layout import Layout
from megadiff.config.schema import HeldOutLoss, Run, Stage
from megadiff.data.reading.loader import read_held_out
from megadiff.diffusion.build import build_processes
from megadiff.diffusion.conditional import exact_losses, losses_at
from megadiff.distributed.reduce import sum_over_replicas
from megadiff.evaluation.results import of_data
from megadiff.types import Denoiser, Metric, Moment

SEED = 0
"""Of times and noise, in every run, so that runs compare."""


@dataclass(frozen=True)
class Curve:
    """What one number of an evaluation is about.

    Attributes:
        time: where the training loss is measured; None for the likelihood bound (NELBO), in nats per token.
        given: whether all other modalities are clean; else they are absent.
    """

    target: str
    time: float | None
    given: bool

    @property
    def name(self) -> str:
        what = "NELBO" if self.time is None else f"t {self.time:.3f}"
        return f"held-out {self.target}/{what} {'given' if self.given else 'absent'}"


class HeldOutLosses:
    """A training callback: the losses of all curves. On each rank the same numbers."""

    def __init__(self, run: Run, stage: Stage, rule: HeldOutLoss) -> None:
        """Raises UserError if the held-out data cannot be read, or has too few pairs."""
        self.rule, self.model, self.rows = rule, run.model, stage.batch.micro_batch
        self.processes = build_processes(run.model)
        self.targets = parameters.predicted(stage)
        held_out = read_held_out(run.data.reference, run.data, run.model, rule.pairs)
        if len(held_out.ids) < rule.pairs:
            raise UserError(f"held_out_loss.pairs is {rule.pairs}, but {run.data.reference} has {len(held_out.ids)} pairs")
        self.states = held_out.states
        facts = {"pairs": rule.pairs, "nelbo_times": rule.nelbo_times, "seed": SEED}
        self.measures = [f"{curve.name} {kind}" for curve in self._curves() for kind in rule.kinds]
        self.depends = {**of_data(run.data.reference), **facts}

    def _curves(self) -> Iterator[Curve]:
        """In the order of `_own_losses`."""
        for target in self.targets:
            for given in (True, False) if len(self.processes) > 1 else (False,):
                yield from (Curve(target, time, given) for time in self.rule.times)
                if self.processes[target].bounded:
                    yield Curve(target, None, given)

    def due(self, moment: Moment) -> bool:
        return moment.step % self.rule.every_steps == 0 or moment.last

    def __call__(self, moment: Moment) -> None:
        metrics = []
        for kind in self.rule.kinds:
            with moment.denoiser(None if kind == "ema" else kind) as denoiser:
                losses = self.losses(denoiser, moment.layout, moment.device)
            metrics += [Metric(f"{curve.name} {kind}", loss, depends=self.depends) for curve, loss in losses.items()]
        moment.metrics(sorted(metrics, key=lambda metric: metric.name))

    def losses(self, denoiser: Denoiser, layout: Layout, device: torch.device) -> dict[Curve, float]:
        """The mean loss per scored element over all pairs, by curve. Collective.

        Every pair has a row of sums and counts, to which one replica alone adds, so the means do not depend on the order in
        which ranks are added up.
        """
        # Every replica takes equally many: under ZeRO-3 each call of the model is a collective.
        replicas = layout.data_ranks
        share = -(-self.rule.pairs // replicas)
        mine = torch.arange(layout.data_rank, share * replicas, replicas)
        clean = {name: state[mine % self.rule.pairs].to(device) for name, state in self.states.items()}
        keys = rng.sample_keys(SEED, mine % self.rule.pairs).to(device)
        own = self._own_losses(denoiser, clean, keys)
        table = torch.zeros(self.rule.pairs, len(own), 2, dtype=torch.float64, device=device)
        real = mine < self.rule.pairs
        table[mine[real].to(device)] = torch.stack(list(own.values()), dim=1)[real.to(device)]
        sums, counts = sum_over_replicas(table, layout).sum(0).unbind(1)
        return dict(zip(own, (sums / counts).tolist(), strict=True))

    def _own_losses(self, denoiser: Denoiser, clean: Mapping[str, Tensor], keys: Tensor) -> dict[Curve, Tensor]:
        """(sum, count) of each of this replica's pairs, float64 [P, 2], by curve."""
        rows, curves = self.rows, dict[Curve, Tensor]()
        times = torch.tensor(self.rule.times, device=keys.device)[:, None].expand(-1, len(keys))
        for target in self.targets:
            others = [name for name in self.processes if name != target]
            for given in (others, []) if others else ([],):
                losses = losses_at(
                    denoiser, self.processes, clean, times, keys.expand_as(times), target=target, given=given, rows=rows
                )
                for time, sums, counts in zip(self.rule.times, *losses, strict=True):
                    curves[Curve(target, time, bool(given))] = torch.stack([sums, counts], dim=1).double()
                if self.processes[target].bounded:
                    strata = self.rule.nelbo_times
                    bound = exact_losses(denoiser, self.model, clean, keys, target=target, given=given, times=strata, rows=rows)
                    curves[Curve(target, None, bool(given))] = torch.stack([bound, torch.ones_like(bound)], dim=1)
        return curves
