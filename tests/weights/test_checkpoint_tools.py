"""Looking at checkpoints, comparing them, and one file out of many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megadiff.cli import main as cli
from megadiff.config.run_folder import CheckpointsFolder
from megadiff.config.schema import Checkpointing
from megadiff.weights import checkpoint, checkpoint_tools
from megadiff.weights.boxes import Extent
from megadiff.weights.checkpoint import CheckpointError, CheckpointManifest, CheckpointReader, FileEntry, tensor_key
from megadiff.weights.checkpoint_tools import consolidate, differences, faults

WEIGHT, FROZEN = torch.arange(12.0), torch.tensor([7.0, 8.0])


def publish(folder: Path, weight: torch.Tensor = WEIGHT, cuts: tuple[tuple[int, int], ...] = ((0, 5), (5, 12))) -> Path:
    """A checkpoint of a trained parameter [3, 4] in two files and a frozen one [2]."""
    checkpoint.begin(CheckpointsFolder(folder), 1)
    files: list[FileEntry] = []
    for rank, (start, stop) in enumerate(cuts):
        kinds = {"weight": weight, "ema.main": 2 * weight, "exp_avg": 3 * weight, "exp_avg_sq": weight**2}
        tensors = {tensor_key(kind, "heads.picture.weight"): values[start:stop] for kind, values in kinds.items()}
        extents = {"heads.picture.weight": Extent(start, stop)}
        if rank == 0:
            tensors[tensor_key("weight", "embed.gain")] = FROZEN
            extents["embed.gain"] = Extent(0, 2)
        files.append(checkpoint.write_rank_file(CheckpointsFolder(folder).partial(1), rank, tensors, extents))
    parameters = {"heads.picture.weight": ((3, 4), True), "embed.gain": ((2,), False)}
    progress = {"optimizer_step": 1, "adam_steps": 1, "samples": 64}
    manifest = CheckpointManifest("first", parameters, ("main",), progress, "config", tuple(files))
    return checkpoint.publish(CheckpointsFolder(folder), 1, manifest, Checkpointing())


def nothing() -> None:
    """No progress to show."""


@pytest.mark.parametrize("piece", [1, 5, 100])
def test_a_consolidated_file_holds_every_parameter_whole(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(checkpoint_tools, "PIECE", piece)
    reader = CheckpointReader(publish(tmp_path / "run"))
    for kind, of_trained in (("weight", WEIGHT), ("ema.main", 2 * WEIGHT)):
        consolidate(reader, kind, tmp_path / kind, nothing)
        held = load_file(tmp_path / kind)
        assert torch.equal(held["heads.picture.weight"], of_trained.view(3, 4))
        assert torch.equal(held["embed.gain"], FROZEN)
    consolidate(reader, "exp_avg", tmp_path / "moments", nothing)
    assert list(load_file(tmp_path / "moments")) == ["heads.picture.weight"]
    with pytest.raises(CheckpointError, match="is there already"):
        consolidate(reader, "weight", tmp_path / "weight", nothing)


def test_a_checkpoint_is_the_same_as_itself_however_it_was_cut(tmp_path):
    one, other = (CheckpointReader(publish(tmp_path / str(cut), cuts=((0, cut), (cut, 12)))) for cut in (3, 9))
    assert list(differences(one, other, "weight")) == []


def test_differences_are_told_by_parameter_and_size(tmp_path):
    changed = WEIGHT.clone()
    changed[7] += 0.5
    one, other = CheckpointReader(publish(tmp_path / "a")), CheckpointReader(publish(tmp_path / "b", changed))
    (found,) = differences(one, other, "weight")
    assert found.name == "heads.picture.weight"
    assert found.largest == pytest.approx(0.5)
    assert found.relative == pytest.approx(0.5 / WEIGHT.norm().item())


def test_a_number_that_is_not_one_is_a_difference(tmp_path):
    broken = WEIGHT.clone()
    broken[0] = torch.nan
    readers = [CheckpointReader(publish(tmp_path / name, weight)) for name, weight in (("a", WEIGHT), ("b", broken))]
    assert len(list(differences(*readers, "weight"))) == 1  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("cuts", "fault"),
    [
        (((0, 5), (6, 12)), "elements 5 to 6 are missing"),
        (((0, 5), (4, 12)), "elements 5 to 4 are held twice"),
        (((0, 5), (5, 11)), "11 of 12 elements are held"),
    ],
)
@pytest.mark.parametrize("piece", [1, 5, 100])
def test_numbers_that_no_file_or_two_files_hold_are_faults(tmp_path, monkeypatch, cuts, fault, piece):
    monkeypatch.setattr(checkpoint_tools, "PIECE", piece)
    (found,) = faults(CheckpointReader(publish(tmp_path, cuts=cuts)), nothing)
    assert fault in found


def test_the_verbs_tell_what_a_checkpoint_holds_and_whether_it_is_whole(tmp_path, capsys):
    folder = publish(tmp_path / "run")
    assert cli.main(["checkpoint", "inspect", str(folder), "--parameters"]) == 0
    told = capsys.readouterr().out
    assert "| picture | 12 | 0 |" in told
    assert "| heads.picture.weight | 3 x 4 | yes | 2 |" in told
    assert cli.main(["checkpoint", "inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"] == {
        "picture": {"trained": 12, "frozen": 0},
        "joint": {"trained": 0, "frozen": 2},
    }
    assert cli.main(["checkpoint", "verify", str(folder)]) == 0
    file = folder / "rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert cli.main(["checkpoint", "verify", str(folder)]) == 2
    assert "rank_00001.safetensors is damaged" in capsys.readouterr().err


def test_diff_has_the_exit_code_of_diff(tmp_path, capsys):
    one, other = publish(tmp_path / "a"), publish(tmp_path / "b", WEIGHT + 1)
    assert cli.main(["checkpoint", "diff", str(one), str(one)]) == 0
    assert cli.main(["checkpoint", "diff", str(one), str(other), "--kind", "ema.main"]) == 1
    assert "1 of 2 parameters differ" in capsys.readouterr().out
    assert cli.main(["checkpoint", "diff", str(one), str(other), "--kind", "ema.long"]) == 2
    assert "--kind ema.long: " in capsys.readouterr().err
    assert cli.main(["checkpoint", "consolidate", str(one), str(tmp_path / "all.safetensors")]) == 0
    assert torch.equal(load_file(tmp_path / "all.safetensors")["embed.gain"], FROZEN)
