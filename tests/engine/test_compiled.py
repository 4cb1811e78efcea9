"""Training with compiled blocks (Inductor) follows the curve of the run without, in every kind of layout that supports them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.layouts import (
    HELD_OUT,
    ONE_RANK,
    SHORT,
    STAGES,
    TIMEOUT_S,
    assert_same_curve,
    assert_same_held_out,
    train,
    train_plainly,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(TIMEOUT_S)]

COMPILED = (SHORT, HELD_OUT, "stages.*.compile=true")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_plainly(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("layout", [ONE_RANK, "ZeRO-1 x 2", "ZeRO-2 x 2", "ZeRO-3 x 2", "pipeline x 2"])
def test_compiled_blocks_follow_the_same_curve(layout: str, reference: dict[str, Any], tmp_path: Path) -> None:
    for report in train(layout, tmp_path, *COMPILED):
        for stage in STAGES:
            assert_same_curve(report[stage], reference[stage])
            assert_same_held_out(report, reference, stage)
