"""A raw folder of pictures with captions to trained steps, all of it on the S3 server, killed on the way three times."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

from megadiff.data.shards.shard import Shard, read_manifest
from megadiff.storage import store
from megadiff.storage.errors import StorageError
from tests.data.small import TOKENIZER, TRAIN, make_autoencoder
from tests.ranks import ROOT, finish, fork_megadiff, kill_when, start_megadiff

pytestmark = [pytest.mark.s3, pytest.mark.distributed, pytest.mark.timeout(400)]

PAIRS, STEPS = 240, 20
SHAPES = [(48, 48), (72, 48), (48, 72)]


def write_raw(folder: Path) -> None:
    """Emoji as JPEGs of three shapes, with their captions beside them."""
    folder.mkdir()
    entry = read_manifest(str(TRAIN)).shards[0]
    shard = Shard(entry.name, TRAIN / entry.name)
    for number in range(PAIRS):
        members = shard.members(number % len(shard))
        picture = Image.open(io.BytesIO(members["png"])).convert("RGB").resize(SHAPES[number % len(SHAPES)])
        picture.save(folder / f"{number:04d}.jpg", quality=90)
        captions = json.loads(members["json"])["captions"]
        (folder / f"{number:04d}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


def run_file(folder: Path, out: str, autoencoder: str) -> Path:
    """A run of one stage over two processes, with a cache on this node."""
    tree = {
        "base": str(ROOT / "tests" / "tiny.yaml"),
        "folder": str(folder / "run"),
        "launch": {"processes": 2},
        "data": {
            "train": out,
            "held_out": None,
            "lanes": 4,
            "cache": {"folder": str(folder / "cache")},
            "fields": {
                "text": {"kind": "caption", "member": "tokens.npy", "tokenizer": str(TOKENIZER)},
                "image": {"kind": "latents", "member": "latents.npy", "autoencoder": autoencoder},
            },
        },
        "model": {"modalities": {"image": {"space": {"kind": "grid", "channels": 4, "height": 8, "width": 8, "patch": 2}}}},
        "stages": [{"name": "joint", "steps": STEPS, "checkpoint": {"every_steps": 4, "keep": 2}}],
    }
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


def finished(process: subprocess.Popen[str]) -> str:
    return _output(finish(process))


def forked(*arguments: str, world: int = 1) -> str:
    """What a command line says that nothing kills, as one process or several."""
    return _output(fork_megadiff(*arguments, world=world))


def _output(ended: subprocess.CompletedProcess[str]) -> str:
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


def units_done(out: str) -> int:
    try:
        return sum(name.endswith(".json") and name != "job.json" for name in store.list_names(f"{out}/.units"))
    except StorageError:
        return 0


def losses(folder: Path) -> dict[int, float]:
    """By step; a step that was done again after a kill is there twice and must be the same."""
    found: dict[int, float] = {}
    for line in (folder / "run" / "joint" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        loss = row["loss"]
        assert found.setdefault(row["step"], loss) == loss
    return found


def test_pack_encode_and_train_killed_in_each_end_as_if_never_stopped(bucket: str, tmp_path: Path) -> None:
    write_raw(tmp_path / "raw")
    autoencoder = make_autoencoder(tmp_path / "autoencoder")
    pairs, latents = f"{bucket}/pairs", f"{bucket}/latents"

    pack = ["data", "pack", str(tmp_path / "raw"), pairs, "--buckets", "32x32,32x48,48x32", "--shard-samples", "5"]
    kill_when(start_megadiff(*pack), lambda: units_done(pairs) >= 2)
    assert not store.exists(f"{pairs}/manifest.json")
    assert f"{PAIRS} samples" in forked(*pack)

    encode = ["data", "encode", pairs, latents, "--autoencoder", autoencoder, "--tokenizer", str(TOKENIZER)]
    command = ["launch", "--processes", "2", "--", *encode]
    kill_when(start_megadiff(*command), lambda: units_done(latents) >= 2)
    assert not store.exists(f"{latents}/manifest.json")
    assert f"{PAIRS} samples" in forked(*encode, world=2)
    assert "whole" in forked("data", "verify", latents, "--decode")

    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    train = ["--deepspeed", "ds_configs/zero1.json"]
    run = str(run_file(broken, latents, autoencoder))
    metrics = broken / "run" / "joint" / "metrics.jsonl"
    kill_when(start_megadiff("launch", run, *train), lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 7)
    finished(start_megadiff("launch", run, *train))
    forked("train", str(run_file(unbroken, latents, autoencoder)), "--stage", "joint", *train, world=2)
    assert losses(broken) == losses(unbroken)
    assert sorted(losses(broken)) == list(range(1, STEPS + 1))
