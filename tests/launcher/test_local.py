"""`megadiff launch` on one machine. Ranks are stand-ins here, but processes, signals and exit codes are real."""

from __future__ import annotations

import argparse
import base64
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megadiff.config.errors import UserError
from megadiff.config.load import load_run
from megadiff.config.schema import Run, Stage
from megadiff.launcher import folder, job, local
from megadiff.launcher.devices import Devices
from tests.minimal import ZERO3, minimal_run, write_json
from tests.ranks import finish, run_megadiff, start_python

ROOT = Path(__file__).parents[2]
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
WORLD = base64.urlsafe_b64encode(b'{"localhost": [0, 1]}').decode()

FINISH = """
import pathlib, sys
saved = pathlib.Path(sys.argv[1], 'checkpoints/step_00000004')
saved.mkdir(parents=True, exist_ok=True)
(saved / 'manifest.json').touch()
pathlib.Path(sys.argv[1], 'DONE').touch()
"""
CRASH = "import sys; sys.exit(5)"
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
STOPS_EARLY = "pass"
STOPS_AS_ASKED = """
import pathlib, sys
line = '{"kind": "stop", "stage": "first", "step": 2, "time": 1.0, "detail": ""}'
pathlib.Path(sys.argv[1], '../incidents.jsonl').write_text(line + chr(10))
"""
MISTAKE = """
import os, sys
open(os.environ['MEGADIFF_ERROR_FILE'], 'x').write('shard x is damaged; delete it')
sys.exit(2)
"""


def plan_of(run: Run) -> job.Plan:
    return job.plan_launch(run, ZERO3, CPU)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Let stages run these scripts (the last one again and again); returns the names of started stages."""

    def replace(*scripts: str) -> list[str]:
        started: list[str] = []

        def command(plan: job.Plan, stage: Stage, port: int | str) -> list[str]:
            script = scripts[min(len(started), len(scripts) - 1)]
            started.append(stage.name)
            return [sys.executable, "-c", script, str(Path(plan.run.folder) / stage.name)]

        monkeypatch.setattr(job.Plan, "command", command)
        return started

    return replace


def test_the_commands_are_these(tmp_path: Path) -> None:
    run = minimal_run(tmp_path, showcase={"count": 2}).model_copy(update={"folder": "runs/minimal"})
    text = job.describe(plan_of(run)).replace(sys.executable, "python")
    launcher = (
        f"DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python -m deepspeed.launcher.launch --world_info {WORLD} "
        "--master_port PORT --no_local_rank --log_level critical --module megadiff train runs/minimal/run.yaml"
    )
    assert text.splitlines() == [
        "# stage 1 of 2, first: 4 steps, 2 processes on the CPU",
        f"{launcher} --stage first --deepspeed runs/minimal/deepspeed.json",
        "# stage 2 of 2, second: 4 steps, 2 processes on the CPU",
        f"{launcher} --stage second --deepspeed runs/minimal/deepspeed.json",
        "# samples",
        "DS_ACCELERATOR=cpu OMP_NUM_THREADS=2 python -m megadiff showcase runs/minimal/run.yaml",
    ]


def launched_by(command: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """A command as DeepSpeed's launcher reads it."""
    from deepspeed.launcher import launch

    monkeypatch.setattr(sys, "argv", command[2:])
    return launch.parse_args()


def test_deepspeeds_launcher_knows_the_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.launcher.runner import encode_world_info

    plan = plan_of(minimal_run(tmp_path))
    parsed = launched_by(plan.command(plan.run.stages[0], 12345), monkeypatch)
    assert (parsed.master_addr, parsed.master_port, parsed.module, parsed.no_local_rank) == ("127.0.0.1", 12345, True, True)
    assert (parsed.training_script, parsed.training_script_args[0]) == ("megadiff", "train")
    assert parsed.world_info == WORLD == encode_world_info({"localhost": [0, 1]})


def test_gpus_chosen_by_cuda_visible_devices_are_the_ones_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = job.Plan(minimal_run(tmp_path), ZERO3, Devices("cuda", 3, (4, 6, 7)), 2, CPU)
    parsed = launched_by(plan.command(plan.run.stages[0], 1), monkeypatch)
    assert json.loads(base64.urlsafe_b64decode(parsed.world_info)) == {"localhost": [4, 6]}


