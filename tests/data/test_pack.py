"""Raw pictures with captions to shards: awkward pictures, buckets and sides, kills, processes, mistakes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megadiff.config.errors import UserError
from megadiff.data.buckets import Bucket, Buckets, area_buckets
from megadiff.data.packing import pack as packing_module
from megadiff.data.packing.build import kind_of, open_source
from megadiff.data.packing.pack import Packing, Transformed, pack
from megadiff.data.packing.source import expand
from megadiff.data.shards.shard import Members, Shard, read_manifest
from megadiff.storage import addresses, clients, store
from tests import ranks
from tests.data.packs import (
    encoded,
    facts_by_source,
    img2dataset_tar,
    packed,
    rotated,
    samples_in,
    tree,
    write_parquet,
    write_tar,
)
from tests.forks import Forked, start_forked
from tests.ranks import ROOT, free_port
from tests.storage.servers import Mood, server_of

# -------------------------------------------------------------------------------------------------------- the pictures


def packed_picture(tmp_path: Path, name: str, data: bytes, **options: Any) -> tuple[str, Image.Image, dict[str, Any], Any]:
    """(ending, picture, facts, shard's entry) of one picture."""
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / name).write_bytes(data)
    (raw / name).with_suffix(".txt").write_text("one")
    manifest = packed(raw, tmp_path / "out", packing=Packing(**options))
    (members,) = samples_in(tmp_path / "out").values()
    facts = json.loads(members.pop("json"))
    ((ending, stored),) = members.items()
    picture = Image.open(io.BytesIO(stored))
    assert {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[ending] == picture.format
    assert picture.getexif().get(0x0112) is None or stored == data
    return ending, picture, facts, manifest.shards[0]


def test_size_scales_the_shorter_edge_down(tmp_path: Path) -> None:
    ending, picture, facts, _ = packed_picture(tmp_path, "a.png", encoded(90, 60, "PNG"), size_px=30)
    assert (ending, picture.size, picture.mode) == ("jpg", (45, 30), "RGB")
    assert (facts["width"], facts["height"]) == (45, 30)


def test_a_picture_that_is_not_larger_keeps_its_bytes(tmp_path: Path) -> None:
    data = encoded(90, 60, "PNG")
    ending, *_ = packed_picture(tmp_path, "a.jpg", data, size_px=60)
    assert ending == "png"
    assert next(iter(samples_in(tmp_path / "out").values()))["png"] == data


def test_exif_orientation_is_applied_when_a_picture_is_encoded_anew(tmp_path: Path) -> None:
    buckets = Buckets([Bucket(48, 32), Bucket(32, 48)])
    _, picture, facts, entry = packed_picture(tmp_path, "a.jpg", rotated(90, 60), size_px=30, buckets=buckets)
    assert picture.size == (30, 45)
    assert (facts["width"], facts["height"], entry.bucket) == (30, 45, "48x32")
    left, right = np.asarray(picture.convert("L"), dtype=float)[:, [0, -1]].mean(0)
    top, bottom = np.asarray(picture.convert("L"), dtype=float)[[0, -1]].mean(1)
    assert bottom - top > 150, "the ramp that ran to the right now runs down"
    assert abs(left - right) < 60


def test_a_rotated_picture_that_keeps_its_bytes_counts_as_it_is_seen(tmp_path: Path) -> None:
    buckets = Buckets([Bucket(48, 32), Bucket(32, 48)])
    _, _, facts, entry = packed_picture(tmp_path, "a.jpg", rotated(90, 60), buckets=buckets)
    assert (facts["width"], facts["height"], entry.bucket) == (60, 90, "48x32")


@pytest.mark.parametrize("format", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    ("mode", "source"), [("CMYK", "JPEG"), ("L", "JPEG"), ("RGBA", "PNG"), ("P", "GIF"), ("1", "PNG"), ("LA", "PNG")]
)
def test_every_mode_is_encoded_anew_with_its_colours(tmp_path: Path, mode: str, source: str, format: str) -> None:
    ending, picture, _, _ = packed_picture(
        tmp_path, f"a.{source.lower()}", encoded(90, 60, source, mode), size_px=30, format=format
    )
    assert ending == format
    assert picture.mode in ("L", "RGB", "RGBA")
    if mode != "1":
        wanted = np.linspace(0, 200, 45) + 25
        assert np.abs(np.asarray(picture.convert("L"), dtype=float).mean(0) - wanted).max() < 12


def test_a_see_through_picture_is_laid_on_white_as_jpg(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (60, 60), (255, 0, 0, 0)).save(buffer, "PNG")
    _, picture, _, _ = packed_picture(tmp_path, "a.png", buffer.getvalue(), size_px=30)
    assert np.asarray(picture).min() > 250


@pytest.mark.parametrize("source", ["PNG", "TIFF"])
def test_sixteen_bit_greys_keep_their_brightness(tmp_path: Path, source: str) -> None:
    ramp = np.broadcast_to(np.linspace(0, 65535, 90), (60, 90)).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, source)
    _, picture, _, _ = packed_picture(tmp_path, f"a.{source.lower()}", buffer.getvalue(), size_px=30)
    assert np.abs(np.asarray(picture, dtype=float).mean(0) - np.linspace(0, 255, 45)).max() < 5


