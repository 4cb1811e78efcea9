"""Ranks on two nodes and more, one of which is not as it should be: a sentence with its name on all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megadiff.distributed.preflight import rounds
from tests.ranks import ROOT, run_ranks

WORKER = ROOT / "tests" / "distributed" / "examiner.py"
FAULT = "PreflightError: preflight: "
WITHOUT_NODE1 = ". Without node1: launch with cluster.exclude=node1 (sbatch's --exclude)"


def examined(folder: Path, *ranks: dict[str, Any], at_most_s: float = 60.0, rules: tuple[str, ...] = ()) -> dict[str, Any]:
    """What all ranks say, which is the same."""
    overrides = [f"folder={folder}", f"preflight.at_most_s={at_most_s}", *rules]
    reports = run_ranks(WORKER, len(ranks), {"ranks": ranks, "overrides": overrides})
    assert len({(one["fault"], one["note"]) for one in reports}) == 1, reports
    assert max(one["seconds"] for one in reports) < at_most_s + 15
    assert "\n" not in reports[0]["fault"]
    return dict(reports[0])


@pytest.mark.distributed
def test_nodes_that_are_as_they_should_be_pass(tmp_path: Path) -> None:
    report = examined(tmp_path, {}, {})
    assert (report["fault"], report["note"]) == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
def test_all_that_is_wrong_with_a_node_is_said_at_once(tmp_path: Path) -> None:
    faulty = {"driver": "535.1", "ahead_s": -100.0, "free": 2**20, "store": "forbidden", "network": "gets wrong"}
    said = examined(tmp_path, {}, faulty)["fault"]
    assert said.startswith(FAULT)
    assert said.endswith(WITHOUT_NODE1)
    for part in (
        "node1 gets no data.train: s3://bucket/manifest.json may not be read or written with the credentials at hand",
        f"node1 has 0.00 GiB left in {tmp_path}, and needs 1.00; make room",
        "node1 has NVIDIA driver 535.1, and others 550.54; all nodes must have the same",
        " s behind the others; have it set (preflight.clock_s: 5)",
        "node1 gets wrong sums from an all-reduce (rank 1)",
    ):
        assert part in said
    assert "node1 has a clock 100." in said or "node1 has a clock 99." in said
    assert "node0" not in said


@pytest.mark.distributed
def test_a_wrong_number_is_traced_to_the_rank_that_sent_it(tmp_path: Path) -> None:
    said = examined(tmp_path, {}, {"network": "sends wrong"})["fault"]
    assert said == f"{FAULT}node1 sends wrong numbers in an all-reduce (rank 1); take it out of service{WITHOUT_NODE1}"


@pytest.mark.distributed
def test_a_store_that_gives_no_answer_is_waited_for_no_longer_than_allowed(tmp_path: Path) -> None:
    said = examined(tmp_path, {}, {"store": "silent"}, at_most_s=5.0)["fault"]
    assert said == f"{FAULT}node1 has not got an answer in time from data.train; see that it can be reached{WITHOUT_NODE1}"


@pytest.mark.distributed
def test_a_node_that_its_neighbours_cannot_reach_is_named_and_they_are_not(tmp_path: Path) -> None:
    said = examined(tmp_path, {}, {"network": "silent"}, {}, at_most_s=6.0)["fault"]
    assert said.startswith(f"{FAULT}node1 got no all-reduce with its neighbours to its end; see its network")
    assert said.endswith(WITHOUT_NODE1)
    assert not {"node0", "node2"} & set(said.split())


@pytest.mark.distributed
def test_a_slow_node_is_reported(tmp_path: Path) -> None:
    report = examined(tmp_path, {}, {"network": "slow"}, {})
    assert report["fault"] == ""
    assert report["note"].startswith("node1 is slow: its all-reduce has 0.0")
    assert report["note"].endswith(WITHOUT_NODE1)


@pytest.mark.distributed
def test_other_packages_on_another_node_are_told_with_its_name(tmp_path: Path) -> None:
    said = examined(tmp_path, {"facts": {"torch": "2.13"}}, {"facts": {"torch": "2.12"}})["fault"]
    assert said.startswith("UserError: rank 1 on node1 differs from rank 0 in its torch: 2.12 instead of 2.13; ")


def test_every_node_meets_both_of_its_neighbours_and_one_at_a_time() -> None:
    for count in range(3, 9):
        nodes = [f"node{place // 2}" for place in range(2 * count)]
        turns = rounds(nodes)
        pairs = [frozenset(pair) for turn in turns for pair in turn]
        assert len(pairs) == len(set(pairs)) == count
        assert all(sum(f"node{place}" in pair for pair in pairs) == 2 for place in range(count))
        assert all(len({node for pair in turn for node in pair}) == 2 * len(turn) for turn in turns)
    assert rounds(["a", "b"]) == [[("a", "b")]]
    assert rounds(["a", "a"]) == [[("a",)]]
