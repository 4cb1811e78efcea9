"""Ranks that meet, are missing, or differ: one sentence each, at once."""

from __future__ import annotations

from typing import Any

import pytest

from megadiff.distributed.joining import difference
from tests.ranks import ROOT, run_ranks

WORKER = ROOT / "tests" / "distributed" / "joiner.py"


def joined(world: int, **request: Any) -> list[str]:
    return run_ranks(WORKER, world, request)


@pytest.mark.distributed
def test_ranks_that_are_alike_join_and_share_a_group() -> None:
    assert joined(2, facts=[{"code": "a"}, {"code": "a"}]) == ["sum 1", "sum 1"]


@pytest.mark.distributed
def test_a_rank_that_differs_stops_all_with_the_same_sentence() -> None:
    first, second = joined(2, facts=[{"code": "a"}, {"code": "b"}])
    assert first == second
    assert first.startswith("rank 1 differs from rank 0 in its code: b instead of a; start all ranks with")


@pytest.mark.distributed
def test_a_rank_with_another_world_size_is_told_so() -> None:
    first, second = joined(2, facts=[{}, {}], worlds=[2, 3])
    assert first == second
    assert "rank 1 differs from rank 0 in its WORLD_SIZE: 3 instead of 2" in first


@pytest.mark.distributed
def test_a_missing_rank_is_named() -> None:
    for said in joined(2, facts=[{}, {}], worlds=[4, 4], timeout_s=1.0):
        assert said.startswith("ranks 2, 3 of 4 did not join within 1 s; see that all 4 were started")


@pytest.mark.distributed
def test_a_rank_that_finds_no_rank_0_says_where_it_looked() -> None:
    (said,) = joined(1, facts=[{}], worlds=[2], shift=1, timeout_s=1.0)
    assert said.startswith("rank 1 cannot reach rank 0 at MASTER_ADDR 127.0.0.1, MASTER_PORT ")
    assert "\n" not in said


def test_a_fact_that_one_rank_lacks_is_a_difference() -> None:
    assert "in its data: nothing instead of x" in difference(2, {}, {"data": "x"})
    assert difference(2, {"data": "x"}, {"data": "x"}) == ""
