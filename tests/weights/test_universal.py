"""DeepSpeed's universal format without DeepSpeed: what is written is read back, and what is wrong is one sentence."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megadiff.cli import main as cli
from megadiff.weights.boxes import Extent
from megadiff.weights.checkpoint import CheckpointError, CheckpointReader
from megadiff.weights.universal import MODEL_STATES, UniversalReader, open_source, write
from tests.weights.test_checkpoint_tools import FROZEN, WEIGHT, nothing, publish

NAME = "heads.picture.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(CheckpointReader(publish(tmp_path / "run")), tmp_path / "universal/step_1", nothing)
    return tmp_path / "universal/step_1"


def test_a_universal_folder_holds_weights_moments_and_step(folder: Path) -> None:
    stored = {path.stem: torch.load(path, weights_only=True) for path in (folder / "zero" / NAME).iterdir()}
    assert torch.equal(stored["fp32"]["param"], WEIGHT.view(3, 4))
    assert torch.equal(stored["exp_avg"]["param"], 3 * WEIGHT.view(3, 4))
    assert torch.equal(stored["exp_avg_sq"]["param"], WEIGHT.view(3, 4) ** 2)
    assert stored["step"] == 1
    assert [path.name for path in (folder / "zero/embed.gain").iterdir()] == ["fp32.pt"]
    assert (folder.parent / "latest_universal").read_text() == folder.name
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest_universal", folder.name]


def test_the_optimizer_of_whoever_loads_it_keeps_its_groups_and_hyper_parameters(folder: Path) -> None:
    state = torch.load(folder / "zero/optimizer_state.pt", weights_only=True)
    assert state["param_groups"] == state["optimizer_state_dict"]["param_groups"] == [{}, {}]


def test_imported_weights_without_any_step_are_written(tmp_path: Path) -> None:
    reader = CheckpointReader(publish(tmp_path / "run"))
    reader.manifest = dataclasses.replace(reader.manifest, progress={"optimizer_step": 0})
    write(reader, tmp_path / "universal", nothing)
    assert torch.load(tmp_path / "universal/zero" / NAME / "step.pt", weights_only=True) == 0


def test_what_is_written_is_read_back_whole_and_in_parts(folder: Path, tmp_path: Path) -> None:
    reader = open_source(folder)
    assert reader.manifest.parameters == {NAME: ((3, 4), True), "embed.gain": ((2,), False)}
    assert reader.weight_kind("raw") == "weight"
    columns = Extent(1, 5, (((0, 3), (1, 3)),))
    for kind, values in {"weight": WEIGHT, "exp_avg": 3 * WEIGHT, "exp_avg_sq": WEIGHT**2}.items():
        assert torch.equal(reader.read(kind, NAME, Extent(0, 12)), values)
        assert torch.equal(reader.read(kind, NAME, columns), values.view(3, 4)[:, 1:3].flatten()[1:5])
    assert torch.equal(reader.read("weight", "embed.gain", Extent(0, 2)), FROZEN)
    with pytest.raises(CheckpointError, match="was frozen there"):
        reader.read("exp_avg", "embed.gain", Extent(0, 2))


def test_flat_tensors_of_zero3_take_their_shapes_from_the_model_states(folder: Path) -> None:
    file = folder / "zero" / NAME / "fp32.pt"
    torch.save(WEIGHT, file)
    assert UniversalReader(folder).manifest.parameters[NAME] == ((3, 4), True)
    assert torch.equal(UniversalReader(folder).read("weight", NAME, Extent(2, 7)), WEIGHT[2:7])
    (folder / MODEL_STATES[1]).unlink()
    with pytest.raises(CheckpointError, match=r"zero_pp_rank_0_mp_rank_00_model_states\.pt is missing"):
        UniversalReader(folder)


def test_averages_cannot_be_had_from_a_universal_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no averages; write initialise\.weights: raw"):
        open_source(folder).weight_kind("ema")


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("fp32.pt", b"", "cannot be read"),
        ("fp32.pt", {"params": torch.zeros(3)}, "holds no tensor under param"),
        ("fp32.pt", {"param": torch.nn.Linear(1, 1)}, "cannot be read"),
        ("exp_avg.pt", None, "has exp_avg_sq.pt, but not the other"),
    ],
)
def test_what_is_missing_or_damaged_is_one_sentence(folder: Path, file: str, content: object, fault: str) -> None:
    path = folder / "zero" / NAME / file
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=fault) as caught:
        UniversalReader(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_parameters_is_no_universal_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "zero").mkdir()
    with pytest.raises(CheckpointError, match=r"has no PARAMETER/fp32\.pt"):
        open_source(tmp_path)


def test_the_tools_take_a_universal_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = str(tmp_path / "run/step_00000001")
    assert cli.main(["checkpoint", "inspect", str(folder), "--parameters"]) == 0
    assert "| picture | 12 | 0 |" in capsys.readouterr().out
    for kind in ("weight", "exp_avg"):
        assert cli.main(["checkpoint", "diff", ours, str(folder), "--kind", kind]) == 0
    assert cli.main(["checkpoint", "verify", str(folder)]) == 0
    back = tmp_path / "back.safetensors"
    assert cli.main(["checkpoint", "consolidate", str(folder), str(back)]) == 0
    assert cli.main(["checkpoint", "consolidate", ours, str(tmp_path / "ours.safetensors")]) == 0
    held = load_file(back)
    for name, values in load_file(tmp_path / "ours.safetensors").items():
        assert torch.equal(held.pop(name), values)
    assert not held
    file = folder / "zero" / NAME / "exp_avg.pt"
    content = file.read_bytes()
    file.write_bytes(content.replace((3 * WEIGHT).numpy().tobytes(), (4 * WEIGHT).numpy().tobytes()))
    assert cli.main(["checkpoint", "verify", str(folder)]) == 2
    assert f"zero/{NAME}/exp_avg.pt is damaged" in capsys.readouterr().err


def test_the_verb_writes_the_universal_format_and_refuses_what_that_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, out = str(publish(tmp_path / "run")), str(tmp_path / "out")
    consolidate = ["checkpoint", "consolidate", "--format", "universal"]
    assert cli.main([*consolidate, ours, out, "--kind", "ema.main"]) == 2
    assert "--kind ema.main: the universal format holds the weights and both moments" in capsys.readouterr().err
    assert cli.main([*consolidate, ours, out]) == 0
    assert torch.equal(open_source(Path(out)).read("exp_avg", NAME, Extent(0, 12)), 3 * WEIGHT)
    assert cli.main([*consolidate, ours, out]) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main([*consolidate, out, str(tmp_path / "again")]) == 2
    assert "in the universal format already" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), CheckpointError("the source is damaged")])
def test_a_folder_that_cannot_be_written_whole_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    reader = CheckpointReader(publish(tmp_path / "run"))
    saved: list[object] = []

    def full(value: object, path: Path) -> None:
        if len(saved) == 3:
            raise fault
        saved.append(value)

    monkeypatch.setattr("megadiff.weights.universal._save", full)
    with pytest.raises(CheckpointError, match=r"No space left on device|the source is damaged"):
        write(reader, tmp_path / "universal/step_1", nothing)
    assert list((tmp_path / "universal").iterdir()) == []


def test_a_universal_folder_can_be_copied_anywhere(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert open_source(tmp_path / "elsewhere").manifest == open_source(folder).manifest
