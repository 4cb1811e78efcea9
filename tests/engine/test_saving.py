"""Checkpoints that ranks write while they train on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from megadiff.config.run_folder import CheckpointsFolder
from megadiff.weights.checkpoint import MOMENTS, CheckpointReader
from tests.engine.layouts import WORKER, newest
from tests.engine.saving_worker import EVERY, newest_step
from tests.forks import start_forked
from tests.ranks import finish, run_ranks, start_ranks, wait_until

pytestmark = pytest.mark.distributed

WRITER = Path(__file__).with_name("saving_worker.py")


def request(folder: Path, steps: int, every: int, *overrides: str, **more: Any) -> dict[str, Any]:
    """Two ranks of ZeRO-1."""
    few = [f"stages.*.steps={steps}", f"stages.*.checkpoint={{every_steps: {every}, keep: 9}}", *overrides]
    return {"folder": str(folder), "deepspeed": "ds_configs/zero1.json", "stages": ["first"], "overrides": few, **more}


def test_a_checkpoint_appears_when_the_slowest_rank_has_written_and_is_of_the_step_at_which_it_began(tmp_path: Path) -> None:
    waited = "stages.*.checkpoint.asynchronous=false"
    run_ranks(WORKER, 2, request(tmp_path / "waited", 6, 3, waited))
    reports = run_ranks(WORKER, 2, request(tmp_path / "held", 6, 3, hold_write=(3, 5)))
    assert [report["newest_while_held"] for report in reports] == [None, None]
    assert [report["steps"] for report in reports] == [[1, 2, 3, 4, 5, 6]] * 2
    for step in (3, 6):
        folders = [CheckpointsFolder(tmp_path / run / "first/checkpoints").step(step) for run in ("held", "waited")]
        held, waited_for = (CheckpointReader(folder) for folder in folders)
        assert held.damaged(held.manifest.files) == []
        assert held.manifest.progress == waited_for.manifest.progress
        for name, (_, trained) in held.manifest.parameters.items():
            for kind in ("weight", "ema.main", *(MOMENTS if trained else ())):
                assert torch.equal(held.read_whole(kind, name), waited_for.read_whole(kind, name)), (step, kind, name)


def test_a_run_killed_while_a_checkpoint_is_written_goes_on_from_the_one_before_to_the_bit(tmp_path: Path) -> None:
    (whole, _) = run_ranks(WORKER, 2, request(tmp_path / "whole", 6, 2))
    processes = start_ranks(WORKER, 2, request(tmp_path / "cut", 6, 2, hold_write=(4, 6), kill_at=5))
    ended = [finish(process).returncode for process in processes]
    assert -signal.SIGKILL in ended
    assert 0 not in ended
    stage = tmp_path / "cut/first"
    assert newest(stage).name == "step_00000002"
    assert len(CheckpointsFolder(stage / "checkpoints").partials()) == 1
    (resumed, _) = run_ranks(WORKER, 2, request(tmp_path / "cut", 6, 2))
    assert CheckpointsFolder(stage / "checkpoints").partials() == []
    for seen in ("steps", "loss", "grad_norm", "digests"):
        assert resumed[seen] == whole[seen], seen


@pytest.mark.parametrize("times", [8, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_wherever_a_process_is_killed_its_newest_checkpoint_is_whole_and_an_interval_old_at_most(
    times: int, tmp_path: Path
) -> None:
    folder, begun = CheckpointsFolder(tmp_path / "only/checkpoints"), tmp_path / "begun"
    begun.touch()
    reached, random = 0, Random(times)

    def steps() -> list[int]:
        return [int(line) for line in begun.read_text().split()]

    for turn in range(times):
        before = len(steps())
        process = start_forked([str(WRITER), str(tmp_path)], environment=dict(os.environ), turn=turn)
        try:
            wait_until(lambda before=before: len(steps()) >= before + 2, process)
            time.sleep(random.expovariate(20))
        finally:
            process.kill()
        finish(process)
        assert process.returncode == -signal.SIGKILL
        last, newest = steps()[-1], newest_step(folder)
        assert reached < newest, "the second checkpoint begins when the first is published"
        assert last - EVERY <= newest <= last
        reached = newest
