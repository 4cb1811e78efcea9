"""The script of a job, as text and as bash runs it: srun and scontrol are stand-ins here."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megadiff.config.jobs import Attempt
from megadiff.config.run_folder import RunFolder
from megadiff.config.schema import DeepSpeedCluster, SlurmCluster
from megadiff.launcher import slurm
from megadiff.launcher.slurm import Job, Slurm

GOLDEN = Path(__file__).parent / "golden"
LARGE = {
    "nodes": 2,
    "gpus_per_node": 8,
    "cpus_per_process": 12,
    "time_limit_minutes": 240,
    "stop_before_s": 300,
    "restarts": 3,
    "partition": "gpu",
    "account": "group",
    "exclude": "node[3-5]",
    "options": ["--mem=0", "--comment=two words"],
    "modules": ["cuda/12.8"],
    "container": ["apptainer", "exec", "--nv", "it's.sif"],
    "python": "python3",
    "cache": "/local disk/cache",
}


def job(run: RunFolder, node_counts: Sequence[int], *, stage: bool = True) -> Job:
    submission = run.submission(1)
    train = ["train", str(submission.config), "--stage", "first", "--deepspeed", str(submission.deepspeed)]
    environment = {"OMP_NUM_THREADS": "12", "NCCL_IB_HCA": "mlx5_0,mlx5_1"}
    if not stage:
        return Job("samples", ["showcase", "a run.yaml"], Path("/home/me"), submission, environment, node_counts)
    return Job("first", train, Path("/home/me/my work"), submission, environment, node_counts, run.stage("first"))


@pytest.mark.parametrize(
    ("name", "cluster", "stage", "node_counts"),
    [
        ("slurm_gpus", SlurmCluster(**LARGE), True, [2]),
        ("slurm_cpus", SlurmCluster(nodes=2, processes_per_node=2, python="python3"), True, [2]),
        ("slurm_verb", SlurmCluster(python="python3"), False, [1]),
        ("deepspeed_gpus", DeepSpeedCluster(**LARGE), True, [2]),
        ("slurm_elastic", SlurmCluster(nodes=8, least_nodes=2, python="python3"), True, [8, 4, 2]),
        ("deepspeed_elastic", DeepSpeedCluster(nodes=8, least_nodes=2, python="python3"), True, [8, 4, 2]),
    ],
)
def test_the_script_is_this(name: str, cluster: Slurm, stage: bool, node_counts: Sequence[int]) -> None:
    text = slurm.script(cluster, job(RunFolder(Path("/shared/100%/runs/minimal")), node_counts, stage=stage), "minimal")
    golden = GOLDEN / f"{name}.sh"
    if os.environ.get("MEGADIFF_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_chain_waits_for_success_and_ends_with_a_failure() -> None:
    assert slurm.submission(Path("a.sh")) == ["sbatch", "--parsable", "a.sh"]
    assert slurm.submission(Path("b.sh"), "7")[2:] == ["--dependency=afterok:7", "--kill-on-invalid-dep=yes", "b.sh"]


class Node:
    """Where a job's script runs: `srun` runs `ranks`, `scontrol requeue` ends the script as Slurm does."""

    def __init__(self, folder: Path, cluster: Slurm, *, stage: bool = True, counts: Sequence[int] = (1,)) -> None:
        self.run = RunFolder(folder / "it's a run")
        self.stage = self.run.stage("first")
        self.requeued = folder / "requeued"
        for path in (folder / "bin", self.stage.logs, self.run.submission(1).root):
            path.mkdir(parents=True)
        requeue = f'[ "$1" = requeue ] && {{ echo "$2" >> {self.requeued}; kill -TERM $PPID; }}'
        self._command(folder, "scontrol", f'[ "$1" = show ] && printf "node1\\nnode2\\n"\n{requeue}')
        self.folder, self.cluster = folder, cluster
        self.job = Job(
            "first" if stage else "verb", ["train"], folder, self.run.submission(1), {}, counts, self.stage if stage else None
        )
        self.script = folder / "job.sh"
        self.script.write_text(slurm.script(cluster, self.job, "minimal"))

    def start(self, ranks: str, nodes: int = 1) -> subprocess.Popen[str]:
        self._command(self.folder, "srun", f"cd {shlex.quote(str(self.stage.root))}\n{ranks}")
        environment = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_NNODES": str(nodes)}
        return subprocess.Popen(
            ["bash", str(self.script)],
            env={**os.environ, **environment, "PATH": f"{self.folder}/bin:{os.environ['PATH']}"},
            stderr=subprocess.PIPE,
            text=True,
        )

    def ends(self, ranks: str, nodes: int = 1) -> tuple[int, str]:
        """Exit code and standard error of the script."""
        process = self.start(ranks, nodes)
        _, err = process.communicate(timeout=30)
        return process.returncode, err

    def outcomes(self) -> list[str]:
        return [attempt.outcome.value for attempt in Attempt.read(self.stage.attempts)]

    @staticmethod
    def _command(folder: Path, name: str, text: str) -> None:
        path = folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path, SlurmCluster(restarts=1, python="python3"))


