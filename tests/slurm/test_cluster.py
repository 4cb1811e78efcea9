"""The cluster of these tests behaves as a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import NODE_LOSS_S, MiniSlurm, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]


def submit(slurm: MiniSlurm, text: str, *options: str) -> str:
    """The number of a job that runs a line of shell."""
    return slurm.command("sbatch", "--parsable", *options, "--wrap", text).strip()


def wait_for(slurm: MiniSlurm, job: str, state: str, timeout_s: float = 30) -> None:
    wait_until(lambda: slurm.state(job) == state, timeout_s, f"{state} of job {job}")


def test_nodes_have_names_and_addresses_of_their_own(slurm: MiniSlurm) -> None:
    assert sorted(slurm.command("srun", "--nodes=2", "hostname").split()) == slurm.nodes
    assert sorted(slurm.command("srun", "--nodes=2", "hostname", "-I").split()) == ["10.231.77.1", "10.231.77.2"]
    assert "10.231.77.1" in slurm.command("srun", "--nodelist=node2", "getent", "ahosts", "node1")


def test_tasks_see_the_gpus_of_their_node_and_a_job_ends_as_its_script(slurm: MiniSlurm, tmp_path: Path) -> None:
    text = "srun bash -c '[ \"$CUDA_VISIBLE_DEVICES\" = 0,1,2,3 ]' || exit 2; exit 9"
    job = submit(slurm, text, "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", f"--output={tmp_path}/log")
    wait_for(slurm, job, "FAILED")
    assert slurm.fields(job)["ExitCode"] == "9:0"


def test_a_job_that_waits_for_success_is_cancelled_by_a_failure(slurm: MiniSlurm) -> None:
    quiet = "--output=/dev/null"
    failing = submit(slurm, "exit 3", quiet)
    waiting = submit(slurm, "true", quiet, f"--dependency=afterok:{failing}", "--kill-on-invalid-dep=yes")
    wait_for(slurm, waiting, "CANCELLED")


def test_a_job_starts_again_when_asked_and_after_a_power_cut(slurm: MiniSlurm, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    text = "echo turn ${SLURM_RESTART_COUNT:-0}; srun sleep 300"
    job = submit(slurm, text, "--nodes=2", "--ntasks-per-node=1", "--requeue", "--open-mode=append", f"--output={log}")
    wait_until(lambda: "turn 0" in log.read_text(), 30, "the first turn")
    slurm.command("scontrol", "requeue", job)
    wait_until(lambda: "turn 1" in log.read_text(), 60, "the second turn")
    slurm.do("kill", "node2")
    slurm.do("boot", "node2")
    wait_until(lambda: "turn 2" in log.read_text(), NODE_LOSS_S, "the third turn")
