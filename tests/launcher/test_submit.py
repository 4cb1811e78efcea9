"""`megadiff launch --cluster`, status, stop and logs, over a stand-in for Slurm's queue."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megadiff.cli import main as cli
from megadiff.config.jobs import Attempt, SubmittedJob
from megadiff.config.load import load_cluster, load_run
from megadiff.config.run_folder import RunFolder
from megadiff.launcher import folder, queue
from tests.launcher.slurm_stand_in import SlurmStandIn
from tests.minimal import ZERO3, minimal_run, write_json, write_yaml
from tests.ranks import finish, start_megadiff

NINE_NODES = ["cluster.nodes=9", "stages.*.batch.global_samples=36"]
SLURM = {"kind": "slurm", "nodes": 2, "processes_per_node": 1, "restarts": 3}


class Launch:
    """A run's files, and the command line that launches it on a cluster."""

    def __init__(self, place: Path) -> None:
        self.place, self.run = place, RunFolder(place / "run")
        minimal_run(place, launch={}, showcase={"count": 2})
        write_json(place / "zero3.json", ZERO3)
        self.cluster(**SLURM)

    def cluster(self, **content: Any) -> None:
        write_yaml(self.place / "cluster.yaml", content)

    def command(self, *more: str) -> list[str]:
        files = {name: str(self.place / name) for name in ("minimal.yaml", "zero3.json", "cluster.yaml")}
        return ["launch", files["minimal.yaml"], "--deepspeed", files["zero3.json"], "--cluster", files["cluster.yaml"], *more]

    def attempts(self, stage: str, *outcomes: tuple[str, str, int]) -> None:
        """Attempts of (job, outcome, code)."""
        path = self.run.stage(stage).attempts
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{Attempt.FORM}\n" % (1_700_000_000, *outcome) for outcome in outcomes))

    def metrics(self, stage: str, steps: int) -> None:
        rows = [{"step": step, "time": 1e9 + 2.0 * step, "loss": 1 / step} for step in range(1, steps + 1)]
        self.run.stage(stage).root.mkdir(exist_ok=True)
        self.run.stage(stage).metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    monkeypatch.chdir(tmp_path)
    return Launch(tmp_path)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmStandIn:
    return SlurmStandIn(tmp_path, monkeypatch)


def said(capsys: pytest.CaptureFixture[str], *command: str, code: int = 0) -> str:
    """What a command line prints: its output, or its one sentence."""
    assert cli.main(list(command)) == code
    out, err = capsys.readouterr()
    return err if code else out


def test_stages_and_samples_become_a_chain_of_jobs(
    launch: Launch, slurm: SlurmStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    out = said(capsys, *launch.command("cluster.nodes=4"))
    frozen = launch.run.submission(1)
    assert slurm.calls == [
        f"--parsable {frozen.script('first')}",
        f"--parsable --dependency=afterok:41 --kill-on-invalid-dep=yes {frozen.script('second')}",
        f"--parsable --dependency=afterok:42 --kill-on-invalid-dep=yes {frozen.script('final-samples')}",
    ]
    jobs = [(job.job, job.name, job.submission) for job in SubmittedJob.read(launch.run.jobs)]
    assert jobs == [("41", "first", 1), ("42", "second", 1), ("43", "final-samples", 1)]
    assert out.splitlines()[0] == "job 41: first"
    assert load_run(frozen.config) == load_run(launch.place / "minimal.yaml") == load_run(launch.run.run)
    assert json.loads(frozen.deepspeed.read_text()) == ZERO3
    assert load_cluster(frozen.cluster).nodes == 4
    assert launch.run.stage("second").logs.is_dir()
    assert "--nodes=4" in frozen.script("first").read_text()
    assert "--nodes=1" in frozen.script("final-samples").read_text()


def test_jobs_run_the_code_that_was_submitted(launch: Launch, slurm: SlurmStandIn) -> None:
    assert cli.main(launch.command()) == 0
    frozen = launch.run.submission(1)
    (launch.place / "megadiff").mkdir()
    (launch.place / "megadiff/__init__.py").write_text("raise ImportError('newer code')")
    (export,) = [line for line in frozen.script("first").read_text().splitlines() if "PYTHONPATH" in line]
    script = (
        f"{export}\n{sys.executable} -m megadiff --version; {sys.executable} -c 'import megadiff; print(megadiff.__file__)'"
    )
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=launch.place)
    assert ended.stdout.splitlines()[-1] == str(frozen.code / "megadiff/__init__.py")
    assert (frozen.code / "megadiff/launcher/slurm.py").exists()


