"""Shards to latents, token ids and features: what they hold, what the loader makes of them, restarts and several ranks."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from megadiff import torchvision_ops
from megadiff.cli.main import main
from megadiff.config.errors import ConfigError, UserError
from megadiff.config.schema import CaptionField, Data, GridSpace, LatentField, Model
from megadiff.data.buckets import Bucket
from megadiff.data.codecs.latents import LatentCodec
from megadiff.data.errors import SampleError
from megadiff.data.packing.encoding import Encoder, Encoding, encode_shards
from megadiff.data.reading.loader import Loader
from megadiff.data.shards.shard import Manifest, Members, Shard, read_manifest, write_manifest, write_shard
from tests.data.small import TOKENIZER, make_autoencoder, png, sample, tiny, write_source
from tests.ranks import ROOT, fork_megadiff

FACTOR = 4
SCALE = 0.18215


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_autoencoder(tmp_path_factory.mktemp("autoencoder"))


def array(data: bytes) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = np.load(io.BytesIO(data))
    return found


def samples_of(folder: Path) -> dict[str, Members]:
    found = {}
    for entry in read_manifest(str(folder)).shards:
        shard = Shard(entry.name, folder / entry.name)
        found |= {shard.key(place): shard.members(place) for place in range(len(shard))}
    return found


def model_of(image: dict[str, Any], positions: str = "sincos") -> Model:
    grid = {"space": {"kind": "grid", "channels": 4, "patch": 2, **image}, "process": {"kind": "gaussian"}}
    text = tiny()[1].modalities["text"].model_dump()
    modalities = {"image": {**grid, "positions": positions, "tower_depth": 1}, "text": text}
    return Model.model_validate({"modalities": modalities, "width": 32, "heads": 2, "head_dim": 16, "joint_depth": 1})


def data_of(train: Path, **field: Any) -> Data:
    fields = {"image": LatentField(**field), "text": CaptionField(member="tokens.npy", tokenizer=str(TOKENIZER))}
    return Data(train=str(train), fields=fields, lanes=4, workers=0)


def test_latents_are_the_autoencoders_moments_and_tokens_the_tokenizers(tmp_path: Path, autoencoder: str) -> None:
    from diffusers import AutoencoderKL

    address = write_source(tmp_path / "raw", [5, 3])
    encoding = Encoding(autoencoder=autoencoder, tokenizer=str(TOKENIZER), size=32, batch=3, keep=("json",))
    manifest = encode_shards(address, str(tmp_path / "out"), encoding)
    assert manifest is not None
    assert [entry.samples for entry in manifest.shards] == [5, 3]
    network = AutoencoderKL.from_pretrained(autoencoder).eval()
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    found = samples_of(tmp_path / "out")
    assert list(found) == [f"{number:05d}" for number in range(8)]
    for number, members in enumerate(found.values()):
        raw = sample(number)
        with torch.no_grad():
            picture = torch.from_numpy(np.array(Image.open(io.BytesIO(raw["png"])))).permute(2, 0, 1)[None] / 127.5 - 1
            moments = network.encode(picture).latent_dist
        latents = array(members["latents.npy"])
        assert (latents.dtype, latents.shape) == (np.float16, (2, 4, 8, 8))
        assert np.allclose(latents[0], moments.mean[0], atol=2e-3)
        assert np.allclose(latents[1], moments.std[0], rtol=2e-3)
        tokens = array(members["tokens.npy"])
        assert tokens.dtype == np.int32
        wanted = [tokenizer.encode(c, add_special_tokens=False).ids for c in json.loads(raw["json"])["captions"]]
        assert [[int(i) for i in row if i >= 0] for row in tokens] == wanted
        assert members["json"] == raw["json"]
        assert set(members) == {"latents.npy", "tokens.npy", "json"}


def test_a_loader_draws_from_encoded_shards_what_it_would_have_tokenized(tmp_path: Path, autoencoder: str) -> None:
    """Same captions, by the same keys; latents about their mean, another at each visit, equal for any batch."""
    raw = write_source(tmp_path / "raw", [16])
    encode_shards(raw, str(tmp_path / "out"), Encoding(autoencoder=autoencoder, tokenizer=str(TOKENIZER), size=32))
    model = model_of({"height": 8, "width": 8})
    pixels = data_of(Path(raw), member="png", autoencoder=autoencoder)
    plain = pixels.model_copy(update={"fields": {**pixels.fields, "text": CaptionField(tokenizer=str(TOKENIZER))}})
    loaders = [Loader(data, model, seed=1, global_samples=16, micro_batch=8) for data in (plain, data_of(tmp_path / "out"))]
    seen = []
    for _ in range(3):
        (one, two), (three, four) = (loader.take() for loader in loaders)
        for raws, encoded in ((one, three), (two, four)):
            assert torch.equal(raws.states["text"], encoded.states["text"])
            assert torch.equal(raws.keys, encoded.keys)
            assert encoded.states["image"].shape == (8, 4, 8, 8)
            assert not torch.equal(raws.states["image"], encoded.states["image"])
        seen.append(three.states["image"][0])
    assert not torch.equal(seen[0], seen[1])
    members = next(iter(samples_of(tmp_path / "out").values()))
    codec = LatentCodec(LatentField(), model.modalities["image"].space)  # type: ignore[arg-type]
    drawn = torch.stack([codec.encode(codec.read(members, key)) for key in range(300)]) / SCALE
    moments = torch.from_numpy(array(members["latents.npy"])).float()
    assert torch.allclose(drawn.mean(0), moments[0], atol=float(moments[1].max()) * 0.3)
    assert torch.allclose(drawn.std(0), moments[1], rtol=0.25)


def test_buckets_are_kept_cropped_to_and_batched_apart(tmp_path: Path, autoencoder: str) -> None:
    shapes = {"16x32": (20, 40), "32x16": (64, 33)}
    entries = []
    for number, (bucket, size) in enumerate(shapes.items()):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        members = {f"{number}{i}": {**sample(i), "png": png(pixels)} for i in range(8)}
        entries.append(write_shard(str(tmp_path / "raw"), f"{number}.tar", members, bucket))
    write_manifest(str(tmp_path / "raw"), Manifest(tuple(entries)))
    encode_shards(str(tmp_path / "raw"), str(tmp_path / "out"), Encoding(autoencoder=autoencoder, tokenizer=str(TOKENIZER)))
    assert [entry.bucket for entry in read_manifest(str(tmp_path / "out")).shards] == list(shapes)
    model = model_of({"height": 8, "width": 8})
    loader = Loader(data_of(tmp_path / "out"), model, seed=1, global_samples=4, micro_batch=4)
    taken = [loader.take()[0] for _ in range(4)]
    assert sorted(tuple(batch.states["image"].shape[2:]) for batch in taken) == [(4, 8), (4, 8), (8, 4), (8, 4)]
    assert sorted(name for batch in taken for name in batch.ids) == sorted(
        f"{shard:06d}.tar/{shard}{i}" for shard in range(2) for i in range(8)
    )
    with pytest.raises(ConfigError, match="positions are learned for one size; take sincos or rope"):
        Loader(
            data_of(tmp_path / "out"), model_of({"height": 8, "width": 8}, "learned"), seed=1, global_samples=4, micro_batch=4
        )


def test_features_of_several_buckets_are_one_mistake_when_the_loader_opens(tmp_path: Path, autoencoder: str) -> None:
    entries = [write_shard(str(tmp_path), f"{b}.tar", {b: sample(1)}, b) for b in ("32x32", "16x64", "16x32")]
    encoded = {"encoded": {"latents.npy": {"scale": SCALE, "factor": FACTOR}}}
    data = data_of(tmp_path).model_copy(update={"features": {"image": "features.npy"}, "lanes": 1})
    data = data.model_copy(update={"fields": {**data.fields, "text": CaptionField(tokenizer=str(TOKENIZER))}})
    model, options = model_of({"height": 8, "width": 8}), {"seed": 1, "global_samples": 1, "micro_batch": 1}
    write_manifest(str(tmp_path), Manifest(tuple(entries), encoded))
    Loader(data, model, **options)
    with pytest.raises(ConfigError, match=r"has buckets \(16x32: 8 features a sample\), and alignment takes 16 of image"):
        Loader(data, model, features={"image": (16, 4)}, **options)
    write_manifest(str(tmp_path), Manifest(tuple(entries[:2]), encoded))
    Loader(data, model, features={"image": (16, 4)}, **options)


def test_features_are_a_vision_models_tokens_without_those_before_them(tmp_path: Path) -> None:
    torchvision_ops.declare_missing()
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**size, image_size=14, patch_size=7)).save_pretrained(tmp_path / "vision")
    encoder = Encoder(Encoding(features=str(tmp_path / "vision"), feature_stride=8))
    made = encoder({"a": sample(1)}, Bucket(16, 32)).samples
    encoder.close()
    features = array(made["a"]["features.npy"])
    assert (features.dtype, features.shape) == (np.float16, (2 * 4, 16))
    assert set(made["a"]) == {"features.npy"}


def test_samples_that_cannot_be_encoded_are_left_out_named_and_counted(tmp_path: Path, autoencoder: str) -> None:
    bad = {1: {**sample(1), "png": b"no picture"}, 2: {**sample(2), "json": b"{}"}, 4: {"json": sample(4)["json"]}}
    address = write_source(tmp_path / "raw", [6], bad)
    encoding = Encoding(autoencoder=autoencoder, tokenizer=str(TOKENIZER), size=32, batch=2)
    manifest = encode_shards(address, str(tmp_path / "out"), encoding)
    assert manifest is not None
    assert list(samples_of(tmp_path / "out")) == ["00000", "00003", "00005"]
    assert manifest.facts["counts"] == {"left out": 3, "written": 3}
    told = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert [entry["source"] for entry in told] == ["000.tar/00001", "000.tar/00002", "000.tar/00004"]
    assert "no readable picture" in told[0]["detail"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"autoencoder": None}, "there is nothing to encode"),
        ({"autoencoder": "nowhere"}, "--autoencoder: nowhere has no config.json"),
        ({"tokenizer": "nowhere.json"}, r"tokenizer nowhere\.json does not exist"),
        ({"features": "nowhere"}, "--features: nowhere has no config.json"),
        ({"size": None}, "give --size PX"),
        ({"size": 30}, "pictures of 30x30 px do not divide into steps of 4 px"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(tmp_path: Path, autoencoder: str, changes: dict[str, Any], said: str) -> None:
    address = write_source(tmp_path / "raw", [2])
    with pytest.raises(UserError, match=said):
        encode_shards(address, str(tmp_path / "out"), Encoding(**{"autoencoder": autoencoder, "size": 32, **changes}))


def test_other_settings_in_a_folder_with_shards_are_refused(tmp_path: Path, autoencoder: str) -> None:
    address = write_source(tmp_path / "raw", [2])
    encode_shards(address, str(tmp_path / "out"), Encoding(autoencoder=autoencoder, size=32))
    encode_shards(address, str(tmp_path / "out"), Encoding(autoencoder=autoencoder, size=32, batch=1))  # makes no difference
    with pytest.raises(UserError, match=r"made with other settings .*size: 32 there, 16 here"):
        encode_shards(address, str(tmp_path / "out"), Encoding(autoencoder=autoencoder, size=16))


def test_fields_that_do_not_fit_the_encoded_shards_are_refused(tmp_path: Path, autoencoder: str) -> None:
    address = write_source(tmp_path / "raw", [4])
    encode_shards(address, str(tmp_path / "out"), Encoding(autoencoder=autoencoder, tokenizer=str(TOKENIZER), size=32))
    model, settings = model_of({"height": 8, "width": 8}), {"seed": 1, "global_samples": 4, "micro_batch": 4}
    good = data_of(tmp_path / "out")
    text = {"member": "tokens.npy", "tokenizer": str(TOKENIZER)}
    other = tmp_path / "tokenizer.json"
    other.write_text(TOKENIZER.read_text() + " ")
    for field, said in (
        ({"image": LatentField(scale=0.13025)}, r"image\.scale is 0\.13025, and .* holds latents for 0\.18215"),
        ({"text": CaptionField(**{**text, "tokenizer": str(other)})}, r"is not the one that made the tokens"),
        ({"text": CaptionField(**text, cleaning="clip")}, r"cleaning is clip, and .* holds tokens of plain"),
    ):
        with pytest.raises(ConfigError, match=said):
            Loader(good.model_copy(update={"fields": {**good.fields, **field}}), model, **settings)


@pytest.mark.parametrize(
    ("ids", "said"), [([[0, 99999]], "has the id 99999"), ([1, 2], r"int32 \[2\]"), ([[-7, 2]], "has the id 2")]
)
def test_token_ids_that_cannot_be_are_the_samples_fault(ids: list[Any], said: str) -> None:
    codec = Loader(tiny()[0], tiny()[1], seed=0, global_samples=8, micro_batch=8)._codecs.codecs["text"]
    codec.member = "tokens.npy"  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    np.save(buffer, np.array(ids, dtype=np.int32))
    with pytest.raises(SampleError, match=said):
        codec.load({"tokens.npy": buffer.getvalue()}, 0)


def test_latents_beside_moments_are_moments_without_deviation() -> None:
    codec = LatentCodec(LatentField(scale=2.0), GridSpace(channels=1, height=2, width=2))
    latent, moments = np.full((1, 2, 2), 3, dtype=np.float16), np.stack([np.ones((1, 2, 2)), np.zeros((1, 2, 2))])
    stacked = torch.from_numpy(codec.stack([latent, None, moments.astype(np.float16)]))
    assert codec.finish(stacked, torch.arange(3))[:, 0, 0, 0].tolist() == [6.0, 0.0, 2.0]


@pytest.mark.distributed
@pytest.mark.slow  # tests/s3/test_raw_to_training.py does the same on S3
@pytest.mark.timeout(180)
def test_two_processes_that_are_killed_and_started_again_make_each_shard_once(tmp_path: Path, autoencoder: str) -> None:
    address = write_source(tmp_path / "raw", [3] * 12)
    out = tmp_path / "out"
    verb = ["data", "encode", address, str(out), "--autoencoder", autoencoder, "--tokenizer", str(TOKENIZER), "--size", "32"]
    command = [sys.executable, "-m", "megadiff", "launch", "--processes", "2", "--", *verb]
    running = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 100
    while len(list(out.glob(".units/0*.json"))) < 3 and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    records = {path.name: path.stat().st_mtime_ns for path in out.glob(".units/0*.json")}
    assert records
    assert not (out / "manifest.json").exists() or len(records) == 12
    done = fork_megadiff(*verb, world=2)
    assert done.returncode == 0, done.stderr
    assert f"encoded: {out} (36 samples in 12 shards)" in done.stdout
    for name, written in records.items():
        assert (out / ".units" / name).stat().st_mtime_ns == written
    assert list(samples_of(out)) == [f"{number:05d}" for number in range(36)]
    encoding = Encoding(autoencoder=autoencoder, tokenizer=str(TOKENIZER), size=32)
    assert encode_shards(address, str(tmp_path / "once"), encoding) == read_manifest(str(out))


def test_pack_encodes_on_the_way(tmp_path: Path, autoencoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(sample(number)["png"])
        (folder / f"{number}.txt").write_text(f"one {number}\n")
    command = ["data", "pack", str(folder), str(tmp_path / "out"), "--autoencoder", autoencoder, "--size", "32"]
    assert main([*command, "--tokenizer", str(TOKENIZER)]) == 0
    assert "4 samples in 1 shards" in capsys.readouterr().out
    found = samples_of(tmp_path / "out")
    assert all(set(members) == {"latents.npy", "tokens.npy"} for members in found.values())
    loader = Loader(data_of(tmp_path / "out"), model_of({"height": 8, "width": 8}), seed=1, global_samples=4, micro_batch=4)
    assert (loader.take()[0].weight == 1).all()


def test_pack_tells_why_and_of_which_source_a_sample_could_not_be_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.png").write_bytes(sample(number)["png"])
        (folder / f"{number:02d}.txt").write_text(f"one {number}\n")
    failing = Encoder._tokens

    def tokens(self: Encoder, members: Any) -> Any:
        if json.loads(members["json"])["captions"][0] != "one 7":
            raise SampleError("its caption has no end")
        return failing(self, members)

    monkeypatch.setattr(Encoder, "_tokens", tokens)
    assert main(["data", "pack", str(folder), str(tmp_path / "out"), "--tokenizer", str(TOKENIZER)]) == 0
    told = [json.loads(line) for line in (tmp_path / "out/left_out.jsonl").read_text().splitlines()]
    numbers = [number for number in range(40) if number != 7][:20]
    assert told == [
        {"source": f"{number:02d}.png", "reason": "cannot be encoded", "detail": "its caption has no end"} for number in numbers
    ]
    assert read_manifest(str(tmp_path / "out")).facts["counts"] == {"left out: cannot be encoded": 39, "written": 1}
