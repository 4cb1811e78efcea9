"""The checkpoint format without any process: ranges, publishing, damage, retirement."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from megadiff.config.run_folder import CheckpointsFolder
from megadiff.config.schema import Checkpointing
from megadiff.weights import checkpoint
from megadiff.weights.boxes import Box, Extent
from megadiff.weights.checkpoint import CheckpointError, CheckpointManifest, CheckpointReader, check_names, tensor_key

WHOLE = torch.arange(12, dtype=torch.float32)


def publish(checkpoints: Path, step: int, *, cut: int = 5, keep: int = 3) -> Path:
    """A checkpoint of one trained parameter [3, 4] in two files, cut anywhere, and one frozen scalar-like parameter [2]."""
    checkpoint.begin(CheckpointsFolder(checkpoints), step)
    folder = CheckpointsFolder(checkpoints).partial(step)
    files = []
    for rank, (start, stop) in enumerate(((0, cut), (cut, 12))):
        tensors = {tensor_key("weight", "a"): WHOLE[start:stop] + step, tensor_key("ema.main", "a"): WHOLE[start:stop] * 2}
        extents = {"a": Extent(start, stop)}
        if rank == 1:
            tensors[tensor_key("weight", "frozen")] = torch.tensor([7.0, 8.0])
            extents["frozen"] = Extent(0, 2)
        files.append(checkpoint.write_rank_file(folder, rank, tensors, extents))
    parameters = {"a": ((3, 4), True), "frozen": ((2,), False)}
    manifest = CheckpointManifest("first", parameters, ("main",), {"optimizer_step": step}, "config", tuple(files))
    return checkpoint.publish(CheckpointsFolder(checkpoints), step, manifest, Checkpointing(keep=keep))


@pytest.mark.parametrize("cut", [1, 5, 11])
@pytest.mark.parametrize(("start", "stop"), [(0, 12), (3, 9), (4, 5), (11, 12), (6, 6)])
def test_any_range_is_read_across_any_cut(tmp_path: Path, cut: int, start: int, stop: int) -> None:
    reader = CheckpointReader(publish(tmp_path, 1, cut=cut))
    assert torch.equal(reader.read("weight", "a", Extent(start, stop)), WHOLE[start:stop] + 1)
    assert torch.equal(reader.read_whole("ema.main", "a"), (WHOLE * 2).reshape(3, 4))


def split(cuts: list[tuple[Box, ...]], flat_ranks: int) -> list[Extent]:
    """What each rank holds where tensor parallelism has cut a parameter and ZeRO each part of it."""
    extents = []
    for boxes in cuts:
        size = sum(math.prod(stop - start for start, stop in box) for box in boxes)
        bounds = [size * rank // flat_ranks for rank in range(flat_ranks + 1)]
        extents += [Extent(start, stop, boxes) for start, stop in itertools.pairwise(bounds)]
    return extents


SPLITS = {
    "whole": [Extent(0, 48)],
    "flat": [Extent(0, 17), Extent(17, 48)],
    "rows": split([(((0, 6), (0, 4)),), (((6, 12), (0, 4)),)], 1),
    "columns, then flat": split([(((0, 12), (0, 3)),), (((0, 12), (3, 4)),)], 3),
    "fused": split([tuple(((base + 2 * half, base + 2 * half + 2), (0, 4)) for base in (0, 4, 8)) for half in (0, 1)], 2),
}


@pytest.mark.parametrize("written", SPLITS)
@pytest.mark.parametrize("wanted", SPLITS)
def test_any_split_of_a_parameter_is_read_out_of_any_other(tmp_path: Path, written: str, wanted: str) -> None:
    whole = torch.arange(48.0).view(12, 4)

    def held(extent: Extent) -> torch.Tensor:
        parts = [whole] if extent.boxes is None else [whole[tuple(slice(*side) for side in box)] for box in extent.boxes]
        return torch.cat([part.flatten() for part in parts])[extent.start : extent.stop]

    checkpoints = CheckpointsFolder(tmp_path)
    checkpoint.begin(checkpoints, 1)
    files = [
        checkpoint.write_rank_file(checkpoints.partial(1), rank, {tensor_key("weight", "qkv"): held(part)}, {"qkv": part})
        for rank, part in enumerate(SPLITS[written])
    ]
    manifest = CheckpointManifest("first", {"qkv": ((12, 4), False)}, (), {"optimizer_step": 1}, "", tuple(files))
    reader = CheckpointReader(checkpoint.publish(checkpoints, 1, manifest, Checkpointing()))
    assert reader.manifest == manifest
    for part in SPLITS[wanted]:
        assert torch.equal(reader.read("weight", "qkv", part), held(part))


def test_a_manifest_of_version_1_is_read(tmp_path: Path) -> None:
    folder = publish(tmp_path, 1)
    tree = json.loads((folder / "manifest.json").read_text())
    assert tree["version"] == 2
    tree["version"] = 1
    for entry in tree["files"]:
        entry["ranges"] = entry.pop("extents")
    (folder / "manifest.json").write_text(json.dumps(tree))
    assert torch.equal(CheckpointReader(folder).read_whole("weight", "a").flatten(), WHOLE + 1)


def test_the_average_of_a_frozen_parameter_is_its_weight(tmp_path: Path) -> None:
    assert CheckpointReader(publish(tmp_path, 1)).read_whole("ema.main", "frozen").tolist() == [7.0, 8.0]


def test_latest_names_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert CheckpointsFolder(tmp_path).newest() is None
    publish(tmp_path, 1)
    newest = publish(tmp_path, 2)
    checkpoint.begin(CheckpointsFolder(tmp_path), 3)
    assert CheckpointsFolder(tmp_path).newest() == newest
    (tmp_path / "latest").write_text("step_00000009")
    assert CheckpointsFolder(tmp_path).newest() == newest


def test_an_interrupted_save_is_invisible_and_is_cleared_by_the_next(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    checkpoint.begin(CheckpointsFolder(tmp_path), 2)
    (CheckpointsFolder(tmp_path).partial(2) / "rank_00000.safetensors").write_bytes(b"half")
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000001"]
    publish(tmp_path, 3)
    assert not CheckpointsFolder(tmp_path).partial(2).exists()


def test_a_crash_between_writing_and_placing_the_pointer_does_not_stop_later_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, 1)

    def crash(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            publish(tmp_path, 2)
    assert (tmp_path / "latest").read_text() == "step_00000001"
    assert CheckpointsFolder(publish(tmp_path, 3).parent).newest() == tmp_path / "step_00000003"


def test_a_frozen_parameter_has_no_moments_to_load(tmp_path: Path) -> None:
    reader = CheckpointReader(publish(tmp_path, 1))
    with pytest.raises(CheckpointError, match="frozen was frozen there and has no exp_avg_sq"):
        reader.read("exp_avg_sq", "frozen", Extent(0, 2))


def test_old_checkpoints_are_retired_by_the_rule(tmp_path: Path) -> None:
    for step in range(1, 6):
        publish(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000004", "step_00000005"]
    rule = Checkpointing(keep=2, keep_every_steps=4)
    assert checkpoint.retired(range(1, 11), rule) == [1, 2, 3, 5, 6, 7]
    assert checkpoint.retired(range(1, 11), rule, best=3) == [1, 2, 5, 6, 7]


def test_a_missing_or_truncated_file_is_named(tmp_path: Path) -> None:
    folder = publish(tmp_path, 1)
    path = folder / "rank_00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors has \d+ bytes instead of \d+"):
        CheckpointReader(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors is missing"):
        CheckpointReader(folder)


def test_a_changed_byte_is_found_by_the_hash(tmp_path: Path) -> None:
    folder = publish(tmp_path, 1)
    path = folder / "rank_00000.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(bytes(whole))
    reader = CheckpointReader(folder)
    assert reader.damaged(reader.manifest.files) == ["rank_00000.safetensors"]


HEAD = '"format": "megadiff-checkpoint", "version": 2, "stage": "a", "ema": [], "progress": {}, "config": ""'
LAME = [f'{{{HEAD}, "parameters": [], "files": []}}', f'{{{HEAD}, "parameters": {{}}, "files": [{{"name": "a"}}]}}']


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "megadiff-checkpoint", "version": 1}', '{"format": "x"}', *LAME])
def test_a_damaged_manifest_is_one_sentence(tmp_path: Path, text: str) -> None:
    folder = publish(tmp_path, 1)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_range_that_no_file_holds_is_an_error(tmp_path: Path) -> None:
    reader = CheckpointReader(publish(tmp_path, 1))
    with pytest.raises(CheckpointError, match="covers 12 of 14 elements"):
        reader.read("weight", "a", Extent(0, 14))


def test_names_that_do_not_fit_are_listed_and_refused_unless_declared(tmp_path: Path) -> None:
    reader = CheckpointReader(publish(tmp_path, 1))
    parts = {"a": "joint", "frozen": "joint", "heads.text.b": "text"}
    wanted = {"a": (3, 4), "heads.text.b": (1,)}
    with pytest.raises(CheckpointError, match=r"lacks heads\.text\.b.*initialise\.new.*lacks: frozen.*initialise\.dropped"):
        check_names(reader, wanted, parts=parts)
    assert check_names(reader, wanted, new=["text"], dropped=["froz*"], parts=parts) == ["a"]
    with pytest.raises(CheckpointError, match=r"other shapes: a \(3, 4\) -> \(4, 3\)"):
        check_names(reader, {"a": (4, 3), "frozen": (2,)}, parts=parts)


def test_an_unknown_ema_profile_names_the_known_ones(tmp_path: Path) -> None:
    reader = CheckpointReader(publish(tmp_path, 1))
    assert reader.weight_kind("raw") == "weight"
    assert reader.weight_kind("ema") == "ema.main"
    with pytest.raises(CheckpointError, match="no EMA profile other; it has main"):
        reader.weight_kind("ema", "other")


def test_copies_and_links_of_users_are_left_alone_and_no_save_fails_for_them(tmp_path: Path) -> None:
    publish(tmp_path, 1, keep=1)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000001.bak")
    (tmp_path / "step_elsewhere").symlink_to(tmp_path / "step_00000001.bak")
    (tmp_path / "step_notes.txt").write_text("mine")
    assert CheckpointsFolder(tmp_path).newest() == tmp_path / "step_00000001"
    (tmp_path / "step_00000001" / "mine.txt").write_text("mine")
    newest = publish(tmp_path, 2, keep=1)
    assert CheckpointsFolder(tmp_path).newest() == newest
    assert CheckpointReader(tmp_path / "step_00000001.bak").damaged(CheckpointReader(newest).manifest.files[:0]) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step_00000001",
        "step_00000001.bak",
        "step_00000002",
        "step_elsewhere",
        "step_notes.txt",
    ]
    assert [path.name for path in (tmp_path / "step_00000001").iterdir()] == ["mine.txt"]
    publish(tmp_path, 3, keep=2)
    assert sorted(CheckpointsFolder(tmp_path).published()) == [2, 3]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path, 1, keep=1)

    unlink = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name == "step_00000001":
            raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    assert publish(tmp_path, 2, keep=1).name == "step_00000002"
    assert "could not be removed" in caplog.text


def test_a_step_that_is_saved_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    (publish(tmp_path, 1, cut=5) / "mine.txt").write_text("mine")
    reader = CheckpointReader(publish(tmp_path, 1, cut=7))
    assert reader.manifest.files[0].extents == {"a": Extent(0, 7)}
    assert [path.read_text() for path in tmp_path.glob("step_00000001.*/*")] == ["mine"]


def test_what_a_failed_save_wrote_is_removed(tmp_path: Path) -> None:
    checkpoint.begin(CheckpointsFolder(tmp_path), 2)
    checkpoint.abandon(CheckpointsFolder(tmp_path), 2)
    assert list(tmp_path.iterdir()) == []


def test_a_save_retires_neither_itself_nor_what_it_did_not_write(tmp_path: Path) -> None:
    publish(tmp_path, 10, keep=1)
    shutil.copytree(tmp_path / "step_00000010", tmp_path / "step_00000040")
    shutil.copytree(tmp_path / "step_00000010", tmp_path / "step_00000015")
    shutil.copytree(tmp_path / "step_00000010", tmp_path / "step_\u0660\u0660\u0660\u0660\u0660\u0660\u0664\u0660")
    for step in (20, 30):
        newest = publish(tmp_path, step, keep=1)
        assert CheckpointsFolder(tmp_path).newest() == newest
        assert CheckpointReader(newest).manifest.progress["optimizer_step"] == step
    assert sorted(CheckpointsFolder(tmp_path).published()) == [15, 30, 40]


def test_a_checkpoint_that_was_moved_and_linked_stays(tmp_path: Path) -> None:
    (publish(tmp_path / "here", 10, keep=1)).rename(tmp_path / "there")
    (tmp_path / "here" / "step_00000010").symlink_to(tmp_path / "there")
    publish(tmp_path / "here", 20, keep=1)
    assert (
        CheckpointReader(tmp_path / "here" / "step_00000010").damaged(CheckpointReader(tmp_path / "there").manifest.files) == []
    )


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{"])
def test_a_manifest_of_somebody_else_fails_no_save(tmp_path: Path, text: str) -> None:
    (tmp_path / "step_00000005").mkdir()
    (tmp_path / "step_00000005" / "manifest.json").write_text(text)
    for name in ("latest", ".latest"):
        (tmp_path / name).mkdir()
    (tmp_path / ".partial-step_00000010").write_text("mine")
    newest = publish(tmp_path, 10, keep=1)
    assert CheckpointsFolder(tmp_path).newest() == newest
    assert (tmp_path / "step_00000005" / "manifest.json").read_text() == text
