"""Every way to share the work, over two nodes, trains the same run, whose samples a job draws."""

from __future__ import annotations

import pytest

from megadiff.config.run_folder import RunFolder
from tests.ranks import ROOT, fork_megadiff
from tests.slurm.cluster import SlurmRun, curve

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]


@pytest.mark.parametrize("deepspeed", ["zero3", "pipeline"])
def test_two_nodes_train_as_two_ranks_of_one_machine(run: SlurmRun, deepspeed: str) -> None:
    steps = "stages.first.steps=3"
    job, *_ = run.launch(steps, deepspeed=deepspeed)
    run.wait_for_end(job)
    here = RunFolder(run.place / "here")
    train = ("train", "tests/tiny.yaml", f"folder={here.root}", steps, "--stage", "first")
    assert fork_megadiff(*train, "--deepspeed", f"ds_configs/{deepspeed}.json", world=2).returncode == 0
    assert curve(run.first) == curve(here.stage("first"))


def test_samples_are_drawn_by_all_ranks_of_a_job(run: SlurmRun) -> None:
    job, *_ = run.launch("stages.first.steps=1")
    run.wait_for_end(job)
    (run.place / "examples").symlink_to(ROOT / "examples")  # whose tokenizer the checkpoint names
    samples = run.place / "samples"
    draw = ("--task", "text-to-image", "--steps", "2", "-n", "4", "--prompt", "a cat", "--out", str(samples))
    run.wait_for_end(run.launch_verb("sample", "--checkpoint", str(run.folder.root), *draw))
    assert len([*samples.rglob("*.png")]) >= 4
