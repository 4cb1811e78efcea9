"""Copies of checkpoints elsewhere; here in folders, in tests/s3 in a bucket."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megadiff.config.run_folder import MANIFEST, CheckpointsFolder
from megadiff.config.schema import Checkpointing
from megadiff.storage import store
from megadiff.weights import remote
from megadiff.weights.checkpoint import CheckpointError, DamagedCheckpoint, read_manifest
from tests.weights.copied import CONFIG, NUMBERS, copied, numbers, published, spoil


def test_the_newest_copies_stay_and_those_of_the_rule(tmp_path: Path) -> None:
    there = copied(str(tmp_path / "there"), tmp_path / "here", 1, 2, 3, 4, 5, remote_keep=2, keep_every_steps=2)
    assert list(there.published()) == [2, 4, 5]
    assert not any(store.list_names(there.step(step)) for step in (1, 3))
    assert there.newest_first() == [there.step(step) for step in (5, 4, 2)]


def test_after_a_rollback_newer_copies_are_passed_over(tmp_path: Path) -> None:
    there = copied(str(tmp_path / "there"), tmp_path / "here", 1, 2, 3)
    there.point_latest(Path("step_00000002"))
    assert there.newest_first() == [there.step(2), there.step(1)]


def test_a_copy_without_a_manifest_is_none(tmp_path: Path) -> None:
    there = copied(str(tmp_path / "there"), tmp_path / "here", 1)

    checks = iter([None, CheckpointError("it belongs to a newer start")])

    def overtaken() -> None:
        if error := next(checks):
            raise error

    with pytest.raises(CheckpointError, match="a newer start"):
        there.copy(published(CheckpointsFolder(tmp_path / "here"), 2), CONFIG, Checkpointing(), overtaken)
    assert "rank_00001.safetensors" in store.list_names(there.step(2))
    assert list(there.published()) == [1]
    copied(there.run, tmp_path / "here", 3)
    assert store.list_names(there.step(2)) == [], "the next copy removes what was left"
    assert list(there.published()) == [1, 3]


def test_a_checkpoint_is_fetched_once_and_again_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = str(tmp_path / "there")
    there = copied(run, tmp_path / "here", 1, 2)
    folder = remote.fetched(run)
    assert torch.equal(numbers(folder), torch.full((NUMBERS,), 2.0))
    assert folder.name == "step_00000002"
    store.delete(f"{there.step(2)}/rank_00000.safetensors")
    assert remote.fetched(there.step(2)) == folder
    assert torch.equal(numbers(remote.fetched(there.step(1))), torch.ones(NUMBERS))
    copied(run, tmp_path / "here", 3)
    assert torch.equal(numbers(remote.fetched(run)), torch.full((NUMBERS,), 3.0))


def test_the_best_copy_of_a_run_or_a_stage_is_fetched_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = str(tmp_path / "there")
    there = copied(run, tmp_path / "here", 1, 2, 3)
    with pytest.raises(CheckpointError, match="there has no best checkpoint"):
        remote.fetched(f"{run}/best")
    store.write_bytes(f"{there.root}/best", b"step_00000002\n")
    for address in (f"{run}/best", f"{run}/best/", f"{there.root}/best"):
        assert torch.equal(numbers(remote.fetched(address)), torch.full((NUMBERS,), 2.0))
    assert remote.fetched(f"{run}/latest").name == "step_00000003"
    store.delete(f"{there.step(2)}/{MANIFEST}")
    with pytest.raises(CheckpointError, match="there has no best checkpoint"):
        remote.fetched(f"{run}/best")


def test_a_damaged_copy_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there = copied(str(tmp_path / "there"), tmp_path / "here", 1, 2)
    spoil(f"{there.step(1)}/rank_00001.safetensors")
    with pytest.raises(DamagedCheckpoint, match=r"rank_00001\.safetensors is missing or damaged"):
        remote.fetched(there.step(1))
    store.delete(f"{there.step(2)}/rank_00000.safetensors")
    with pytest.raises(DamagedCheckpoint, match=r"rank_00000\.safetensors is missing or damaged"):
        remote.fetched(there.step(2))
    assert not list((tmp_path / "cache").rglob(MANIFEST))


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    there = copied(str(tmp_path / "there"), tmp_path / "here", 1)
    manifest = store.read_bytes(f"{there.step(1)}/{MANIFEST}").replace(b"rank_00000.safetensors", b"../../outside")
    store.write_bytes(f"{there.step(1)}/{MANIFEST}", manifest)
    (tmp_path / "into").mkdir()
    remote.fetch_manifest(there.step(1), tmp_path / "into")
    with pytest.raises(DamagedCheckpoint, match="is no name of a file"):
        remote.fetch_files(there.step(1), tmp_path / "into", read_manifest(tmp_path / "into").files)


def test_an_address_without_a_run_or_without_a_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is neither a run \(no run\.yaml\) nor a checkpoint"):
        remote.fetched(str(tmp_path))
    store.write_bytes(f"{tmp_path}/run.yaml", CONFIG.encode())
    with pytest.raises(CheckpointError, match="has no checkpoint in any stage"):
        remote.fetched(str(tmp_path))