def test_all_stages_run_in_order_and_the_resolved_files_are_kept(tmp_path: Path, ranks: Callable[..., list[str]]) -> None:
    run, said = minimal_run(tmp_path), list[str]()
    started = ranks(FINISH)
    assert local.launch(plan_of(run), say=said.append) == 0
    assert started == ["first", "second"]
    assert load_run(Path(run.folder) / "run.yaml") == run
    assert json.loads((Path(run.folder) / "deepspeed.json").read_text()) == ZERO3
    assert "tensorboard --logdir" in said[-1]


def test_a_second_launch_starts_only_what_is_not_done(tmp_path: Path, ranks: Callable[..., list[str]]) -> None:
    run = minimal_run(tmp_path)
    ranks(FINISH, CRASH)
    assert local.launch(plan_of(run)) == 5
    started = ranks(FINISH)
    assert local.launch(plan_of(run)) == 0
    assert started == ["second"]
    assert "(done already)" in job.describe(plan_of(run))


def test_ranks_are_told_at_which_step_the_ones_before_ended_unless_they_were_asked_to(
    tmp_path: Path, ranks: Callable[..., list[str]]
) -> None:
    run = minimal_run(tmp_path)
    paths = run.paths.stage("first")
    told = tmp_path / "told"
    ranks(f"import os; print(os.environ['MEGADIFF_FAILED_AT'], file=open({str(told)!r}, 'a')); raise SystemExit(5)")
    for beats in ({}, {0: 6, 1: 7}):
        for rank, step in beats.items():
            paths.heartbeats.mkdir(parents=True, exist_ok=True)
            paths.heartbeat(rank).write_text(json.dumps({"step": step, "phase": "step", "time": 1.0}))
        assert local.launch(plan_of(run)) == 5
    line = {"kind": "stop", "stage": "first", "step": 7, "time": 1.0, "detail": ""}
    run.paths.incidents.write_text(json.dumps(line) + "\n")
    assert local.launch(plan_of(run)) == 5
    assert told.read_text().split() == ["0", "7", "0"]


@pytest.mark.parametrize(
    ("script", "code", "sentence"),
    [
        (MISTAKE, 2, "megadiff: error: stage first: shard x is damaged; delete it"),
        (CRASH, 5, "megadiff: error: stage first ended with exit code 5; see {logs}"),
        (KILLED, 137, "megadiff: error: stage first ended with signal 9 (SIGKILL); see {logs}"),
        (STOPS_EARLY, 1, "megadiff: error: stage first ended with exit code 0 before its last step; see {logs}"),
        ("import sys; sys.exit(247)", 247, "megadiff: error: stage first ended with signal 9 (SIGKILL); see {logs}"),
    ],
    ids=["a user's mistake", "a crash", "a kill", "an early end", "a killed rank below DeepSpeed's launcher"],
)
def test_a_failure_is_one_sentence_with_stage_and_log(
    tmp_path: Path,
    ranks: Callable[..., list[str]],
    capfd: pytest.CaptureFixture[str],
    script: str,
    code: int,
    sentence: str,
) -> None:
    run = minimal_run(tmp_path)
    started = ranks(script)
    assert local.launch(plan_of(run)) == code
    assert started == ["first"]
    assert capfd.readouterr().err.splitlines() == [sentence.format(logs=Path(run.folder) / "first" / "logs")]


