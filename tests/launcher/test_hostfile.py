"""DeepSpeed's launcher over several machines, which are names of this one here; pdsh, ssh and srun are stand-ins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadiff.config.errors import UserError
from megadiff.config.run_folder import SubmissionFolder
from megadiff.config.schema import DeepSpeedCluster
from megadiff.launcher import hostfile, slurm
from megadiff.launcher.slurm import Job

ROOT = Path(__file__).parents[2]
PDSH = """
shift 3  # -S -f FAN_OUT
IFS=, read -ra hosts <<< "$2"
shift 2
number=0
for host in "${hosts[@]}"; do bash -c "${*//%n/$number}" & number=$((number + 1)); done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit "$code"
"""
SRUN = """
while [ "${1:0:2}" = -- ]; do shift; done
SLURM_NODEID=1 "$@" &
SLURM_NODEID=0 "$@"
code=$?
wait $! || code=$?
exit "$code"
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the stand-ins."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scontrol = '[ "$1" = show ] && printf "node1\\nnode2\\n"'
    for name, text in {"pdsh": PDSH, "ssh": "exit 0", "srun": SRUN, "scontrol": scontrol}.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    for name, value in {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    return folder


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_a_hostfile_is_read_by_deepspeed(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    hostfile.write(tmp_path / "hosts", ["node2", "node1"], 8)
    assert list(fetch_hostfile(str(tmp_path / "hosts")).items()) == [("node2", 8), ("node1", 8)]


def test_a_hostfile_that_cannot_be_written_is_said() -> None:
    with pytest.raises(UserError, match="/proc/hosts cannot be written"):
        hostfile.write(Path("/proc/hosts"), ["node1"], 1)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_verb_runs_as_a_rank_on_each_machine_that_ssh_reaches(tmp_path: Path, commands: Path) -> None:
    hosts = ("127.0.0.1", "localhost")
    cluster = DeepSpeedCluster(hosts=hosts, environment={"NOTE": "two words"})
    hostfile.write(tmp_path / "hosts", hosts, 1)
    ended = run(hostfile.verb_command(["data", "verify", str(tmp_path)], cluster, tmp_path / "hosts", 29511))
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("manifest.json cannot be read") == 2
    assert "'NOTE=two words'" in ended.stdout + ended.stderr


@pytest.mark.distributed
def test_a_job_runs_the_launcher_once_on_each_node_of_an_allocation(
    tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submission = SubmissionFolder(tmp_path / "submission")
    submission.root.mkdir()
    job = Job("data", ["data", "verify", str(tmp_path)], ROOT, submission, {"DS_ACCELERATOR": "cpu"}, [2])
    submission.script("data").write_text(slurm.script(DeepSpeedCluster(nodes=2, python=sys.executable), job, "megadiff"))
    for name, value in {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[1-2]"}.items():
        monkeypatch.setenv(name, value)
    ended = run(["bash", str(submission.script("data"))])
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("megadiff: error: ")
    assert ended.stderr.count("manifest.json cannot be read") == 1
    assert submission.hostfile("data").read_text() == hostfile.text(["node1", "node2"], 1)
