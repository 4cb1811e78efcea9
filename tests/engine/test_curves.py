"""One run in every layout that ships: 30 steps of each stage follow one rank's curve."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.layouts import (
    CLIP,
    HELD_OUT,
    LAYOUTS,
    ONE_RANK,
    STAGES,
    TIMEOUT_S,
    assert_idle_weights_stay,
    assert_same_curve,
    assert_same_held_out,
    train,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(TIMEOUT_S)]

STEPS = ("stages.*.steps=30", HELD_OUT)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(ONE_RANK, tmp_path_factory.mktemp("reference"), *STEPS)[0]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != ONE_RANK])
def test_a_layout_follows_the_curve_of_one_rank_in_all_stages(layout, reference, tmp_path):
    for report in train(layout, tmp_path, *STEPS):
        for stage in STAGES:
            assert_same_curve(report[stage], reference[stage])
            assert_same_held_out(report, reference, stage)
    assert_idle_weights_stay(tmp_path)


def test_every_step_is_clipped(reference):
    assert all(min(reference[stage]["grad_norm"]) > CLIP for stage in STAGES)