def test_an_orderly_stop_is_no_error_and_an_old_request_stops_nothing(
    tmp_path: Path, ranks: Callable[..., list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    run = minimal_run(tmp_path)
    run.paths.root.mkdir(parents=True)
    run.paths.stop.touch()
    started = ranks(STOPS_AS_ASKED, FINISH)
    assert local.launch(plan_of(run)) == 1
    assert (started, run.paths.stop.exists()) == (["first"], False)
    asked = "megadiff: stage first has stopped as asked; the same command goes on from its newest checkpoint"
    assert capfd.readouterr().err.splitlines() == [asked]
    assert local.launch(plan_of(run)) == 0


def test_an_old_mistake_is_not_said_again(
    tmp_path: Path, ranks: Callable[..., list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    run = minimal_run(tmp_path)
    ranks(MISTAKE)
    local.launch(plan_of(run))
    ranks(FINISH)
    assert local.launch(plan_of(run)) == 0
    assert capfd.readouterr().err.count("damaged") == 1


def test_missing_data_is_said_before_anything_is_written(tmp_path: Path) -> None:
    run = minimal_run(tmp_path)
    (tmp_path / "train.json").unlink()
    with pytest.raises(UserError, match=r"not found: data\.train: .*train\.json"):
        local.launch(plan_of(run))
    assert not Path(run.folder).exists()


def test_addresses_are_not_looked_for_on_the_disk(tmp_path: Path) -> None:
    run = minimal_run(tmp_path)
    data = run.data.model_copy(update={"train": "s3://bucket/train.json"})
    assert job.missing_files(run.model_copy(update={"data": data})) == []


def test_a_folder_with_another_configuration_is_refused_with_the_keys(tmp_path: Path, ranks: Callable[..., list[str]]) -> None:
    ranks(FINISH)
    local.launch(plan_of(minimal_run(tmp_path)))
    changed = minimal_run(tmp_path, seed=3, stage_defaults__steps=9)
    with pytest.raises(UserError) as caught:
        local.launch(plan_of(changed))
    for part in ("seed: 0 -> 3", "stages.first.steps: 4 -> 9", "--allow-changes"):
        assert part in str(caught.value)


def test_what_leaves_the_training_as_it_is_may_change_between_launches_and_is_told(
    tmp_path: Path, ranks: Callable[..., list[str]]
) -> None:
    ranks(FINISH)
    local.launch(plan_of(minimal_run(tmp_path)))
    changed, said = minimal_run(tmp_path, launch__processes=1, stage_defaults__log_every_steps=3), list[str]()
    assert local.launch(plan_of(changed), say=said.append) == 0
    lines = [*(f"stages.{stage}.log_every_steps: 10 -> 3" for stage in ("first", "second")), "launch.processes: 2 -> 1"]
    assert [line.partition(": ")[2] for line in said if line.startswith("changed since the last launch: ")] == lines
    assert load_run(Path(changed.folder) / "run.yaml") == changed


def test_allowed_changes_are_kept_and_a_longer_stage_goes_on(tmp_path: Path, ranks: Callable[..., list[str]]) -> None:
    ranks(FINISH)
    local.launch(plan_of(minimal_run(tmp_path)))
    longer = minimal_run(tmp_path)
    longer = longer.model_copy(update={"stages": (longer.stages[0], longer.stages[1].model_copy(update={"steps": 9}))})
    started = ranks(FINISH)
    assert local.launch(plan_of(longer), allow_changes=True) == 0
    assert started == ["second"]
    assert load_run(Path(longer.folder) / "run.yaml") == longer


def test_a_run_that_was_moved_goes_on_where_it_is(tmp_path: Path, ranks: Callable[..., list[str]]) -> None:
    run = minimal_run(tmp_path)
    ranks(FINISH, CRASH)
    local.launch(plan_of(run))
    Path(run.folder).rename(tmp_path / "moved")
    started = ranks(FINISH)
    moved = load_run(tmp_path / "moved" / "run.yaml")
    assert local.launch(plan_of(moved)) == 0
    assert started == ["second"]
    assert not Path(run.folder).exists()


def test_a_done_stage_without_checkpoints_is_said_where_something_starts_from_it(
    tmp_path: Path, ranks: Callable[..., list[str]]
) -> None:
    run = minimal_run(tmp_path, showcase={"count": 2})
    first, second = (Path(run.folder) / stage for stage in ("first", "second"))
    checkpoints = {stage: stage / "checkpoints" / "step_00000004" / "manifest.json" for stage in (first, second)}

    def put(stage: Path, *, done: bool, saved: bool) -> None:
        shutil.rmtree(stage, ignore_errors=True)
        checkpoints[stage].parent.mkdir(parents=True)
        if saved:
            checkpoints[stage].touch()
        if done:
            (stage / "DONE").touch()

    put(first, done=True, saved=False)
    with pytest.raises(UserError, match=r"stage first is done, but its checkpoints are gone, and stage second starts from it"):
        local.launch(plan_of(run))
    put(second, done=False, saved=True)  # it goes on from its own
    folder.check_checkpoints(run)
    put(second, done=True, saved=True)
    folder.check_checkpoints(run)
    put(second, done=True, saved=False)
    with pytest.raises(UserError, match=r"stage second is done, .* the samples are drawn from it; put them back, or delete"):
        folder.check_checkpoints(run)


def test_a_damaged_stored_run_is_said_plainly(tmp_path: Path) -> None:
    run = minimal_run(tmp_path)
    Path(run.folder).mkdir()
    (Path(run.folder) / "run.yaml").write_text("a: [")
    with pytest.raises(UserError, match="delete that file or name a new folder"):
        folder.accepted_changes(run, allowed=True)


def test_two_launches_cannot_share_a_folder(tmp_path: Path) -> None:
    run = minimal_run(tmp_path)
    with folder.locked(run), pytest.raises(UserError, match=f"in use by another launch \\(process {os.getpid()}"):
        local.launch(plan_of(run))
    with folder.locked(run):
        pass


@pytest.mark.distributed
def test_a_launch_waits_for_what_a_killed_one_left_behind(tmp_path: Path) -> None:
    run = minimal_run(tmp_path)
    with folder.locked(run) as lock:
        holds_the_lock = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)"], pass_fds=(lock,))
        os.pwrite(lock, b"4194305   ", 0)  # of a launcher that is no more
    script = (
        "import pathlib, sys, time; from megadiff.launcher import folder; from megadiff.config.run_folder import RunFolder; "
        "folder.join(RunFolder(pathlib.Path(sys.argv[1])))"
    )
    rank = start_python("-c", f"{script}; time.sleep(3)", run.folder)
    with folder.locked(run):
        assert holds_the_lock.poll() is not None
    finish(rank)


def test_a_file_system_without_locks_keeps_nobody_from_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(folder.fcntl, "flock", unknown)  # type: ignore[attr-defined]
    run = minimal_run(tmp_path)
    os.close(folder.join(run.paths))
    with folder.locked(run):
        pass


def test_ranks_that_stay_keep_a_launch_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "WAIT_S", 0.3)
    run = minimal_run(tmp_path)
    rank = folder.join(run.paths)
    try:
        with pytest.raises(UserError, match="in use by ranks"), folder.locked(run):
            pass
    finally:
        os.close(rank)
    with folder.locked(run):
        pass


WATCHED = """
import os, signal, sys, time
def end(number, frame):
    open(os.path.join(sys.argv[1], "ended"), "w").write(signal.Signals(number).name)
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
open(os.path.join(sys.argv[1], "ready"), "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_watcher_of_the_ranks_and_the_launch(tmp_path: Path, number: signal.Signals, code: int) -> None:
    run = minimal_run(tmp_path)
    (tmp_path / "watched.py").write_text(WATCHED)
    script = (
        "import sys; from megadiff.launcher import job, local; from megadiff.config.load import load_run\n"
        "job.Plan.command = lambda plan, stage, port: "
        f"[sys.executable, {str(tmp_path / 'watched.py')!r}, plan.run.folder + '/' + stage.name]\n"
        f"run = load_run({str(tmp_path / 'minimal.yaml')!r})\n"
        f"sys.exit(local.launch(job.plan_launch(run, {ZERO3!r}, {CPU!r})))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    ready = Path(run.folder) / "first" / "ready"
    while not ready.exists() and launcher.poll() is None:
        time.sleep(0.05)
    launcher.send_signal(number)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == code, err
    assert (ready.parent / "ended").read_text() == "SIGTERM"
    assert err.splitlines() == [
        "megadiff: interrupted in stage first; the same command goes on from its newest checkpoint",
    ]


def test_a_free_port_can_be_bound() -> None:
    assert 1024 < local.free_port() < 65536


@pytest.mark.distributed
def test_a_mistake_that_only_the_ranks_can_see_is_one_sentence_too(tmp_path: Path) -> None:
    """Real ranks under DeepSpeed's launcher; both find that the tokenizer is empty."""
    minimal_run(tmp_path, stage_defaults__samples={"every_steps": 2})
    json_file = str(write_json(tmp_path / "zero3.json", ZERO3))
    ended = run_megadiff("launch", str(tmp_path / "minimal.yaml"), "--deepspeed", json_file, cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert ended.stderr.startswith(f"megadiff: error: stage first: tokenizer {tmp_path / 'tokenizer.json'} cannot be read")
    # The first rank to fail ends the other, which may not have come to its own line yet.
    assert "cannot be read" in "".join(log.read_text() for log in (tmp_path / "run/first/logs").glob("rank_*.log"))
