"""Nodes, network and controller that fail under a run."""

from __future__ import annotations

import time

import pytest

from tests.slurm.cluster import NODE_LOSS_S, SlurmRun, curve, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]

SLOWLY = "time.sleep(0.5)"
FEW = ("stages.first.checkpoint.every_steps=4", "safeguards.collective_timeout_s=20")


@pytest.mark.parametrize(
    ("fault", "cure", "steps"),
    [
        ("kill node2", "boot node2", 20),
        ("kill node1", "boot node1", 20),
        ("stopd node2", "boot node2", 90),  # ranks train on until Slurm notices it
        ("unplug node2", "plug node2", 20),
    ],
)
def test_a_node_that_is_lost_costs_the_steps_since_the_checkpoint(run: SlurmRun, fault: str, cure: str, steps: int) -> None:
    job, *_ = run.launch(f"stages.first.steps={steps}", *FEW, before_step=SLOWLY)
    run.wait_for_step(6)
    run.slurm.do(*fault.split())
    at = time.time()
    wait_until(lambda: run.slurm.state(job) == "PENDING", NODE_LOSS_S, "the requeue")
    reached = curve(run.first)[-1][0]
    run.slurm.do(*cure.split())
    run.wait_for_end(job)
    # The job's script may see its ranks fail before Slurm sees the node lost.
    assert [outcome for outcome in run.outcomes() if outcome != "failed"] == ["started", "started", "done"]
    (resume,) = [incident for incident in run.incidents() if incident.kind == "resume"]
    assert reached - 4 <= resume.step <= reached
    assert [step for step, *_ in curve(run.first)] == list(range(1, steps + 1))
    print(f"{fault}: {reached - resume.step} steps lost, {resume.time - at:.0f} s until training went on")


def test_a_job_that_may_be_smaller_goes_on_without_the_lost_node(run: SlurmRun) -> None:
    run.cluster |= {"least_nodes": 1}
    job, *_ = run.launch("stages.first.steps=20", *FEW, before_step=SLOWLY)
    run.wait_for_step(6)
    at = time.time()
    run.slurm.do("kill", "node2")
    run.wait_for_end(job)
    assert run.slurm.fields(job)["NumNodes"] == "1"
    assert run.outcomes() == ["started", "started", "done"]
    (resume,) = [incident for incident in run.incidents() if incident.kind == "resume"]
    assert resume.detail == "1 ranks"
    assert [step for step, *_ in curve(run.first)] == list(range(1, 21))
    print(f"{resume.time - at:.0f} s until training went on")


def test_ranks_that_outlive_their_job_publish_nothing_over_the_new_one(run: SlurmRun) -> None:
    run.cluster |= {"nodes": 1, "processes_per_node": 2}
    slower_at_first = "time.sleep(0.5 if os.environ.get('SLURM_RESTART_COUNT') else 4)"
    job, *_ = run.launch("stages.first.steps=40", *FEW, before_step=slower_at_first)
    run.wait_for_step(2)
    node = run.slurm.fields(job)["NodeList"]
    run.slurm.do("unplug", node)
    run.wait_for("started", times=2)
    assert run.slurm.fields(job)["NodeList"] != node
    refusal = "belongs to a newer start of this run"
    wait_until(lambda: refusal in run.first.log(0).read_text(), NODE_LOSS_S, "the refusal")
    run.wait_for_end(job)
    assert run.outcomes() == ["started", "started", "done"]
    assert {step for step, *_ in curve(run.first)} == set(range(1, 41))


def test_a_run_goes_on_without_the_controller(run: SlurmRun) -> None:
    job, *_ = run.launch("stages.first.steps=30", *FEW, before_step=SLOWLY)
    run.wait_for_step(2)
    run.slurm.do("ctl", "stop")
    status = run.megadiff("status", str(run.folder.root))
    assert "unknown (squeue failed)" in status
    assert "squeue failed" in run.megadiff("stop", str(run.folder.root), code=2)
    run.wait_for("done")
    run.slurm.do("ctl", "start")
    run.wait_for_end(job)
    assert run.outcomes() == ["started", "done"]
