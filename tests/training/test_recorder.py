"""Ranks that stand still leave a record of their collectives, which says where they part."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from megadiff.distributed import recorder
from tests.ranks import ROOT, finish, start_ranks

WORKER = ROOT / "tests" / "training" / "hang_worker.py"


@pytest.mark.distributed
def test_the_record_of_a_hang_shows_the_collective_that_one_rank_waits_in_and_the_other_never_called(tmp_path: Path) -> None:
    overrides = [f"folder={tmp_path}", "safeguards.stalled_after_s=1", "stages.first.checkpoint.every_steps=9"]
    first, second = [finish(rank) for rank in start_ranks(WORKER, 2, {"overrides": overrides})]
    assert (first.returncode != 0, second.returncode) == (True, 7)
    waits, stands = [pickle.loads((tmp_path / f"first/logs/collectives_{rank}").read_bytes()) for rank in (0, 1)]

    def last(record: dict[str, Any]) -> Any:
        return [entry for entry in record["entries"] if entry["process_group"][1] == "default_pg"][-1]

    assert last(waits)["collective_seq_id"] == last(stands)["collective_seq_id"] + 1
    assert (last(waits)["retired"], last(stands)["retired"]) == (False, True)
    assert {"_train", "train_stage"} <= {frame["name"] for frame in last(waits)["frames"]}
    logs = [(tmp_path / f"first/logs/rank_{rank}.log").read_text() for rank in (0, 1)]
    assert "loop.py" in logs[0]
    assert "in __call__" in logs[1]


def test_nccls_record_goes_where_ours_does_and_its_size_may_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "elsewhere")
    monkeypatch.delenv("TORCH_NCCL_DUMP_ON_TIMEOUT", raising=False)
    recorder.prepare("run/first/logs/collectives_")
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT")
    assert [os.environ[name] for name in names] == ["7", "run/first/logs/collectives_", "1"]


def test_without_a_group_there_is_no_record(tmp_path: Path) -> None:
    assert recorder.write(tmp_path / "collectives_0") == ""
    assert not (tmp_path / "collectives_0").exists()
