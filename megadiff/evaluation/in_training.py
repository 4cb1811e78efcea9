"""Metrics of `megadiff evaluate` while a stage trains, on the averaged weights, by all ranks together.

What calls the network is collective; all else (features, scores) is done by each rank for itself, and if it fails on one, the
evaluation fails on all. Legend: N samples or pairs, P of one replica.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megadiff import rng
from megadiff.config import parameters
from megadiff.config.errors import UserError
from megadiff.config.schema import Evaluation, Run, Stage
from megadiff.data.codecs.base import PICTURE, TEXT
from megadiff.data.codecs.build import build_codecs
from megadiff.data.pictures import flat, plain
from megadiff.data.reading.loader import read_held_out
from megadiff.diffusion.sampler import Conditions
from megadiff.distributed.reduce import failing_together, gather_objects
from megadiff.evaluation import captions as of_captions
from megadiff.evaluation import clip_score, likelihood, scores
from megadiff.evaluation.features import Extractor, Pixels, build_extractor
from megadiff.evaluation.picture_sets import PER_PIECE, joined, open_pictures, piece_of
from megadiff.evaluation.results import of_data
from megadiff.evaluation.scores import DISTANCES, OWN_FEATURES, FeatureSet
from megadiff.generation.tasks import Task, draw, tasks_of
from megadiff.types import Denoiser, Metric, Moment

SEED = 0
"""Of samples, in every evaluation and run, so that they compare."""


class InTraining:
    """A training callback. On each rank the same numbers."""

    def __init__(self, run: Run, stage: Stage, rule: Evaluation) -> None:
        """Read the held-out pairs and load networks of features.

        Raises:
            UserError: data or weights are missing, or the network draws nothing that a metric is of.
        """
        self.rule, self.model, self.rows = rule, run.model, stage.batch.micro_batch
        self.codecs = build_codecs(run.data, run.model)
        self.targets = parameters.predicted(stage)
        self.states = read_held_out(run.data.reference, run.data, run.model, rule.count).states
        if (found := len(next(iter(self.states.values())))) < rule.count:
            raise UserError(f"evaluation.count is {rule.count}, but {run.data.reference} has {found} pairs")
        self.reference = rule.reference or run.data.reference
        self.of_pairs = of_data(run.data.reference)
        self.by_features: dict[str, list[str]] = {}
        for name in rule.metrics:
            if name in DISTANCES:
                self.by_features.setdefault(OWN_FEATURES.get(name, rule.features), []).append(name)
        self.extractors = {name: self._extractor(name, torch.device("cpu")) for name in self.by_features}
        self.pair_names = [name for name in rule.metrics if name in clip_score.PAIRS]
        self.scorer = clip_score.pair_scorer(rule.clip, torch.device("cpu")) if self.pair_names else None
        self.pictures = self._task(PICTURE, "pictures") if self.by_features or self.scorer else None
        if self.pair_names and self._caption is None:
            raise UserError(f"evaluation.metrics has {self.pair_names[0]}, but this stage draws no pictures for captions")
        self.captions = self._task(TEXT, "captions") if "captions" in rule.metrics else None
        self._references: dict[str, FeatureSet] = {}

    def _extractor(self, features: str, device: torch.device) -> Extractor:
        return build_extractor(features, getattr(self.rule, features, None), device)

    def _task(self, medium: str, what: str) -> Task:
        """The first task that generates the medium alone."""
        for task in tasks_of(list(self.model.modalities), self.targets):
            if [self.codecs[name].medium for name in task.generated] == [medium]:
                return task
        raise UserError(f"evaluation.metrics are of {what}, which this stage draws for no condition; leave them out")

    @cached_property
    def measures(self) -> list[str]:
        """Names of the figures."""
        of_pictures = [
            title
            for features, names in self.by_features.items()
            for name in names
            for title in scores.titles(name, self.extractors[features].name)
        ]
        of_pictures += [title for name in self.pair_names for title in clip_score.titles(name)]
        of_texts = list(of_captions.NAMES) if self.captions else []
        exact = self.targets if likelihood.LIKELIHOOD in self.rule.metrics else ()
        return [*of_pictures, *of_texts, *(name for one in exact for name in likelihood.names_of(self.model, one).values())]

    def due(self, moment: Moment) -> bool:
        return moment.step % self.rule.every_steps == 0 or moment.last

    def __call__(self, moment: Moment) -> None:
        with moment.denoiser() as denoiser:
            drawn = {task: self._draw(denoiser, task, moment) for task in (self.pictures, self.captions) if task is not None}
            losses = self._losses(denoiser, moment) if likelihood.LIKELIHOOD in self.rule.metrics else {}
        try:
            found: list[Metric] = []
            for features, names in self.by_features.items():
                assert self.pictures is not None
                found += self._distances(features, names, drawn[self.pictures], moment)
            if self.pictures and self.scorer:
                found += self._pairs(self.scorer, self.pictures, drawn[self.pictures], moment)
            texts = drawn[self.captions] if self.captions else {}
            captions = {name: self._whole(list(part), moment) for name, part in texts.items()}
            with failing_together("evaluation"):
                if moment.layout.rank == 0 and captions:
                    found += self._captions(captions)
                depends = {**self.of_pairs, "kind": "ema", "pairs": self.rule.count, "seed": likelihood.SEED}
                for target, sides in losses.items() if moment.layout.rank == 0 else ():
                    found += likelihood.metrics_of(self.model, target, sides, {**depends, "times": likelihood.TIMES})
        except UserError as error:
            moment.failed(str(error))
        else:
            # Rank 0's on all of them: the best checkpoint is chosen by these.
            moment.metrics(gather_objects(found)[0])

    def _mine(self, moment: Moment) -> Tensor:
        """int64 [P]: the pairs of this replica, equally many on each (under ZeRO-3 each call of the model is a collective)."""
        replicas = moment.layout.data_ranks
        share = -(-self.rule.count // replicas)
        return torch.arange(moment.layout.data_rank, share * replicas, replicas) % self.rule.count

    def _whole(self, own: Any, moment: Moment) -> list[Any]:
        """Per pair what some replica has of it, from what each has of its own."""
        replicas = moment.layout.data_ranks
        gathered = gather_objects((moment.layout.data_rank, own) if moment.layout.speaks else None)
        parts = dict(pair for pair in gathered if pair is not None)
        return [parts[number % replicas][number // replicas] for number in range(self.rule.count)]

    def _draw(self, denoiser: Denoiser, task: Task, moment: Moment) -> dict[str, Tensor]:
        """The generated states of this replica's pairs, [P, ...]. Collective."""
        mine = self._mine(moment)
        given = Conditions(given={name: self.states[name][mine] for name in task.given}).to(moment.device)
        keys = rng.sample_keys(SEED, mine).to(moment.device)
        states = draw(denoiser, self.model, self.rule.sampling, task, keys, given, batch=self.rows)
        return {name: state.cpu() for name, state in states.items()}

    def _losses(self, denoiser: Denoiser, moment: Moment) -> dict[str, dict[str, Tensor]]:
        """By target and side, the losses [K, N] of all pairs. Collective."""
        mine, found = self._mine(moment), {}
        for target in self.targets:
            own = likelihood.pair_losses(denoiser, self.model, self.states, mine, moment.device, target=target, rows=self.rows)
            found[target] = {
                side: torch.stack(self._whole(list(losses.unbind(1)), moment), dim=1) for side, losses in own.items()
            }
        return found

    def _distances(self, features: str, names: list[str], drawn: Mapping[str, Tensor], moment: Moment) -> list[Metric]:
        if (extractor := self.extractors[features]).device != moment.device:
            extractor = self.extractors[features] = self._extractor(features, moment.device)
        reference = self._reference(extractor, moment)
        own: list[Any] = []
        with failing_together(f"evaluation, features of {extractor.name}"):
            own = list(extractor(self._pixels(drawn))) if moment.layout.speaks else []
        whole = self._whole(own, moment)
        found: list[Metric] = []
        with failing_together(f"evaluation, {', '.join(names)}"):
            assert self.pictures is not None
            if moment.layout.rank == 0:
                facts = {**extractor.depends, "task": self.pictures.name, "kind": "ema", "seed": SEED, **self._sampling}
                found = scores.distance_metrics(names, FeatureSet.of(np.stack(whole), facts), reference)
        return found

    def _pairs(self, scorer: clip_score.PairScorer, task: Task, drawn: Mapping[str, Tensor], moment: Moment) -> list[Metric]:
        """CLIP's of the drawn pictures with the captions that they were drawn for."""
        if scorer.device != moment.device:
            scorer = self.scorer = clip_score.pair_scorer(self.rule.clip, moment.device)
        own: list[Any] = []
        with failing_together("evaluation, features of CLIP"):
            if moment.layout.speaks:
                assert self._caption is not None
                captions = [self._shown(self._caption, state) for state in self.states[self._caption][self._mine(moment)]]
                pictures = self._pixels(drawn)
                for start in range(0, len(pictures), clip_score.AT_ONCE):
                    some = slice(start, start + clip_score.AT_ONCE)
                    own += zip(*scorer(pictures[some], captions[some]), strict=True)
        whole = self._whole(own, moment)
        found: list[Metric] = []
        with failing_together(f"evaluation, {', '.join(self.pair_names)}"):
            if moment.layout.rank == 0:
                images, texts = (np.stack(side) for side in zip(*whole, strict=True))
                facts = {**scorer.depends, "count": len(whole), **self.of_pairs, "task": task.name, "kind": "ema", "seed": SEED}
                found = clip_score.pair_metrics(self.pair_names, images, texts, {**facts, **self._sampling})
        return found

    @property
    def _caption(self) -> str | None:
        """The modality of captions that pictures are drawn for."""
        given = self.pictures.given if self.pictures else ()
        return next((name for name in given if self.codecs[name].medium == TEXT), None)

    def _pixels(self, drawn: Mapping[str, Tensor]) -> list[Pixels]:
        """The pictures of one modality's states [P, ...]."""
        ((name, states),) = drawn.items()
        return [np.array(flat(plain(self._shown(name, state)))) for state in states]

    def _reference(self, extractor: Extractor, moment: Moment) -> FeatureSet:
        """The reference's features; every rank computes a share of them, once."""
        if extractor.name not in self._references:
            own: dict[int, Any] = {}
            known: FeatureSet | None = None
            with failing_together(f"evaluation, reference {self.reference}"):
                if self.reference.endswith(".npz"):
                    known = scores.read_statistics(self.reference, extractor.depends)
                else:
                    pictures = open_pictures(self.reference, square=True)
                    numbers = range(moment.layout.rank, -(-len(pictures) // PER_PIECE), moment.layout.world)
                    own = {number: piece_of(pictures, extractor, number) for number in numbers}
            pieces = {number: piece for part in gather_objects(own) for number, piece in part.items()}
            with failing_together(f"evaluation, reference {self.reference}"):
                if known is None:
                    features, digest = joined([pieces[number] for number in sorted(pieces)])
                    known = FeatureSet.of(features, {**extractor.depends, "pictures_hash": digest, "square": True})
                self._references[extractor.name] = known
        return self._references[extractor.name]

    def _captions(self, drawn: Mapping[str, list[Tensor]]) -> list[Metric]:
        """Of all pairs' captions."""
        assert self.captions is not None
        ((name, states),) = drawn.items()
        facts = {**self.of_pairs, "task": self.captions.name, "kind": "ema", "seed": SEED, **self._sampling}
        references = [[self._shown(name, state)] for state in self.states[name][: self.rule.count]]
        return of_captions.caption_metrics([self._shown(name, state) for state in states], references, facts)

    @property
    def _sampling(self) -> dict[str, Any]:
        return {"sampling": self.rule.sampling.model_dump(mode="json")}

    def _shown(self, name: str, state: Tensor) -> Any:
        return self.codecs[name].shown(self.codecs[name].decode(state))
