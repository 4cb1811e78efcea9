"""Checkpoints of one layout go on in another, with the curve and the samples of one that was never interrupted."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from megadiff.weights.checkpoint import CheckpointReader
from tests.engine.layouts import (
    ENDS_AT,
    KEPT_AT,
    ONE_RANK,
    PAIRS,
    SHORT,
    STAGES,
    TIMEOUT_S,
    WORKER,
    assert_same_curve,
    assert_same_losses,
    go_on,
    newest,
    samples_of,
    train,
    train_to,
)
from tests.ranks import finish, run_ranks, start_ranks, wait_until

pytestmark = pytest.mark.distributed

JOURNEY = ("ZeRO-1 x 2", "pipeline x 2", "tensor x 2", "ZeRO-3 x 2", ONE_RANK)
"""Layouts of a run that takes two steps in each."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    reports = train_to(ONE_RANK, folder, 2 * len(JOURNEY))
    return {"folder": folder, "samples": samples_of(reports), **reports[0]}


def test_a_run_that_changes_its_layout_every_two_steps_is_the_uninterrupted_run(uninterrupted, tmp_path):
    for done, layout in enumerate(JOURNEY):
        reports = train_to(layout, tmp_path, 2 * done + 2)
        assert samples_of(reports) == uninterrupted["samples"][2 * done : 2 * done + 2]
    assert_same_curve(reports[0], uninterrupted)
    own, whole = (CheckpointReader(newest(folder / "first")).manifest for folder in (tmp_path, uninterrupted["folder"]))
    assert own.progress == whole.progress
    assert own.parameters == whole.parameters


def test_ranks_that_outlived_their_job_publish_nothing_over_a_newer_start(tmp_path):
    run, signals = tmp_path / "run", tmp_path / "signals"
    signals.mkdir()
    request = {
        "folder": str(run),
        "deepspeed": "ds_configs/zero1.json",
        "stages": ["first"],
        "overrides": ["stages.*.steps=6", "stages.*.checkpoint={every_steps: 2, keep: 9, asynchronous: false}"],
    }
    outlived = start_ranks(WORKER, 2, {**request, "wait_at": 3, "signals": str(signals)})
    try:
        wait_until(lambda: len(list(signals.iterdir())) == 2, outlived[0])
        assert newest(run / "first").name == "step_00000002"
        run_ranks(WORKER, 2, request)
        files = [path for path in (run / "first/checkpoints").rglob("*") if path.is_file()]
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
        (signals / "go").touch()
        ended = [finish(process) for process in outlived]
    finally:
        for process in outlived:
            process.kill()
    said = {json.loads(one.stdout.strip().splitlines()[-1])["error"] for one in ended}
    assert len(said) == 1
    assert "belongs to a newer start of this run (2-" in said.pop()
    after = [path for path in (run / "first/checkpoints").rglob("*") if path.is_file()]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in after} == before
    assert newest(run / "first").name == "step_00000006"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By layout, the folder of a run that was trained to `KEPT_AT`; each once."""

    @cache
    def folder_of(layout: str) -> Any:
        folder = tmp_path_factory.mktemp("saved")
        train_to(layout, folder, KEPT_AT)
        return folder

    return folder_of


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_checkpoint_of_any_layout_goes_on_in_any_other(source, target, saved, uninterrupted, tmp_path):
    reports = go_on(saved(source), target, tmp_path)
    first_steps = {key: uninterrupted[key][:ENDS_AT] for key in ("steps", "loss", "grad_norm")}
    for report in reports:
        assert_same_losses(report, first_steps)
    assert samples_of(reports) == uninterrupted["samples"][KEPT_AT:ENDS_AT]


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_stages_each_in_another_layout_are_those_of_one_rank(one_rank, tmp_path):
    for stage, layout in zip(STAGES, ("pipeline x 2", "tensor 2 x ZeRO-3 2", "ZeRO-1 x 2"), strict=True):
        for report in train(layout, tmp_path, SHORT, stages=[stage]):
            assert_same_curve(report[stage], one_rank[stage])
