"""Metrics while training: the numbers that `evaluate`'s functions give, on any number of ranks, and what fails."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megadiff import rng
from megadiff.config.errors import UserError
from megadiff.config.layout import Layout
from megadiff.config.load import load_run
from megadiff.config.run_folder import CheckpointsFolder
from megadiff.config.schema import Run
from megadiff.data.pictures import flat, plain
from megadiff.diffusion.sampler import Conditions
from megadiff.evaluation import in_training
from megadiff.evaluation.build import callbacks
from megadiff.evaluation.clip_score import clip_score, pair_scorer
from megadiff.evaluation.in_training import SEED, InTraining
from megadiff.generation.tasks import draw
from megadiff.types import Denoiser, Metric
from megadiff.weights.checkpoint import pointed_to
from tests.engine.worker import coarse_extractor
from tests.evaluation.networks import tiny_clip
from tests.evaluation.test_periodic import network
from tests.ranks import ROOT, run_ranks

RULE = "{every_steps: 2, metrics: [fd, likelihood, captions], count: 11, sampling: {steps: 2}}"


@pytest.fixture(scope="module")
def run() -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return load_run("tests/tiny.yaml", [f"stages.*.evaluation={RULE}"])


class Moment:
    """What is recorded of a network with given weights."""

    step, last, device = 2, False, torch.device("cpu")

    def __init__(self, run: Run) -> None:
        self.network, self.layout = network(run, 0), Layout()
        self.recorded: list[Metric] = []
        self.failures: list[str] = []

    @contextmanager
    def denoiser(self, weights: str | None = None) -> Iterator[Denoiser]:
        assert weights is None, "the averaged weights"
        with torch.no_grad():
            yield self.network

    def metrics(self, metrics: Sequence[Metric]) -> None:
        self.recorded += metrics

    def failed(self, sentence: str) -> None:
        self.failures.append(sentence)


def measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> tuple[InTraining, Moment]:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(in_training, "build_extractor", coarse_extractor)
    (callback,) = (one for one in callbacks(run, run.stages[-1]) if isinstance(one, InTraining))
    return callback, Moment(run)


def test_all_metrics_are_recorded_under_the_names_that_were_told_with_what_they_depend_on(run, monkeypatch):
    callback, moment = measured(run, monkeypatch)
    callback(moment)
    assert moment.failures == []
    found = {metric.name: metric for metric in moment.recorded}
    assert set(callback.measures) <= set(found)
    assert {"FD-Coarse", "BLEU", "NELBO text/given", "likelihood gap/image"} <= set(callback.measures)
    depends = found["FD-Coarse"].depends
    assert (depends["count"], depends["task"], depends["rank_deficient"]) == (11, "text-to-image", True)
    assert depends["reference_pictures_hash"]
    again = Moment(run)
    callback(again)
    assert again.recorded == moment.recorded


def test_clip_scores_the_pictures_with_the_captions_that_they_were_drawn_for(run, tmp_path, monkeypatch):
    tiny_clip(tmp_path)
    monkeypatch.chdir(ROOT)
    rule = run.stages[-1].evaluation.model_copy(update={"metrics": ("clip-score", "retrieval"), "clip": str(tmp_path)})
    callback, moment = InTraining(run, run.stages[-1], rule), Moment(run)
    callback(moment)
    assert moment.failures == []
    assert [metric.name for metric in moment.recorded] == callback.measures
    assert callback.measures[:2] == ["CLIP score", "R@1 image-to-text"]
    assert moment.recorded[0].depends["count"] == 11
    scorer = pair_scorer(str(tmp_path), torch.device("cpu"))
    given = callback.states["text"]
    keys = rng.sample_keys(SEED, torch.arange(11))
    drawn = draw(moment.network, run.model, rule.sampling, callback.pictures, keys, Conditions(given={"text": given}), batch=11)
    codecs = callback.codecs
    pictures = [np.array(flat(plain(codecs["image"].shown(codecs["image"].decode(state))))) for state in drawn["image"]]
    captions = [codecs["text"].shown(codecs["text"].decode(state)) for state in given]
    assert moment.recorded[0].value == pytest.approx(clip_score(*scorer(pictures, captions), {}).value, rel=1e-5)


def test_a_metric_that_fails_is_one_sentence_and_records_nothing(run, monkeypatch):
    callback, moment = measured(run, monkeypatch)
    callback.reference = "nowhere"
    callback(moment)
    assert moment.recorded == []
    assert moment.failures == ["nowhere is no folder of pictures"]


def test_weights_that_are_missing_are_refused_at_the_start(run, monkeypatch):
    stage = run.stages[-1]
    rule = stage.evaluation.model_copy(update={"metrics": ("fid",)})
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="FID needs Inception's weights"):
        InTraining(run, stage, rule)


@pytest.mark.distributed
def test_a_metric_that_fails_on_one_of_two_ranks_fails_on_both_and_the_best_checkpoint_stays(tmp_path: Path):
    best = "stages.third.checkpoint={every_steps: 1, keep: 1, best: {metric: FD-Coarse, goal: least}}"
    evaluation = "stages.third.evaluation={every_steps: 2, metrics: [fd], count: 11, sampling: {steps: 1}}"
    fresh = ["stages.third.initialise={source: null}", "stages.third.steps=6"]
    request: dict[str, Any] = {
        "folder": str(tmp_path),
        "deepspeed": "ds_configs/zero3.json",
        "stages": ["third"],
        "overrides": [best, evaluation, *fresh],
        "failing_features": 1,
    }
    reports = run_ranks(ROOT / "tests/engine/worker.py", 2, request)
    assert [report["steps"] for report in reports] == [[1, 2, 3, 4, 5, 6]] * 2
    incidents = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    failures = [(one["step"], one["detail"]) for one in incidents if one["kind"] == "evaluation"]
    where = "evaluation, reference examples/emoji32/held_out/manifest.json"
    assert failures == [(2, f"{where} failed: RuntimeError: no memory left")]
    values = {}
    for line in (tmp_path / "third/results.jsonl").read_text().splitlines():
        row = json.loads(line)
        values[row["step"]] = row["value"]
    assert values.keys() == {4, 6}
    checkpoints = CheckpointsFolder(tmp_path / "third/checkpoints")
    step = min(values, key=lambda at: values[at])
    assert checkpoints.published().keys() == {step, 6}
    assert checkpoints.named("best") == pointed_to(tmp_path / "third/best") == checkpoints.step(step)
