"""Checkpoints copied to a real S3 server, and runs that go on from there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megadiff.config.run_folder import CheckpointsFolder
from megadiff.storage import store
from megadiff.weights import loading
from tests.engine.layouts import WORKER
from tests.ranks import run_ranks
from tests.weights.copied import NUMBERS, copied, numbers, spoil

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]


def test_copies_come_back_and_older_ones_are_deleted(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = f"{bucket}/runs/mine"
    there = copied(run, tmp_path / "here", 1, 2, 3, remote_keep=2)
    assert there.newest_first() == [there.step(3), there.step(2)]
    assert store.list_folders(there.root) == ["step_00000002", "step_00000003"]
    for address, step in ((run, 3), (there.step(2), 2)):
        assert torch.equal(numbers(loading.local_path(address)), torch.full((NUMBERS,), float(step)))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_stage_starts_from_a_copy_and_samples_are_drawn_from_it(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote = f"{bucket}/runs/mine"
    two = ["stages.*.steps=2", f"stages.first.checkpoint.remote={remote}", f"stages.second.initialise.source={remote}"]
    request = {"deepspeed": "ds_configs/zero1.json", "overrides": two}
    run_ranks(WORKER, 1, {**request, "folder": str(tmp_path / "one"), "stages": ["first"]})
    (started,) = run_ranks(WORKER, 1, {**request, "folder": str(tmp_path / "other"), "stages": ["second"]})
    assert started.get("steps") == [1, 2], started
    loaded, here = loading.load(remote), loading.load(str(tmp_path / "one"))
    assert loaded.fingerprint == here.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(loaded.module.parameters(), here.module.parameters(), strict=True))


@pytest.mark.distributed
def test_a_run_on_an_empty_disk_goes_on_from_the_newest_copy_that_is_whole(bucket: str, tmp_path: Path) -> None:
    remote = f"{bucket}/runs/mine"
    options = f"{{every_steps: 2, keep: 9, remote: '{remote}', remote_keep: 2}}"

    def trained(folder: Path, steps: int) -> list[dict[str, list[float]]]:
        few = [f"stages.*.steps={steps}", f"stages.*.checkpoint={options}"]
        request = {"folder": str(folder), "deepspeed": "ds_configs/zero1.json", "stages": ["first"], "overrides": few}
        return run_ranks(WORKER, 2, request)

    (whole, _) = trained(tmp_path / "whole", 6)
    assert store.list_folders(f"{remote}/first") == ["step_00000004", "step_00000006"]
    spoil(f"{remote}/first/step_00000006/rank_00001.safetensors")
    (resumed, _) = trained(tmp_path / "empty", 6)
    assert resumed["steps"] == [5, 6]
    assert resumed["loss"] == whole["loss"][4:]
    assert resumed["digests"] == whole["digests"]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "empty/incidents.jsonl").read_text().splitlines()]
    assert kinds == ["damaged", "resume"]
    folder = CheckpointsFolder(tmp_path / "empty/first/checkpoints")
    assert list(folder.published()) == [4, 6]
    assert folder.partials() == []
    shutil.rmtree(tmp_path / "empty")
    (done, _) = trained(tmp_path / "empty", 6)  # the spoilt copy was written anew
    assert "loss" not in done or done["loss"] == []
    assert (tmp_path / "empty/first/DONE").exists()