@pytest.mark.parametrize("source", ["BMP", "TIFF", "GIF"])
def test_formats_that_shards_do_not_hold_become_png(tmp_path: Path, source: str) -> None:
    data = encoded(20, 10, source, "P" if source == "GIF" else "RGB")
    ending, picture, _, _ = packed_picture(tmp_path, f"a.{source.lower()}", data)
    assert ending == "png"
    assert np.array_equal(picture.convert("RGB"), Image.open(io.BytesIO(data)).convert("RGB"))


# ---------------------------------------------------------------------------------------------------- shards and sides


def test_a_shard_holds_one_bucket(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for number in range(20):
        width, height = ((30, 60), (60, 30), (40, 40))[number % 3]
        (tmp_path / f"raw/{number:02d}.png").write_bytes(encoded(width, height, "PNG"))
        (tmp_path / f"raw/{number:02d}.txt").write_text(str(number))
    buckets = Buckets([Bucket(32, 32), Bucket(16, 32), Bucket(32, 16)])
    manifest = packed(tmp_path / "raw", tmp_path / "out", packing=Packing(shard_samples=4, buckets=buckets))
    assert sorted((entry.bucket, entry.samples) for entry in manifest.shards) == [
        ("16x32", 3),
        ("16x32", 4),
        ("32x16", 3),
        ("32x16", 4),
        ("32x32", 2),
        ("32x32", 4),
    ]
    for entry in manifest.shards:
        shard = Shard(entry.name, tmp_path / "out" / entry.name)
        shapes = {(f["height"] > f["width"]) - (f["height"] < f["width"]) for f in map(_facts(shard), range(len(shard)))}
        assert shapes == {{"16x32": -1, "32x16": 1, "32x32": 0}[str(entry.bucket)]}


def _facts(shard: Shard) -> Any:
    return lambda offset: json.loads(shard.members(offset)["json"])


def test_a_sample_is_held_out_by_its_key_alone(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for number in range(60):
        (tmp_path / f"raw/{number:02d}.png").write_bytes(encoded(format="PNG"))
        (tmp_path / f"raw/{number:02d}.txt").write_text(str(number))
    manifest = packed(tmp_path / "raw", tmp_path / "out", packing=Packing(shard_samples=8, held_out_share=0.3))
    sides = {side: set(facts_by_source(tmp_path / "out" / side)) for side in ("train", "held_out")}
    assert len(sides["train"]) + len(sides["held_out"]) == 60
    assert 8 <= len(sides["held_out"]) <= 28
    assert read_manifest(str(tmp_path / "out/held_out")).facts["split"] == "held_out"
    assert manifest.samples == 60
    for number in range(0, 60, 2):
        (tmp_path / f"raw/{number:02d}.png").unlink()
    packed(tmp_path / "raw", tmp_path / "fewer", packing=Packing(shard_samples=3, held_out_share=0.3))
    kept = {f"{number:02d}.png" for number in range(1, 60, 2)}
    assert {side: set(facts_by_source(tmp_path / "fewer" / side)) for side in sides} == {
        side: names & kept for side, names in sides.items()
    }


def test_a_transform_sees_each_shards_samples_and_bucket(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, str]] = []

    def transform(samples: Mapping[str, Members], bucket: Bucket | None) -> Transformed:
        seen.append((len(samples), str(bucket)))
        return Transformed({key: {"latent.npy": b"x", "json": members["json"]} for key, members in samples.items()}, {})

    packing = Packing(shard_samples=5, buckets=Buckets([Bucket(16, 24)]))
    source = open_source("folder", [str(folder)], 12, tmp_path / "scratch")
    pack(source, str(tmp_path / "out"), packing, transform=transform, identity={"autoencoder": "x"})
    assert seen == [(5, "16x24"), (5, "16x24"), (2, "16x24")]
    assert all(set(members) == {"latent.npy", "json"} for members in samples_in(tmp_path / "out").values())
    with pytest.raises(UserError, match="autoencoder"):
        pack(source, str(tmp_path / "out"), packing, transform=transform, identity={"autoencoder": "y"})


def test_samples_wait_on_disk_and_not_in_memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(folder, tmp_path / "memory")
    monkeypatch.setattr(packing_module, "_IN_MEMORY_BYTES", 1000)
    packed(folder, tmp_path / "disk")
    assert tree(tmp_path / "memory") == tree(tmp_path / "disk")


# ------------------------------------------------------------------------------------------------ kills and processes

KILLED = """
import os, signal, sys
from megadiff.storage import addresses, clients, store
left, partial = int(sys.argv[1]), sys.argv[2] == "half"
write = store._write_file
def counted(address, data):
    global left
    left -= 1
    if left == 0:
        if partial:
            write(address, data)
        os.kill(os.getpid(), signal.SIGKILL)
    write(address, data)
store._write_file = counted
from megadiff.cli.main import main
sys.exit(main(sys.argv[3:]))
"""


def command(*arguments: str, **environment: str) -> Forked:
    return start_forked(["-m", "megadiff", "data", "pack", *arguments], environment={**os.environ, **environment})


def finish(process: Forked) -> str:
    ended = ranks.finish(process)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.distributed
@pytest.mark.parametrize("half", ["whole", "half"])
def test_killed_at_any_write_and_started_again_the_output_is_the_same(folder: Path, tmp_path: Path, half: str) -> None:
    (folder / "a/none.jpg").write_bytes(encoded())
    (folder / "a/cut.jpg").write_bytes(encoded()[:-100])
    (folder / "a/cut.txt").write_text("cut")
    options = ["--shard-samples", "1", "--held-out-share", "0.3"]
    whole = tmp_path / "whole"
    finish(command(str(folder), str(whole), *options))
    out, kills = tmp_path / "out", 0
    (tmp_path / "killed.py").write_text(KILLED)
    for writes in (1, 2, 3, 6, 8, 2, 4):
        arguments = [str(writes), half, "data", "pack", str(folder), str(out), *options]
        done = ranks.finish(start_forked([str(tmp_path / "killed.py"), *arguments], environment=dict(os.environ)))
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
        kills += done.returncode != 0
    finish(command(str(folder), str(out), *options))
    assert kills >= 3
    assert tree(out) == tree(whole)


@pytest.mark.distributed
@pytest.mark.slow  # tests/s3/test_raw_to_training.py kills and goes on too
def test_processes_share_the_work_and_a_killed_one_loses_nothing(tmp_path: Path) -> None:
    for number in range(4):
        img2dataset_tar(tmp_path / f"raw/{number}.tar", 100 * number, 40)
    options = ["--shard-samples", "16", "--size", "12"]
    finish(command(str(tmp_path / "raw"), str(tmp_path / "whole"), *options))
    two = tmp_path / "two"
    first, second = (command(str(tmp_path / "raw"), str(two), *options, RANK=str(rank), WORLD_SIZE="2") for rank in range(2))
    assert finish(first).startswith(f"packed: {two} (160 samples in 12 shards)")
    assert finish(second) == ""
    assert tree(two) == tree(tmp_path / "whole")
    killed = tmp_path / "killed"
    both = [command(str(tmp_path / "raw"), str(killed), *options, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    deadline = time.monotonic() + 60
    while not list(killed.glob("*.tar")) and time.monotonic() < deadline:
        time.sleep(0.01)
    for rank in both:
        os.killpg(rank.pid, signal.SIGKILL)
        rank.communicate()
    finish(command(str(tmp_path / "raw"), str(killed), *options, "--processes", "2"))
    assert tree(killed) == tree(tmp_path / "whole")


@pytest.mark.distributed
def test_a_download_that_was_killed_half_way_goes_on_where_it_stopped(tmp_path: Path) -> None:
    members = {f"sa_{n}.jpg": encoded(60, 40, seed=n) for n in range(3)} | {"sa_9.bin": os.urandom(12 * 2**20)}
    data = write_tar(tmp_path / "t/sa.tar", members)
    (tmp_path / "captions.json").write_text(json.dumps({f"sa_{n}": str(n) for n in range(3)}))
    mood = Mood(data)
    with server_of(mood) as root:
        (tmp_path / "list.txt").write_text(f"sa.tar\t{root}/sa.tar?x=1\t{hashlib.sha256(data).hexdigest()}\n")
        out = tmp_path / "out"
        arguments = [str(tmp_path / "list.txt"), str(out), "--captions", str(tmp_path / "captions.json")]
        stopped = (
            "import os, signal, sys\nfrom megadiff.storage import store\nchunks = store._chunks\n"
            "def some(*a, **k):\n"
            "    for n, chunk in enumerate(chunks(*a, **k)):\n"
            "        yield chunk\n"
            "        if n == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
            "store._chunks = some\nfrom megadiff.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
        )
        killed = subprocess.run([sys.executable, "-c", stopped, "data", "pack", *arguments], cwd=ROOT, check=False)
        assert killed.returncode == -signal.SIGKILL
        mood.requests.clear()
        assert "3 samples" in finish(command(*arguments))
    bodies = [request for request in mood.requests if request.startswith("GET")]
    assert len(bodies) == 1
    assert "bytes=" in bodies[0]
    assert not bodies[0].endswith("bytes=0-")
    assert not (out / ".scratch").exists()


# ----------------------------------------------------------------------------------------------------------------- S3


@pytest.mark.s3
def test_tables_and_tars_on_s3_are_packed_to_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port())
    server.start()
    clients.bucket_client.cache_clear()
    try:
        host, port = server.get_host_and_port()
        named = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_REGION": "us-east-1"}
        for name, value in {**named, "AWS_ACCESS_KEY_ID": "AKIATEST", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
            monkeypatch.setenv(name, value)
        request = urllib.request.Request(f"http://{host}:{port}/pairs", method="PUT")
        urllib.request.urlopen(request).close()
        _pack_on_s3(tmp_path)
    finally:
        server.stop()
        clients.bucket_client.cache_clear()


def _pack_on_s3(tmp_path: Path) -> None:
    names = [f"images/{n}.jpg" for n in range(9)]
    for number, name in enumerate(names[:8]):
        store.write_bytes(f"s3://pairs/raw/{name}", encoded(seed=number))
    write_parquet(tmp_path / "t.parquet", {"image": names, "text": [f"row {n}" for n in range(9)]})
    lines = "".join(json.dumps({"image": name, "text": f"row {n}"}) + "\n" for n, name in enumerate(names))
    store.write_bytes("s3://pairs/raw/t.parquet", (tmp_path / "t.parquet").read_bytes())
    store.write_bytes("s3://pairs/raw/t.jsonl", lines.encode())
    store.write_bytes("s3://pairs/tars/0.tar", img2dataset_tar(tmp_path / "0.tar", 0))
    for source, samples in (("raw/t.parquet", 8), ("raw/t.jsonl", 8), ("tars", 5)):
        out = f"s3://pairs/out/{source.replace('.', '-')}"
        packing = Packing(shard_samples=3)
        opened = open_source("auto", [f"s3://pairs/{source}"], 3, tmp_path / "scratch")
        for _ in range(2):
            manifest = pack(opened, out, packing)
            assert manifest is not None
            assert manifest.samples == samples
        (first, *_) = manifest.shards
        shard = Shard(first.name, store.read_bytes(addresses.join(out, first.name)))
        assert len(shard) == first.samples == 3


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("edge", [2**15 + 1, 10**12])
def test_buckets_end_where_pictures_do(edge: int) -> None:
    with pytest.raises(UserError, match="too large"):
        area_buckets(edge)
    with pytest.raises(UserError, match="too large"):
        Bucket.parse(f"{edge}x1")


def test_another_folder_is_asked_for(folder: Path, tmp_path: Path) -> None:
    packed(folder, tmp_path / "out")
    with pytest.raises(UserError, match="made with other settings"):
        packed(folder, tmp_path / "out", packing=Packing(size_px=10))
    (folder / "new.jpg").write_bytes(encoded())
    with pytest.raises(UserError, match="made with other settings"):
        packed(folder, tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/manifest.json").write_text("{}")
    with pytest.raises(UserError, match="holds another data set"):
        packed(folder, tmp_path / "other")


def test_nothing_to_write_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.png").write_bytes(encoded(format="PNG"))
    with pytest.raises(UserError, match=r"not one sample .*\(left out: 1 no caption\)"):
        packed(tmp_path / "raw", tmp_path / "out")


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("a", ["a"]),
        ("s3://b/{00008..00010}.tar", ["s3://b/00008.tar", "s3://b/00009.tar", "s3://b/00010.tar"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
    ],
)
def test_braces_are_expanded(address: str, wanted: list[str]) -> None:
    assert expand(address) == wanted


def test_the_kind_is_found_out(folder: Path, tmp_path: Path) -> None:
    img2dataset_tar(tmp_path / "tars/0.tar", 0)
    (tmp_path / "mixed").mkdir()
    for name in ("a.tar", "b.parquet"):
        (tmp_path / "mixed" / name).touch()
    assert kind_of(str(folder)) == "folder"
    assert kind_of(str(tmp_path / "tars")) == "tars"
    assert kind_of("s3://b/{000..010}.tar") == "tars"
    assert kind_of("x/train.JSONL") == "table"
    assert kind_of("links.txt") == "sam-llava"
    with pytest.raises(UserError, match="holds table and tars; say which by --kind"):
        kind_of(str(tmp_path / "mixed"))


@pytest.mark.parametrize("kind", ["TIFF", "JPEG", "PNG"])
def test_a_turned_picture_is_scaled_by_its_upright_sides_whatever_its_format(kind: str) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (400, 600)).save(buffer, kind, exif=turned)
    _, data, height, width = packing_module._picture(buffer.getvalue(), Packing(size_px=200))
    assert (height, width) == (200, 300)
    assert Image.open(io.BytesIO(data)).size == (300, 200)
