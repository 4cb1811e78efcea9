"""A run from launch to its end, as a user sees it, and what ends it before."""

from __future__ import annotations

import pytest
from PIL import Image

from megadiff.config.jobs import SubmittedJob
from tests.slurm.cluster import START_S, SlurmRun, curve, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]

STAGES = ("first", "second", "third")


def states(run: SlurmRun) -> list[str]:
    """What `megadiff status` says of each stage."""
    head, *rows = run.megadiff("status", str(run.folder.root)).splitlines()[1:]
    start, end = head.index("state"), head.index("job")
    return [row[start:end].strip() for row in rows]


def test_three_stages_follow_each_other_on_two_nodes(run: SlurmRun) -> None:
    jobs = run.launch("stages.*.steps=3", stages=3)
    wait_until(lambda: states(run)[1:] == ["pending (dependency)"] * 2, START_S, "the dependencies of two jobs")
    run.wait_for_step(1)
    assert states(run)[0] in ("running", "completing", "done")
    for stage, job in zip(STAGES, jobs, strict=True):
        run.wait_for_end(job)
        assert run.outcomes(stage) == ["started", "done"]
        assert [step for step, *_ in curve(run.folder.stage(stage))] == [1, 2, 3]
        assert run.folder.stage(stage).checkpoints.newest() == run.folder.stage(stage).checkpoints.step(3)
    assert states(run) == ["done"] * 3
    assert "third 3/3: loss" in run.megadiff("logs", str(run.folder.root))


@pytest.mark.parametrize("kind", ["slurm", "deepspeed"])
def test_each_node_may_have_several_ranks(run: SlurmRun, kind: str) -> None:
    run.cluster |= {"kind": kind, "processes_per_node": 2}
    job, *_ = run.launch("stages.first.steps=2")
    run.wait_for_end(job, timeout_s=2 * START_S)
    assert run.outcomes() == ["started", "done"]
    log = run.megadiff("logs", str(run.folder.root), "--rank", "3")
    assert "is rank 3 of 4 (local rank 1)" in log


def test_stop_saves_and_ends_a_run_which_goes_on_with_the_next_launch_and_scancel_ends_it_at_once(run: SlurmRun) -> None:
    jobs = run.launch("stages.first.steps=200", before_step="time.sleep(0.5)")
    run.wait_for_step(2)
    assert "in work by jobs" in run.megadiff(*run.command("stages.first.steps=200"), code=2)
    asked = run.megadiff("stop", str(run.folder.root))
    assert asked.splitlines() == [
        f"cancelled jobs {jobs[1]}, {jobs[2]}",
        f"asked job {jobs[0]} to save and end after the step in work",
    ]
    run.wait_for_end(jobs[0], "FAILED")
    assert run.outcomes() == ["started", "stopped"]
    assert states(run) == ["stopped", "not started", "not started"]
    reached = curve(run.first)[-1][0]
    assert run.first.checkpoints.newest() == run.first.checkpoints.step(reached)

    (again, *_) = run.launch("stages.first.steps=200", before_step="time.sleep(0.5)")
    run.wait_for_step(reached + 1)
    assert [incident.step for incident in run.incidents() if incident.kind == "resume"] == [reached]
    run.slurm.command("scancel", again)
    run.wait_for_end(again, "CANCELLED")
    assert states(run)[0] == "ended by Slurm"


def test_what_slurm_could_never_start_is_refused_in_one_sentence(run: SlurmRun) -> None:
    run.cluster["nodes"] = 3
    said = run.megadiff(*run.command("stages.*.batch.global_samples=24", "data.lanes=6"), code=2)
    assert said.startswith("megadiff: error: Slurm refuses the job of first:")
    assert said.count("\n") == 1
    run.cluster["nodes"] = 2
    assert "/proc/run cannot be written" in run.megadiff(*run.command("folder=/proc/run"), code=2)
    assert not SubmittedJob.read(run.folder.jobs)
    assert not run.slurm.command("squeue", "--noheader")


def test_raw_pictures_are_packed_by_all_ranks_of_a_job(run: SlurmRun) -> None:
    for number in range(6):
        picture = run.place / f"raw/{number}.png"
        picture.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(picture)
        picture.with_suffix(".txt").write_text(f"picture {number}")
    packed = run.place / "packed"
    run.wait_for_end(run.launch_verb("data", "pack", str(run.place / "raw"), str(packed), "--shard-samples", "2"))
    assert "3 shards, 6 samples" in run.megadiff("data", "verify", str(packed))
