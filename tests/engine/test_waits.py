"""Between a step's first operation and its last, the host does not wait for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("waits_worker.py")
ALLOWED = {
    "statistics.step_result": "reads the step's numbers once, after the optimizer; what follows is of numbers on the host",
    "statistics.step_result.<locals>.<dictcomp>": "of numbers on the host",
    "masked.Masked.readout": "of tokens on the host",
    "objective.ragged_of": "of tokens on the host",
    "rng._as_words": "NumPy, for keys on a CPU alone",
    "deepspeed: utils.is_invalid_grad_norm": "DeepSpeed's own, in ZeRO-1 to 3",
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """By ZeRO stage, the functions that wait in a step of two micro-batches, and how often."""
    request: dict[str, Any] = {"folder": str(tmp_path_factory.mktemp("waits")), "zero": [0, 1, 2, 3]}
    counts: dict[str, dict[str, int]] = run_ranks(WORKER, 1, request)[0]
    return counts


def test_no_function_of_ours_waits_but_those_allowed(seen: dict[str, dict[str, int]]) -> None:
    for counts in seen.values():
        assert counts.keys() <= ALLOWED.keys()


def test_no_function_that_is_allowed_to_wait_no_longer_does(seen: dict[str, dict[str, int]]) -> None:
    assert ALLOWED.keys() == {name for counts in seen.values() for name in counts}
