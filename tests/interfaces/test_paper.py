"""The released weights as a run, and a run as released weights."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megadiff import torchvision_ops
from megadiff.cli import main as cli
from megadiff.config.errors import UserError
from megadiff.config.load import load_run
from megadiff.config.schema import Sampling
from megadiff.data.shards.shard import read_manifest
from megadiff.generation.generate import generate
from megadiff.generation.loading import codecs_of
from megadiff.generation.request import GenerateRequest
from megadiff.interfaces import paper
from megadiff.interfaces.paper import export_paper, import_paper
from megadiff.storage.errors import StorageError
from megadiff.types import Dense, Noised
from megadiff.weights.checkpoint import CheckpointReader
from megadiff.weights.loading import export_run, load
from tests.data.clip_reference import merges, vocabulary
from tests.weights.released import PROJECTING, SMALL, UNEQUAL, released_state

pytestmark = pytest.mark.thorough

SIZE = len(vocabulary())
CONFIG = {**SMALL, "vocab_size": SIZE + 1}
CHECKPOINT = "released/checkpoints/step_00000000"


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("clip") / "bpe_simple_vocab_16e6.txt"
    path.write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges())]))
    return str(path)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return released_state(CONFIG)


@pytest.fixture(scope="module")
def folder(state, tmp_path_factory) -> Path:
    """As on Hugging Face, where a tensor with two names is stored under one."""
    path = tmp_path_factory.mktemp("hub")
    save_file({name: tensor for name, tensor in state.items() if "to_post_branch" not in name}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def snapshot(state, tmp_path_factory) -> Path:
    """Of the released code, wrapped and compiled."""
    path = tmp_path_factory.mktemp("snapshot") / "snapshot.pt"
    raw = {f"module._orig_mod.{name}": tensor for name, tensor in released_state(CONFIG, seed=1).items()}
    torch.save({"model": raw, "ema": state, "optimizer": {"state": {}}, "scheduler": {"last_epoch": 7}}, path)
    return path


@pytest.fixture(scope="module")
def run(folder, words, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "paper"
    import_paper(folder, out, tokenizer=words, autoencoder=None)
    return out


def same_network(state, out, weights="ema") -> bool:
    """Whether a run gives back the released tensors: bit-equal, each under one name."""
    made = out.parent / f"{out.name}-{weights}-back"
    export_paper(str(out), made, weights)
    back = load_file(made / "model.safetensors")
    once = {name: tensor for name, tensor in state.items() if "to_post_branch" not in name}
    positions = (back["pos_embed"] - once.pop("pos_embed")).abs().max() < 1e-6
    return bool(positions) and set(back) == {*once, "pos_embed"} and all(torch.equal(back[n], once[n]) for n in once)


# -------------------------------------------------------------------------------------------------------------- imports


def test_a_hugging_face_folder_comes_back_bit_for_bit(run, state):
    assert same_network(state, run)
    assert json.loads((run.parent / "paper-ema-back/config.json").read_text()) == CONFIG


def test_a_hugging_face_repository_is_taken_as_sample_takes_it(folder, state, words, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", {"someone/diffuse-everything": str(folder)}.__getitem__)
    arguments = ["import-paper", "hf:someone/diffuse-everything", str(tmp_path / "run"), "--vocabulary", words]
    assert cli.main(arguments) == 0
    assert same_network(state, tmp_path / "run")


@pytest.mark.parametrize(("use", "seed"), [("ema", 0), ("raw", 1)])
def test_a_snapshot_gives_the_weights_asked_for(snapshot, words, tmp_path, use, seed):
    out = tmp_path / "run"
    assert import_paper(snapshot, out, tokenizer=words, autoencoder=None, use=use) == ("text", "image")
    assert all(same_network(released_state(CONFIG, seed), out, weights) for weights in ("ema", "raw"))


def test_a_network_without_text_tower_is_read_and_written(words, tmp_path):
    config = {**CONFIG, "text_depth": 0}
    torch.save(released_state(config), tmp_path / "first_stage.pt")
    out = tmp_path / "run"
    assert import_paper(tmp_path / "first_stage.pt", out, tokenizer=words, autoencoder=None) == ("image",)
    assert load(str(out)).predicted == ("image",)
    assert same_network(released_state(config), out)
    assert json.loads((tmp_path / "run-ema-back/config.json").read_text()) == config


@pytest.mark.parametrize("changes", [UNEQUAL, PROJECTING])
def test_networks_of_every_kind_come_back_with_their_configuration(words, tmp_path, changes):
    config = {**CONFIG, **changes}
    torch.save({"ema": released_state(config)}, tmp_path / "snapshot.pt")
    import_paper(tmp_path / "snapshot.pt", tmp_path / "run", tokenizer=words, autoencoder=None)
    assert same_network(released_state(config), tmp_path / "run")
    assert json.loads((tmp_path / "run-ema-back/config.json").read_text()) == config


def test_run_checkpoint_and_export_load_to_the_same_outputs(run, tmp_path):
    export_run(str(run), str(tmp_path / "export"))
    noised = Noised(
        {"text": torch.randint(SIZE + 1, (2, 5)), "image": torch.randn(2, 3, 6, 6)},
        {"text": torch.rand(2), "image": torch.rand(2)},
        {"text": torch.ones(2, 5, dtype=torch.bool), "image": None},
    )
    found = []
    for address in (run, run / CHECKPOINT, tmp_path / "export"):
        with torch.no_grad():
            found.append(load(str(address)).module(noised, {"text": Dense(), "image": Dense()}))
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])


def test_a_run_that_was_moved_brings_its_tokenizer_along(snapshot, words, tmp_path):
    import_paper(snapshot, tmp_path / "first", tokenizer=words, autoencoder=None)
    (tmp_path / "first").rename(tmp_path / "moved")
    loaded = load(str(tmp_path / "moved"))
    assert loaded.data.fields["text"].tokenizer == str(tmp_path / "moved/tokenizer.json")
    assert codecs_of(loaded)["text"].encode("a") is not None


def test_the_run_has_the_settings_of_the_released_code(run):
    stored = load_run(run / "run.yaml")
    stage = stored.stages[0]
    assert stage.optimizer.betas == (0.9, 0.9)
    assert stage.optimizer.decay_all
    assert (stored.data.fields["text"].cleaning, stored.data.fields["image"].scale) == ("clip", 0.18215)
    assert (run / "released/DONE").exists()
    with pytest.raises(StorageError, match="no_training_data_named"):
        read_manifest(stored.data.train)


def test_a_stage_of_another_run_can_start_from_it(run):
    """What `initialise: {source: ..., weights: ema}` reads."""
    reader = CheckpointReader(run / CHECKPOINT)
    assert reader.damaged(reader.manifest.files) == []
    module = load(str(run)).module
    for name, parameter in module.named_parameters():
        assert torch.equal(reader.read_whole(reader.weight_kind("ema"), name), parameter)


def test_it_can_be_sampled_from(run, tmp_path):
    torchvision_ops.declare_missing()
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, **kinds).save_pretrained(tmp_path / "vae")
    request = {
        "checkpoint": str(run),
        "task": "joint",
        "out": str(tmp_path / "out"),
        "n": 2,
        "autoencoder": str(tmp_path / "vae"),
    }
    records = generate(GenerateRequest(**request, sampling=Sampling(steps=2))).read_text().splitlines()
    assert len(records) == 2


def test_the_command_line_imports_and_exports(folder, words, tmp_path, capsys):
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert cli.main(["import-paper", str(folder), run, "--vocabulary", words]) == 0
    assert cli.main(["export-paper", run, out]) == 0
    assert "predicts text and image" in capsys.readouterr().out
    assert cli.main(["export-paper", run, out]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------- mistakes


def refused(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        import_paper(*arguments, **{"autoencoder": None, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_weights_file_is_refused(tmp_path, words):
    out = tmp_path / "run"
    assert "does not exist" in refused(tmp_path / "gone.pt", out, tokenizer=words)
    (tmp_path / "text.pt").write_text("no weights")
    assert "without running code" in refused(tmp_path / "text.pt", out, tokenizer=words)
    torch.save({"ema": [torch.zeros(2)], "model": {"weight": torch.zeros(2)}}, tmp_path / "list.pt")
    assert "no tensors by name under `ema` (it holds ema, model)" in refused(tmp_path / "list.pt", out, tokenizer=words)
    assert "text_embedder.weight" in refused(tmp_path / "list.pt", out, tokenizer=words, use="raw")
    assert "has no model.safetensors" in refused(tmp_path, out, tokenizer=words)
    for address in ("hf:someone/diffuse-everything", "hf:"):
        assert refused(address, out, tokenizer=words).startswith(f"{address} cannot be had: ")
    (tmp_path / "model.safetensors").write_text("no weights")
    assert "model.safetensors cannot be read" in refused(tmp_path, out, tokenizer=words)
    assert not out.exists()


def test_a_folder_has_one_set_of_weights(folder, tmp_path, words):
    assert "--use raw is for a snapshot" in refused(folder, tmp_path / "run", tokenizer=words, use="raw")


def test_a_configuration_that_contradicts_the_weights_is_refused(state, tmp_path, words):
    torch.save(state, tmp_path / "snapshot.pt")
    (tmp_path / "mmdit.yaml").write_text(yaml.safe_dump({"depth": 3}))
    assert "joint_embedding.blocks.2" in refused(tmp_path / "snapshot.pt", tmp_path / "run", tokenizer=words)
    (tmp_path / "mmdit.yaml").write_text("- a list")
    assert "must hold names and values" in refused(tmp_path / "snapshot.pt", tmp_path / "run", tokenizer=words)


def test_weights_that_lack_a_head_of_their_configuration_are_refused(tmp_path, words):
    torch.save(released_state({**CONFIG, "text_depth": 0}), tmp_path / "snapshot.pt")
    (tmp_path / "mmdit.yaml").write_text(yaml.safe_dump({"text_depth": 1}))
    assert "has no text head" in refused(tmp_path / "snapshot.pt", tmp_path / "run", tokenizer=words)


def test_a_vocabulary_of_another_size_is_refused(tmp_path, words):
    torch.save(released_state(SMALL), tmp_path / "snapshot.pt")
    assert f"has {SIZE} ids, and the released weights 13" in refused(
        tmp_path / "snapshot.pt", tmp_path / "run", tokenizer=words
    )


def test_without_a_vocabulary_the_ways_to_one_are_told(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "give --vocabulary FILE" in refused(folder, tmp_path / "run", tokenizer=None)


def test_a_full_folder_is_not_written_to(folder, run, words):
    assert "is there already" in refused(folder, run, tokenizer=words)


@pytest.mark.parametrize(("verb", "writer"), [("import-paper", "_write_checkpoint"), ("export-paper", "save_file")])
def test_weights_that_cannot_be_written_whole_leave_nothing(verb, writer, folder, run, words, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"

    def write(*_: object, **__: object) -> None:
        (out / "part").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(paper, writer, write)
    given = [str(folder), str(out), "--vocabulary", str(words)] if verb == "import-paper" else [str(run), str(out)]
    assert cli.main([verb, *given]) == 2
    assert "out cannot be written: No space left on device" in capsys.readouterr().err
    assert not out.exists()


def test_a_network_of_another_kind_is_not_exported(exported, tmp_path):
    with pytest.raises(UserError, match="the released network has"):
        export_paper(str(exported), tmp_path / "out")
