"""DeepSpeed's launcher over pdsh and ssh, with a real sshd on two nodes that nothing schedules."""

from __future__ import annotations

import os

import pytest

from megadiff.config.run_folder import RunFolder
from tests.ranks import finish, fork_megadiff, start_megadiff
from tests.slurm.cluster import START_S, SlurmRun, curve

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]


def test_a_stage_is_trained_on_two_machines_that_ssh_reaches_as_on_one(run: SlurmRun) -> None:
    ssh = run.slurm.do("ssh").strip()
    run.cluster = {"kind": "deepspeed", "hosts": ["node1", "node2"]}
    steps = ("stages.*.steps=3", "showcase=null")
    launch = start_megadiff(*run.command(*steps), PATH=f"{ssh}:{os.environ['PATH']}")
    ended = finish(launch, 4 * START_S)
    assert ended.returncode == 0, ended.stderr + run.log()
    assert run.folder.hostfile.read_text() == "node1 slots=1\nnode2 slots=1\n"
    logs = [run.first.log(rank).read_text() for rank in (0, 1)]
    assert all("preflight: 2 ranks on node1, node2; " in log for log in logs)
    here = RunFolder(run.place / "here")
    train = ("train", "tests/tiny.yaml", f"folder={here.root}", *steps, "--stage", "first")
    assert fork_megadiff(*train, "--deepspeed", "ds_configs/zero1.json", world=2).returncode == 0
    assert curve(run.first) == curve(here.stage("first"))