REQUEUED = -signal.SIGTERM


def test_a_whole_stage_ends_with_0_and_is_not_trained_again(node: Node) -> None:
    assert node.ends("touch DONE") == (0, "")
    assert node.outcomes() == ["started", "done"]
    assert node.ends("exit 9") == (0, "")
    assert not node.requeued.exists()


def test_ranks_get_their_place_from_slurm(node: Node) -> None:
    task = 'export SLURM_PROCID=3 SLURM_LOCALID=1; shift 6; "$1" "$2" "$3" task env > env; touch DONE'
    assert node.ends(task)[0] == 0
    variables = dict(line.split("=", 1) for line in (node.stage.root / "env").read_text().splitlines() if "=" in line)
    assert [variables[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "2", "1"]
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("node1", "20041")
    assert variables["MEGADIFF_ERROR_FILE"] == f"{node.stage.error}.41.0"
    assert variables["PYTHONPATH"].split(":")[0] == str(node.run.submission(1).code)


@pytest.mark.parametrize(("allocated", "used"), [(8, 8), (7, 4), (4, 4), (3, 2), (2, 2)])
def test_a_job_uses_as_many_of_its_nodes_as_divide_the_batch(allocated: int, used: int, tmp_path: Path) -> None:
    node = Node(tmp_path, SlurmCluster(nodes=8, least_nodes=2, processes_per_node=4, python="python3"), counts=[8, 4, 2])
    assert node.ends('echo "$1 $2 $3" > size; touch DONE', allocated) == (0, "")
    assert (node.stage.root / "size").read_text() == f"--nodes={used} --ntasks={4 * used} --ntasks-per-node=4\n"


def test_before_the_time_limit_ranks_are_told_to_save_and_the_job_queues_again(node: Node) -> None:
    process = node.start("touch ready; while [ ! -e ../STOP ]; do sleep 0.05; done; rm ../STOP")
    wait_for(node.stage.root / "ready")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == REQUEUED
    assert node.requeued.read_text() == "41\n"
    assert node.outcomes() == ["started", "time limit"]
    assert node.ends("touch DONE")[0] == 0


def test_time_limits_use_up_no_restarts(node: Node) -> None:
    turn = "".join(f"{Attempt.FORM}\n" % (0, "41", outcome, 0) for outcome in ("started", "time limit"))
    node.stage.attempts.write_text(4 * turn)
    assert node.ends("touch DONE")[0] == 0


def test_failures_are_tried_again_until_no_restart_is_left(node: Node) -> None:
    assert node.ends("exit 143")[0] == REQUEUED
    code, err = node.ends("exit 7")
    assert (code, node.outcomes()) == (1, ["started", "failed", "started", "gave up"])
    assert "no restart is left of 1" in err
    assert node.requeued.read_text() == "41\n"


def test_failures_at_the_same_step_in_a_row_are_not_tried_a_third_time(tmp_path: Path) -> None:
    node = Node(tmp_path, SlurmCluster(restarts=9, python="python3"))
    beat = 'mkdir -p heartbeats; echo \'{"step": %d, "phase": "step", "time": 0.5}\' > heartbeats/rank_%d.json; '
    seventh = beat % (7, 0) + beat % (6, 1) + "exit 5"
    for ranks in ("exit 5", "exit 5", seventh, beat % (8, 0) + "exit 5", seventh):  # without a heartbeat no step is known
        assert node.ends(f'echo "$MEGADIFF_FAILED_AT" >> failed_at; {ranks}')[0] == REQUEUED
    code, err = node.ends(seventh)
    assert (node.stage.root / "failed_at").read_text().split() == ["0", "0", "0", "7", "8"]
    assert (code, node.outcomes()[-1]) == (3, "stuck")
    assert "failed at step 7 twice in a row" in err


def test_a_turn_that_has_outlived_its_node_leaves_the_job_to_the_newer_turn(node: Node) -> None:
    started = Attempt.FORM % (0, "41", "started", 0)
    code, err = node.ends(f"echo {shlex.quote(started)} >> attempts.jsonl; touch ../STOP; exit 143")
    assert (code, node.outcomes()) == (1, ["started", "started"])
    assert "job 41 has started again" in err
    assert node.run.stop.exists()
    assert not node.requeued.exists()


def test_attempts_that_slurm_cut_off_count_as_failures(node: Node) -> None:
    node.stage.attempts.write_text(f"{Attempt.FORM}\n" % (0, "41", "started", 0) * 2)
    assert node.ends("touch DONE")[0] == 1
    assert node.outcomes()[-1] == "gave up"


def test_attempts_of_other_jobs_do_not_count(node: Node) -> None:
    node.stage.attempts.write_text(f"{Attempt.FORM}\n" % (0, "40", "started", 0) * 5)
    assert node.ends("exit 1")[0] == REQUEUED


def test_a_users_mistake_is_said_once_and_not_tried_again(node: Node) -> None:
    code, err = node.ends('echo "shard x is damaged" > "$MEGADIFF_ERROR_FILE"; exit 143')
    assert (code, err) == (2, "megadiff: error: shard x is damaged\n")
    assert node.outcomes() == ["started", "mistake"]
    assert not node.requeued.exists()


def test_a_stop_by_the_user_is_neither_a_success_nor_tried_again(node: Node) -> None:
    process = node.start("touch ready; while [ ! -e ../STOP ]; do sleep 0.05; done")
    wait_for(node.stage.root / "ready")
    node.run.stop.touch()
    process.communicate(timeout=30)
    assert (process.returncode, node.outcomes()) == (1, ["started", "stopped"])
    assert not node.run.stop.exists()
    assert not node.requeued.exists()


def test_a_stop_that_comes_before_the_job_keeps_the_ranks_from_starting(node: Node) -> None:
    node.run.stop.touch()
    assert node.ends("touch DONE")[0] == 1
    assert node.outcomes() == ["stopped"]
    assert not node.stage.done.exists()


def test_the_request_of_an_attempt_that_was_killed_is_forgotten(node: Node) -> None:
    node.run.stop.write_text("time limit\n")
    assert node.ends("[ ! -e ../STOP ] && touch DONE")[0] == 0


@pytest.mark.parametrize(("ranks", "code"), [("exit 0", 0), ("exit 7", 7), ('echo no > "$MEGADIFF_ERROR_FILE"; exit 143', 2)])
def test_another_verbs_job_ends_as_its_ranks_do(tmp_path: Path, ranks: str, code: int) -> None:
    node = Node(tmp_path, SlurmCluster(python="python3"), stage=False)
    assert node.ends(ranks)[0] == code
    assert not node.requeued.exists()


def test_another_verbs_job_queues_again_before_its_time_limit(tmp_path: Path) -> None:
    node = Node(tmp_path, SlurmCluster(python="python3"), stage=False)
    process = node.start("touch ready; while [ -e ready ]; do sleep 0.05; done")
    wait_for(node.stage.root / "ready")
    process.send_signal(signal.SIGUSR1)
    wait_for(node.requeued)
    (node.stage.root / "ready").unlink()
    process.communicate(timeout=30)
    assert process.returncode == REQUEUED
    assert node.requeued.read_text() == "41\n"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)
