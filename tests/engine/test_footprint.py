"""What ranks hold and send is what config/footprint.py says."""

from __future__ import annotations

import pytest

from benchmarks.layouts import CASES, OVERRIDES, STATISTICS, Case, compare, misses
from megadiff.config.load import load_run
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed
QUICK = [case for case in CASES if case.name in ("ZeRO-1 x 2", "ZeRO-3 x 2", "pipeline x 2", "tensor x 2")]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_bytes_held_and_sent_are_within_five_percent_of_the_formulas(case: Case) -> None:
    request = {"run": "tests/tiny.yaml", "overrides": OVERRIDES, "stages": ["third"], "steps": 2}
    counts = compare(case, load_run("tests/tiny.yaml", OVERRIDES), request, run_ranks)["third"]
    assert not misses(counts["held"])
    assert not misses(counts["sent"], STATISTICS)
    assert all(rank["weights"]["counted"] and rank["activations"]["counted"] for rank in counts["held"])
    assert all(sum(pair["counted"] for pair in rank.values()) > 2 * STATISTICS for rank in counts["sent"])
