"""What findings of ranks mean, without ranks."""

from __future__ import annotations

from typing import Any

from megadiff.config.schema import Preflight
from megadiff.distributed.verdict import Findings, Verdict, judge

NODES = ["a", "a", "b", "b", "c", "c", "d", "d"]
"""Four nodes of two ranks."""
RING = {"a": "bd", "b": "ac", "c": "bd", "d": "ca"}


def verdict(changes: dict[int, dict[str, Any]] | None = None, missing: int = -1, slurm: bool = True, **rules: Any) -> Verdict:
    """Of NODES, whose ranks have found what a rank finds on sound nodes, but for some."""
    sound = {
        rank: {"clock_s": 1000.0 + rank / 1e3, "bandwidths": dict.fromkeys(RING[node], 100e9)}
        for rank, node in enumerate(NODES)
    }
    findings = {
        rank: Findings(**{**own, **(changes or {}).get(rank, {})})  # type: ignore[arg-type]
        for rank, own in sound.items()
        if rank != missing
    }
    return judge(NODES, findings, Preflight(**rules), slurm=slurm)


def speeds(of: dict[str, float]) -> dict[int, dict[str, Any]]:
    """Nodes with a bandwidth of their own: a pair is as slow as its slower node."""
    own = {node: of.get(node, 100e9) for node in "abcd"}
    return {
        rank: {"bandwidths": {other: min(own[node], own[other]) for other in RING[node]}} for rank, node in enumerate(NODES)
    }


def test_sound_nodes_have_a_summary_and_nothing_else():
    assert verdict() == Verdict("", "", "8 ranks on a, b, c, d; all-reduce 100 GB/s in the median, 100 GB/s on a")


def test_a_rank_without_an_answer_is_named_with_its_node():
    assert verdict(missing=5).faults.startswith("c has no answer from rank 5; see their logs. Without c: launch with ")


def test_a_slow_node_is_slow_with_both_neighbours_and_they_are_not():
    found = verdict(speeds({"c": 40e9}))
    assert found.faults == ""
    assert found.notes.startswith("c is slow: its all-reduce has 40 GB/s, and the median is 100 GB/s. Without c: ")
    assert verdict(speeds({"c": 60e9})).notes == ""
    assert verdict(speeds({"c": 60e9}), slow_below=0.7).notes.startswith("c is slow")
    refused = verdict(speeds({"c": 40e9}), slow_nodes="refuse")
    assert (refused.notes, refused.faults) == ("", found.notes)


def test_two_nodes_are_not_called_slow_as_neither_can_be():
    ranks = {0: Findings(0.0, bandwidths={"b": 1e6}), 1: Findings(0.0, bandwidths={"a": 1e6})}
    found = judge(["a", "b"], ranks, Preflight(), slurm=True)
    assert (found.faults, found.notes) == ("", "")
    assert found.summary == "2 ranks on a, b; all-reduce 0.001 GB/s in the median, 0.001 GB/s on a"


def test_a_node_without_an_end_is_named_once_although_the_sum_has_none_either():
    changes = speeds({"b": 0.0})
    for own in changes.values():
        own["wrong"] = None
    said = verdict(changes).faults
    assert said.startswith("b got no all-reduce with its neighbours to its end; ")
    assert "over all ranks" not in said


def test_a_sum_alone_without_an_end_is_said_of_all():
    said = verdict({rank: {"wrong": None} for rank in range(8)}).faults
    assert said == "a, b, c, d got no all-reduce over all ranks to its end; see its network and its ranks' logs"


def test_a_number_that_is_wrong_everywhere_was_sent_so_and_else_received_so():
    everywhere = {rank: {"wrong": {"6": 0.5}} for rank in range(8)}
    assert verdict(everywhere).faults.startswith("d sends wrong numbers in an all-reduce (rank 6); take it out of service. ")
    assert verdict({3: {"wrong": {"0": 0.5, "7": 1.0}}}).faults.startswith("b gets wrong sums from an all-reduce (rank 3); ")
    both = {rank: {"wrong": {"6": 0.5, **({"0": 9.0} if rank == 3 else {})}} for rank in range(8)}
    said = verdict(both).faults
    assert "d sends wrong numbers in an all-reduce (rank 6)" in said
    assert "b gets wrong sums from an all-reduce (rank 3)" in said


def test_clocks_are_compared_with_the_middle_one_and_of_two_with_the_first():
    assert verdict({0: {"clock_s": 2000.0}}).faults.startswith("a has a clock 1000.0 s ahead of the others; have it set ")
    assert verdict({0: {"clock_s": 1004.0}}).faults == ""
    assert verdict({0: {"clock_s": 1004.0}}, clock_s=1).faults.startswith("a has a clock 4.0 s ahead of the others")
    two = judge(["a", "b"], {0: Findings(10.0), 1: Findings(0.0)}, Preflight(), slurm=True)
    assert two.faults.startswith("b has a clock 10.0 s behind the others")


def test_a_version_that_fewest_nodes_have_is_the_odd_one():
    versions = [{"versions": {"driver": "1" if node == "a" else "2"}} for node in NODES]
    said = verdict(dict(enumerate(versions))).faults
    assert said.startswith("a has driver 1, and others 2; all nodes must have the same. Without a: ")
    said = verdict({rank: {"versions": {"driver": "2"}} for rank in range(6)}).faults
    assert said.startswith("d has driver none, and others 2")


def test_the_same_fault_on_several_nodes_is_one_sentence_and_on_all_nodes_none_is_left_out():
    fault = {"faults": ["cannot read data.train: it is not there"]}
    some = verdict({0: fault, 4: fault}, slurm=False).faults
    assert some == ("a, c cannot read data.train: it is not there. Without a, c: name only the others under hosts")
    assert verdict(dict.fromkeys((0, 2, 4, 6), fault)).faults == "a, b, c, d cannot read data.train: it is not there"
