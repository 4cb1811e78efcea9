"""Jobs that queue again: near their time limit, after failures of ranks, and when they no longer do."""

from __future__ import annotations

import time
from random import Random

import pytest

from megadiff.config.run_folder import Incident, RunFolder
from tests.ranks import fork_megadiff
from tests.slurm.cluster import START_S, SlurmRun, curve, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]


def starts(run: SlurmRun) -> list[Incident]:
    """How often ranks have begun to train: from a checkpoint, or anew if they were killed before the first."""
    return [incident for incident in run.incidents() if incident.kind in ("start", "resume")]


def test_slurm_itself_gives_the_word_before_the_time_limit(run: SlurmRun) -> None:
    run.cluster |= {"time_limit_minutes": 2, "stop_before_s": 60}
    job, *_ = run.launch("stages.first.steps=100_000", "stages.first.checkpoint.every_steps=100_000")
    run.wait_for("time limit", timeout_s=150)
    run.wait_for("started", times=2)
    run.wait_for_incident("resume")
    start, stop, resume = run.incidents()[:3]
    assert (start.kind, stop.kind, resume.kind) == ("start", "stop", "resume")
    assert resume.step == stop.step > 0
    assert run.slurm.fields(job)["JobState"] == "RUNNING"


def test_a_rank_that_dies_costs_no_more_than_the_steps_since_the_checkpoint(run: SlurmRun) -> None:
    dies = (
        "if number == 6 and rank == 1 and not os.path.exists('died'): open('died', 'w'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    at = str(run.place / "died")
    few = ("stages.first.steps=8", "stages.first.checkpoint.every_steps=4")
    job, *_ = run.launch(*few, before_step=dies.replace("'died'", repr(at)))
    run.wait_for_end(job)
    assert run.outcomes() == ["started", "failed", "started", "done"]
    assert [incident.step for incident in run.incidents() if incident.kind == "resume"] == [4]


def test_ranks_killed_at_random_moments_cost_no_more_than_the_interval_and_the_curve_is_that_of_an_unbroken_run(
    run: SlurmRun,
) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    random = Random(seed)
    every, steps = 4, 40
    few = (f"stages.first.steps={steps}", f"stages.first.checkpoint.every_steps={every}")
    job, *_ = run.launch(*few, before_step="time.sleep(0.5)")
    reached, lost, took = 0, [], []
    for kill in range(1, 4):
        run.wait_for_step(reached + 1)  # beyond the last one, or the step would count as a bad one
        time.sleep(random.uniform(0, 5))
        rank, at = random.randrange(2), time.time()
        run.slurm.kill_rank(run.slurm.nodes[rank], run.first, rank)
        run.wait_for("failed", times=kill)
        reached = curve(run.first)[-1][0]
        wait_until(lambda kill=kill: len(starts(run)) > kill, START_S, f"{kill} restarts")  # type: ignore[misc]
        restart = starts(run)[-1]
        lost.append(reached - restart.step)
        took.append(round(restart.time - at))
    run.wait_for_end(job, timeout_s=2 * START_S)
    print(f"steps lost: {lost}, seconds until training went on: {took}")
    assert max(lost) <= every + 1  # the step while a checkpoint was written
    whole = RunFolder(run.place / "whole")
    train = ("train", "tests/tiny.yaml", f"folder={whole.root}", *few, "--stage", "first")
    assert fork_megadiff(*train, "--deepspeed", "ds_configs/zero1.json", world=2).returncode == 0
    assert curve(run.first) == curve(whole.stage("first"))


def test_a_step_that_fails_twice_is_not_tried_again_and_later_stages_are_cancelled(run: SlurmRun) -> None:
    few = ("stages.first.steps=8", "stages.first.checkpoint.every_steps=2")
    jobs = run.launch(*few, before_step="if number == 4: raise RuntimeError('a bad batch')", stages=3)
    run.wait_for("stuck", timeout_s=2 * START_S)
    run.wait_for_end(jobs[0], "FAILED")
    assert run.slurm.fields(jobs[0])["ExitCode"] == "3:0"
    run.wait_for_end(jobs[2], "CANCELLED")
    assert run.outcomes() == ["started", "failed", "started", "stuck"]
    print(f"{run.seconds_between(1, 3)} s from the first failure to the end")
    assert "the ranks have failed at step 4 twice in a row" in run.megadiff("logs", str(run.folder.root))
    (suspect,) = [incident for incident in run.incidents() if incident.kind == "suspect"]
    assert suspect.step == 4
    assert all(f"rank {rank}: 0" in suspect.detail for rank in (0, 1))
    first, *later = run.megadiff("status", str(run.folder.root)).splitlines()[2:]
    assert first.split()[:4] == ["first", "stuck", jobs[0], "3/8"]
    assert [line.split()[1:3] for line in later] == [["not", "started"]] * 2


def test_failures_at_changing_steps_end_with_the_last_restart(run: SlurmRun) -> None:
    run.cluster["restarts"] = 1
    few = ("stages.first.steps=8", "stages.first.checkpoint.every_steps=2")
    turn = "int(os.environ.get('SLURM_RESTART_COUNT', 0))"
    job, *_ = run.launch(*few, before_step=f"if number == 4 + {turn}: os._exit(7)")
    run.wait_for("gave up", timeout_s=2 * START_S)
    run.wait_for_end(job, "FAILED")
    assert run.outcomes() == ["started", "failed", "started", "gave up"]
    print(f"{run.seconds_between(1, 3)} s from the first failure to the end")
    assert "no restart is left of 1" in run.megadiff("logs", str(run.folder.root))
