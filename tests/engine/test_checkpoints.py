"""Checkpoints of one layout go on in another, with the curve and the samples of one that was never interrupted."""

from __future__ import annotations

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
    assert_same_curve,
    go_on,
    newest,
    samples_of,
    train,
    train_to,
)

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
        assert_same_curve(report, first_steps)
    assert samples_of(reports) == uninterrupted["samples"][KEPT_AT:ENDS_AT]


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_stages_each_in_another_layout_are_those_of_one_rank(one_rank, tmp_path):
    for stage, layout in zip(STAGES, ("pipeline x 2", "tensor 2 x ZeRO-3 2", "ZeRO-1 x 2"), strict=True):
        for report in train(layout, tmp_path, SHORT, stages=[stage]):
            assert_same_curve(report[stage], one_rank[stage])
