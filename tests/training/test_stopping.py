"""Ranks that are asked to stop, as a launcher sees them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megadiff.config.run_folder import RunFolder
from tests.ranks import fork_megadiff


@pytest.mark.distributed
def test_ranks_that_are_asked_to_stop_end_with_exit_code_0_and_a_checkpoint_and_without_done(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    stage = folder.stage("first")
    folder.stop.touch()
    ended = fork_megadiff(
        *("train", "tests/tiny.yaml", f"folder={tmp_path}", "--stage", "first", "--deepspeed", "ds_configs/zero1.json"), world=2
    )
    assert ended.returncode == 0, ended.stderr
    assert (stage.done.exists(), folder.stop.exists()) == (False, False)
    assert stage.checkpoints.newest() == stage.checkpoints.step(1)
    assert {json.loads(stage.heartbeat(rank).read_text())["step"] for rank in range(2)} == {1}
    assert [json.loads(line)["kind"] for line in folder.incidents.read_text().splitlines()] == ["start", "stop"]