def test_a_dry_run_prints_the_scripts_and_writes_nothing(
    launch: Launch, slurm: SlurmStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    out = said(capsys, *launch.command("--dry-run"))
    assert out.count("#!/bin/bash") == 3
    assert "# sbatch --parsable --dependency=afterok:JOB_OF_first" in out
    assert not launch.run.root.exists()
    assert slurm.calls == []
    assert cli.main(launch.command()) == 0
    assert launch.run.submission(1).script("second").read_text() in out


@pytest.mark.parametrize(("gpus", "accelerator"), [(1, "cuda"), (0, "cpu")])
def test_jobs_train_where_the_file_says_whatever_the_shell_says(
    launch: Launch, capsys: pytest.CaptureFixture[str], gpus: int, accelerator: str
) -> None:
    launch.cluster(kind="slurm", nodes=2, gpus_per_node=gpus, environment={"NAME": "it's"}, nccl={"DEBUG": "WARN"})
    out = said(capsys, *launch.command("--dry-run"))
    variables = [f"DS_ACCELERATOR={accelerator}", "OMP_NUM_THREADS=1", "NCCL_DEBUG=WARN", "NAME='it'\"'\"'s'"]
    assert "\n".join(f"export {variable}" for variable in variables) in out
    assert out.count("#SBATCH --gpus-per-node=1") == 3 * gpus


def test_a_stage_that_is_done_gets_no_job(launch: Launch, slurm: SlurmStandIn) -> None:
    saved = launch.run.stage("first").checkpoints.step(4)
    saved.mkdir(parents=True)
    (saved / "manifest.json").touch()
    launch.run.stage("first").done.touch()
    assert cli.main(launch.command()) == 0
    assert [job.name for job in SubmittedJob.read(launch.run.jobs)] == ["second", "final-samples"]
    assert "afterok" not in slurm.calls[0]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["launch.processes=2"], "launch.processes is 2 beside --cluster"),
        (["cluster.nodse=2"], "unknown key nodse; did you mean nodes?"),
        (["cluster.nodes=3"], "must be a multiple of micro_batch (4) x data ranks (3) = 12"),
        (
            ["cluster.nodes=9", "stages.*.batch.global_samples=36", "data.lanes=9"],
            "Slurm refuses the job of first: allocation failure",
        ),
        (["data.train=nowhere.json"], "not found: data.train: nowhere.json"),
        (["folder=/proc/run"], "/proc/run cannot be written"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_submitted(
    launch: Launch, slurm: SlurmStandIn, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    err = said(capsys, *launch.command(*more), code=2)
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert slurm.calls == []
    assert not launch.run.submissions.exists()


def test_a_job_that_is_refused_leaves_none_of_the_chain_behind(
    launch: Launch, slurm: SlurmStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.refuse(42)
    assert "sbatch failed for second: sbatch: error: QOSMax" in said(capsys, *launch.command(), code=2)
    assert slurm.queue == []
    assert SubmittedJob.read(launch.run.jobs) == []


def test_without_slurm_it_is_said_plainly(
    launch: Launch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(launch.place))
    assert "sbatch is not here; give this command on a machine of the Slurm" in said(capsys, *launch.command(), code=2)


def test_a_run_in_the_queue_is_not_submitted_twice(
    launch: Launch, slurm: SlurmStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(launch.command()) == 0
    capsys.readouterr()
    here = launch.command()[:4]
    for command in (launch.command(), here):
        assert "is in work by jobs 41, 42, 43; wait, or give `megadiff stop" in said(capsys, *command, code=2)
    for job in (41, 42, 43):
        slurm.set_state(job, "")
    launch.run.stop.touch()
    assert cli.main(launch.command()) == 0
    assert not launch.run.stop.exists()
    assert [job.submission for job in SubmittedJob.read(launch.run.jobs)] == [1, 1, 1, 2, 2, 2]


def test_another_verb_becomes_a_job(launch: Launch, slurm: SlurmStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["launch", "--cluster", str(launch.place / "cluster.yaml"), "cluster.nodes=3"]
    dry = said(capsys, *command, "--dry-run", "--", "data", "verify", "my data")
    assert not (launch.place / "jobs").exists()
    assert said(capsys, *command, "--", "data", "verify", "my data").startswith("job 41: data, log ")
    (place,) = (launch.place / "jobs").iterdir()
    script = (place / "data.sh").read_text()
    assert "-m megadiff data verify 'my data'" in script
    assert "--nodes=3" in script
    assert dry.count("\n") > 20
    assert (place / "code/megadiff/__main__.py").exists()


def test_local_and_ssh_kinds_print_their_commands(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    launch.cluster(kind="local", processes_per_node=2, environment={"A": "b c"}, cache="/tmp/cache")
    out = said(capsys, *launch.command("--dry-run"))
    assert "first: 4 steps, 2 processes on the CPU" in out
    assert "DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 A='b c' TRITON_CACHE_DIR=/tmp/cache/" in out
    launch.cluster(kind="deepspeed", hosts=["node1", "node2"], processes_per_node=1, nccl={"DEBUG": "WARN"})
    out = said(capsys, *launch.command("--dry-run"))
    assert "first: 4 steps, 2 processes on node1, node2" in out
    assert "--master_addr node1 --master_port PORT --launcher pdsh" in out
    assert "\nDS_ACCELERATOR=cpu OMP_NUM_THREADS=1 NCCL_DEBUG=WARN" in out[out.index("# samples") :]
    assert "env DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 NCCL_DEBUG=WARN MEGADIFF_ERROR_FILE=" in out


def test_a_value_that_ssh_would_change_is_refused(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    launch.cluster(kind="deepspeed", hosts=["node1"], processes_per_node=2, environment={"A": "$HOME"})
    assert "'A=$HOME' cannot be handed to other machines by ssh" in said(capsys, *launch.command("--dry-run"), code=2)


def test_more_gpus_than_this_machine_has_are_refused(
    launch: Launch, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launch.cluster(kind="local", gpus_per_node=2)
    assert "gpus_per_node is 2, and this machine has the CPU" in said(capsys, *launch.command(), code=2)


# ---------------------------------------------------------------------------------------------------- status, stop, logs


def test_status_shows_where_each_stage_is(launch: Launch, slurm: SlurmStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(launch.command()) == 0
    slurm.set_state(41, "RUNNING")
    launch.metrics("first", 3)
    starts = [("41", "started", 0), ("41", "time limit", 0), ("41", "started", 0), ("41", "failed", 143), ("41", "started", 0)]
    launch.attempts("first", *starts)
    saved = launch.run.stage("first").checkpoints.step(2)
    saved.mkdir(parents=True)
    (saved / "manifest.json").touch()
    capsys.readouterr()
    for place in (str(launch.run.root), str(launch.run.run), str(launch.place / "minimal.yaml")):
        name, head, first, second, samples = said(capsys, "status", place).splitlines()
        assert name == f"run minimal, folder {launch.run.root}"
        assert head.split() == ["stage", "state", "job", "step", "loss", "samples/s", "left", "checkpoint", "restarts"]
        assert first.split()[:8] == ["first", "running", "41", "3/4", "0.3333", "8.0", "0:00:02", "2"]
        assert first.split()[8:12] == ["2", "(failed,", "code", "143,"]
        assert second.split() == ["second", "pending", "(dependency)", "42", "0/4"]
        assert samples.split() == ["final-samples", "PENDING", "(Dependency)"]


def test_a_job_that_the_scheduler_has_not_looked_at_has_no_reason_to_wait(slurm: SlurmStandIn) -> None:
    slurm.set_state(41, "PENDING")
    assert queue.states(["41"]) == {"41": "PENDING"}


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        ([], "not started"),
        ([("41", "started", 0)], "ended by Slurm"),
        ([("41", "started", 0), ("41", "mistake", 2)], "mistake"),
        ([("41", "started", 0), ("41", "gave up", 1)], "gave up"),
        ([("40", "started", 0), ("40", "gave up", 1)], "not started"),
    ],
)
def test_status_says_how_a_job_that_is_gone_has_ended(
    launch: Launch, slurm: SlurmStandIn, capsys: pytest.CaptureFixture[str], outcomes: list[tuple[str, str, int]], state: str
) -> None:
    assert cli.main(launch.command()) == 0
    for job in (41, 42, 43):
        slurm.set_state(job, "")
    launch.attempts("first", *outcomes)
    capsys.readouterr()
    first = said(capsys, "status", str(launch.run.root)).splitlines()[2]
    assert first.startswith(f"first   {state}  ")


def test_status_of_a_launch_on_this_machine(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    run = load_run(launch.place / "minimal.yaml")
    with folder.locked(run):
        folder.write(run, ZERO3)
        launch.metrics("first", 2)
        assert said(capsys, "status", str(launch.run.root)).splitlines()[2].split()[:2] == ["first", "running"]
    launch.run.stage("first").done.touch()
    assert said(capsys, "status", str(launch.run.root)).splitlines()[2].split()[:2] == ["first", "done"]


def test_without_the_controller_nothing_is_taken_for_ended(
    launch: Launch, slurm: SlurmStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(launch.command()) == 0
    (slurm.folder / "queue").unlink()  # and squeue fails
    capsys.readouterr()
    assert "first          unknown (squeue failed)  41" in said(capsys, "status", str(launch.run.root))
    for command in (["stop", str(launch.run.root)], launch.command()):
        assert "squeue failed: cat:" in said(capsys, *command, code=2)


def test_stop_asks_the_running_job_and_cancels_those_that_wait(
    launch: Launch, slurm: SlurmStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(launch.command()) == 0
    slurm.set_state(41, "RUNNING")
    capsys.readouterr()
    assert said(capsys, "stop", str(launch.run.root)).splitlines() == [
        "cancelled jobs 42, 43",
        "asked job 41 to save and end after the step in work",
    ]
    assert launch.run.stop.exists()
    assert slurm.queue == ["41|RUNNING|None"]
    assert said(capsys, "stop", str(launch.run.root), "--now") == "cancelled job 41\n"
    assert slurm.queue == []
    assert "nothing of" in said(capsys, "stop", str(launch.run.root), code=2)


def test_stop_of_what_only_waits_leaves_no_request_behind(
    launch: Launch, slurm: SlurmStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(launch.command()) == 0
    capsys.readouterr()
    assert said(capsys, "stop", str(launch.run.root)) == "cancelled jobs 41, 42, 43\n"
    assert not launch.run.stop.exists()


def test_stop_reaches_a_launch_on_this_machine(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    run = load_run(launch.place / "minimal.yaml")
    script = (
        "import sys, time; from megadiff.launcher import folder; from megadiff.config.load import load_run\n"
        f"with folder.locked(load_run({str(launch.place / 'minimal.yaml')!r})):\n    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    folder.write(run, ZERO3)
    assert (
        said(capsys, "stop", str(launch.run.root))
        == f"asked the launch (process {process.pid}) to save and end after the step in work\n"
    )
    assert launch.run.stop.exists()
    assert said(capsys, "stop", str(launch.run.root), "--now") == f"ended the launch (process {process.pid})\n"
    process.communicate(timeout=20)
    assert process.returncode == -15


def test_logs_are_those_of_the_job_or_of_a_rank(
    launch: Launch, slurm: SlurmStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(launch.command()) == 0
    capsys.readouterr()
    first = launch.run.stage("first")
    assert "there is no job_*.log or rank_0.log in" in said(capsys, "logs", str(launch.run.root), code=2)
    first.log(0).write_text("rank 0\n")
    assert said(capsys, "logs", str(launch.run.root)) == "rank 0\n"
    first.job_log("41").write_text("the job\n")
    first.log(1).write_text("rank 1\n")
    assert said(capsys, "logs", str(launch.run.root)) == "the job\n"
    assert said(capsys, "logs", str(launch.run.root), "--rank", "1") == "rank 1\n"
    assert "there is no rank_2.log" in said(capsys, "logs", str(launch.run.root), "--rank", "2", code=2)
    assert "the run has no stage third" in said(capsys, "logs", str(launch.run.root), "--stage", "third", code=2)


@pytest.mark.distributed
def test_a_log_is_followed_until_it_is_enough(launch: Launch, slurm: SlurmStandIn) -> None:
    assert cli.main(launch.command()) == 0
    log = launch.run.stage("first").log(0)
    log.write_text("one\n")
    process = start_megadiff("logs", str(launch.run.root), "--rank", "0", "-f")
    assert process.stdout is not None
    assert process.stdout.readline() == "one\n"
    with log.open("a") as file:
        file.write("two\n")
    assert process.stdout.readline() == "two\n"
    process.send_signal(2)
    ended = finish(process)
    assert (ended.returncode, ended.stderr) == (130, "megadiff: interrupted\n")


def test_status_of_a_folder_where_nothing_was_launched_is_one_sentence(
    launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nothing was launched in" in said(capsys, "status", str(launch.place / "minimal.yaml"), code=2)
