"""A run on four nodes: on two of them once two are lost; one that is not fit is named before anything is built."""

from __future__ import annotations

import time

import pytest

from megadiff.config.run_folder import RunFolder
from tests.ranks import fork_megadiff
from tests.slurm.cluster import START_S, SlurmRun, curve

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]

NODES = 4
TOLERANCE = 1e-4
"""The largest relative deviation of a step on other ranks."""


def test_a_job_on_four_nodes_goes_on_with_two_in_the_same_order_of_samples(run: SlurmRun) -> None:
    run.cluster |= {"nodes": 4, "least_nodes": 2}
    few = ("stages.first.steps=14", "stages.first.checkpoint.every_steps=4", "safeguards.collective_timeout_s=20")
    job, *_ = run.launch(*few, before_step="time.sleep(0.5)")
    run.wait_for_step(6, timeout_s=2 * START_S)
    at = time.time()
    run.slurm.do("kill", "node3")
    run.slurm.do("kill", "node4")
    reached = curve(run.first)[-1][0]
    run.wait_for_end(job, timeout_s=2 * START_S)
    assert run.slurm.fields(job)["NumNodes"] == "2"
    assert [outcome for outcome in run.outcomes() if outcome != "failed"] == ["started", "started", "done"]
    told = [(incident.kind.value, incident.detail) for incident in run.incidents() if incident.kind in ("start", "resume")]
    assert told == [("start", "4 ranks"), ("resume", "2 ranks")]
    (resume,) = [incident for incident in run.incidents() if incident.kind == "resume"]
    assert resume.step >= reached - 5  # the interval, and the step while a checkpoint was written
    print(f"4 -> 2 nodes: {reached - resume.step} steps lost, {resume.time - at:.0f} s until training went on")

    whole = RunFolder(run.place / "whole")
    train = ("train", "tests/tiny.yaml", f"folder={whole.root}", *few, "--stage", "first")
    assert fork_megadiff(*train, "--deepspeed", "ds_configs/zero1.json", world=2).returncode == 0
    for (step, *here), (same, *there) in zip(curve(run.first), curve(whole.stage("first")), strict=True):
        assert step == same
        assert all(abs(a / b - 1) < TOLERANCE for a, b in zip(here, there, strict=True)), step


def test_a_node_without_room_is_named_before_anything_is_built_and_can_be_left_out(run: SlurmRun) -> None:
    local = run.slurm.folder / "scratch"  # a disk of each node's own
    run.cluster |= {"nodes": 2, "cache": str(local)}
    for node in run.slurm.nodes:
        run.slurm.do("exec", node, "mkdir", "-p", str(local))
    run.slurm.do("exec", "node2", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(local))
    try:
        jobs = run.launch("stages.*.steps=2", stages=3)
        run.wait_for_end(jobs[0], "FAILED")
        run.wait_for_end(jobs[2], "CANCELLED")
        assert run.slurm.fields(jobs[0])["ExitCode"] == "2:0"
        assert run.outcomes() == ["started", "mistake"]
        (fault,) = [incident for incident in run.incidents() if incident.kind == "preflight"]
        assert "node2" in fault.detail
        assert "node1 " not in fault.detail
        assert "cluster.exclude=node2" in fault.detail
        assert not run.first.metrics.exists()
        (again, *_) = run.launch("stages.*.steps=2", "cluster.exclude=node2")
        run.wait_for_end(again)
        assert run.outcomes() == ["started", "mistake", "started", "done"]
        assert "node2" not in run.slurm.fields(again)["NodeList"]
    finally:
        run.slurm.do("exec", "node2", "umount", str(local))
