"""The smoke of CI: two nodes, and a job that queues again."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadiff.config.run_folder import RunFolder
from tests.ranks import fork_megadiff
from tests.slurm.cluster import SlurmRun, curve

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]


def test_a_stage_that_is_interrupted_near_its_time_limit_repeats_the_uninterrupted_one_to_the_bit(
    run: SlurmRun, tmp_path: Path
) -> None:
    few = "stages.first.steps=12"
    job, *_ = run.launch(few, before_step="time.sleep(0.5)")
    run.wait_for_step(3)
    run.slurm.command("scancel", "--signal=USR1", "--batch", job)  # as Slurm does before the limit
    run.wait_for("time limit")
    run.wait_for("done")
    assert run.outcomes() == ["started", "time limit", "started", "done"]
    assert run.kinds()[:3] == ["start", "stop", "resume"]
    assert run.slurm.fields(job)["Restarts"] == "1"

    whole = RunFolder(tmp_path / "whole")
    train = (
        "train",
        "tests/tiny.yaml",
        f"folder={whole.root}",
        few,
        "--stage",
        "first",
        "--deepspeed",
        "ds_configs/zero1.json",
    )
    assert fork_megadiff(*train, world=2).returncode == 0
    assert curve(run.first) == curve(whole.stage("first"))
