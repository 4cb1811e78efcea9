"""A modality of another medium, from the files of this folder alone: trained jointly with text, sampled, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megadiff.config.errors import ConfigError, UserError
from megadiff.config.load import load_run
from megadiff.data import npy
from megadiff.data.codecs.base import array_of
from megadiff.data.codecs.build import codec_of
from megadiff.data.shards.shard import Manifest, Shard, write_manifest, write_shard
from megadiff.generation.generate import generate
from megadiff.generation.request import GenerateRequest
from megadiff.weights.loading import export_run, load
from tests.ranks import ROOT, fork_megadiff

RUN = ROOT / "tests/signal/run.yaml"


def write_signals(folder: Path, count: int = 16) -> str:
    """Waves whose caption says how many there are."""
    members = {}
    for number in range(count):
        waves = 1 + number % 4
        signal = np.sin(2 * np.pi * waves * np.arange(64) / 64).astype(np.float32)
        caption = json.dumps({"captions": [f"{waves} waves"]}).encode()
        members[f"{number:03d}"] = {"signal.npy": npy.dump(signal), "json": caption}
    return write_manifest(str(folder), Manifest((write_shard(str(folder), "000.tar", members),)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    own = [f"data.train={write_signals(folder / 'data')}", f"folder={folder / 'run'}"]
    ended = fork_megadiff("train", str(RUN), "--stage", "joint", "--deepspeed", "ds_configs/zero0.json", *own)
    assert ended.returncode == 0, ended.stderr
    return folder / "run"


def ask(checkpoint: Path, out: Path, task: str, **how: Any) -> list[dict[str, Any]]:
    records = generate(GenerateRequest(checkpoint=str(checkpoint), task=task, out=str(out), **how))
    return [json.loads(line) for line in records.read_text().splitlines()]


@pytest.mark.distributed
def test_it_trains_jointly_with_text(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "joint/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert all(np.isfinite(list(line["losses"].values())).all() and set(line["losses"]) == {"text", "signal"} for line in lines)


@pytest.mark.distributed
@pytest.mark.parametrize("form", ["folder", "tar"])
def test_it_is_sampled_given_a_text_and_from_an_export(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.chdir(ROOT)
    export_run(str(trained), str(tmp_path / "export"))
    how = {"prompt": ("2 waves",), "n": 2, "format": form}
    outs = {trained: tmp_path / "of_run", tmp_path / "export": tmp_path / "of_export"}
    found = [ask(place, out, "text-to-signal", **how) for place, out in outs.items()]
    assert [record["generated"] for record in found[0]] == [record["generated"] for record in found[1]]
    name = found[0][0]["generated"]["signal"]["signal"]
    one, other = (signal_in(out, name, form) for out in outs.values())
    assert one.shape == (64,)
    assert one.tolist() == other.tolist()
    with Image.open(tmp_path / "of_run/sheet.png") as sheet:  # two lines of 64 samples, one in each cell
        cells = np.asarray(sheet.convert("L"))[42:138]
    assert all((cells[:, left : left + 96] < 100).any(0).sum() == 64 for left in (12, 120))


def signal_in(out: Path, name: str, form: str) -> np.ndarray[Any, Any]:
    if form == "folder":
        return np.load(out / name)
    path = out / "samples-000000.tar"
    shard = Shard(str(path), path)
    key = shard.key(0)
    return array_of(shard.members(0), name.removeprefix(f"{key}."))


@pytest.mark.distributed
def test_its_data_set_gives_conditions_and_flags_that_are_not_for_it_are_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    manifest = str(trained.parent / "data/manifest.json")
    (record,) = ask(trained, tmp_path / "out", "signal-to-text", data=manifest, n=1)
    given = np.load(tmp_path / "out" / record["given"]["signal"]["signal"])  # a wave of amplitude 1, whatever the gain
    assert given.max() == pytest.approx(1, abs=1e-6)
    with pytest.raises(UserError, match="needs signal: give --data MANIFEST"):
        ask(trained, tmp_path / "none", "signal-to-text")


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ("{kind: 'nowhere.at:All'}", "kind nowhere.at:All cannot be imported"),
        ("{kind: 'tests.signal.field:Space'}", "kind tests.signal.field:Space is no subclass of"),
        ("{kind: 'tests.signal.field:SignalField', gian: 2}", "data.fields.signal: unknown key gian; did you mean gain?"),
        ("{kind: signal}", "kind must be one of pixels, latents, caption, number, class, or the module:Class of another field"),
        ("{kind: pixels}", "data.fields.signal is pixels, which fill 1 or 3 channels"),
    ],
)
def test_a_field_that_is_none_is_one_sentence(field: str, sentence: str) -> None:
    overrides = ["data.train=t.json", "folder=runs/x", "model.modalities.signal.space.channels=2"]
    with pytest.raises(ConfigError) as caught:
        load_run(RUN, [*overrides, f"data.fields.signal={field}"])
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("module", "fault"), [("def (", "SyntaxError"), ("x = y", "NameError"), ("import nothing_like_this", "ModuleNotFoundError")]
)
def test_a_module_that_fails_is_one_sentence_in_a_run_and_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, fault: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"lame_{fault.lower()}"
    (tmp_path / f"{name}.py").write_text(module)
    with pytest.raises(ConfigError, match=f"kind {name}:Field cannot be imported \\({fault}: .*PYTHONPATH") as caught:
        load_run(RUN, ["data.train=t.json", "folder=runs/x", f"data.fields.signal={{kind: '{name}:Field'}}"])
    assert "\n" not in str(caught.value)
    lame = load_run(RUN, ["data.train=t.json", "folder=runs/x"]).data.fields["signal"]
    monkeypatch.setattr(type(lame), "CODEC", f"{name}:Codec")
    with pytest.raises(ConfigError, match=f"cannot be imported: {fault}"):
        codec_of(lame)


def test_a_codec_without_a_medium_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    field = load_run(RUN, ["data.train=t.json", "folder=runs/x"]).data.fields["signal"]
    monkeypatch.setattr(type(field), "CODEC", "megadiff.data.codecs.base:Codec")
    with pytest.raises(ConfigError, match="with a `medium`"):
        codec_of(field)


@pytest.mark.distributed
def test_an_export_says_which_module_it_lacks(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    export_run(str(trained), str(tmp_path / "export"))
    config = tmp_path / "export/megadiff.yaml"
    config.write_text(config.read_text().replace("tests.signal.field:SignalField", "nowhere.at:All"))
    with pytest.raises(UserError, match=r"kind nowhere\.at:All cannot be imported .*PYTHONPATH"):
        load(str(tmp_path / "export"))


def test_a_field_of_its_own_is_written_down_as_it_was_read() -> None:
    run = load_run(RUN, ["data.train=t.json", "folder=runs/x"])
    told = run.model_dump(mode="json")["data"]["fields"]["signal"]
    assert told == {"kind": "tests.signal.field:SignalField", "member": "signal.npy", "gain": 0.5}
    with pytest.raises(ConfigError, match="signal is a signal, which fills a grid of 1 channel and 1 row"):
        load_run(RUN, ["data.train=t.json", "folder=runs/x", "model.modalities.signal.space.channels=2"])
