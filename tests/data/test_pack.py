"""Raw pictures with captions to shards: every kind of source, what is left out and why, kills, processes, awkward pictures."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
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
from megadiff.data.packing.build import Columns, kind_of, open_source
from megadiff.data.packing.pack import Packing, Transformed, left_out, pack, unit_samples
from megadiff.data.packing.source import expand, key_of
from megadiff.data.packing.sources.sam_llava import read_list
from megadiff.data.shards.shard import Manifest, Members, Shard, index_shards, read_manifest
from megadiff.storage import addresses, clients, store
from tests import ranks
from tests.forks import Forked, start_forked
from tests.ranks import ROOT, free_port
from tests.storage.servers import Mood, server_of


def encoded(width: int = 24, height: int = 16, format: str = "JPEG", mode: str = "RGB", seed: int = 0, **options: Any) -> bytes:
    """A smooth picture, different for every seed."""
    ramp = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 50, height)[:, None, None] + seed % 5
    picture = Image.fromarray(np.broadcast_to(ramp, (height, width, 3)).astype(np.uint8)).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def rotated(width: int, height: int) -> bytes:
    """A JPEG whose EXIF says that it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(width, height, exif=exif)


def samples_in(folder: Path | str) -> dict[str, Members]:
    """Every sample of a packed folder by key."""
    found: dict[str, Members] = {}
    for entry in read_manifest(str(folder)).shards:
        path = Path(folder) / entry.name
        data = path.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256)
        shard = Shard(str(path), path)
        assert len(shard) == entry.samples
        for offset in range(len(shard)):
            assert shard.key(offset) not in found
            found[shard.key(offset)] = shard.members(offset)
    return found


def facts_by_source(folder: Path | str) -> dict[str, dict[str, Any]]:
    facts = [json.loads(members["json"]) for members in samples_in(folder).values()]
    return {entry["source"]: entry for entry in facts}


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".scratch" not in path.parts
    }


def packed(source: Any, out: Path, kind: str = "auto", packing: Packing | None = None, **options: Any) -> Manifest:
    """Open a source and pack it in this process."""
    packing = packing or Packing()
    sources = source if isinstance(source, list) else [str(source)]
    opened = open_source(kind, sources, unit_samples(packing), out / ".scratch", **options)
    manifest = pack(opened, str(out), packing)
    assert manifest is not None
    return manifest


def write_tar(path: Path, members: Mapping[str, bytes]) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures in two folders, with captions of every form."""
    for number in range(12):
        place = tmp_path / "raw" / ("a" if number % 2 else "b/deep")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").write_bytes(encoded(seed=number))
        if number % 3 == 0:
            (place / f"{number}.json").write_text(json.dumps({"captions": [f"picture {number}", "again"]}))
        elif number % 3 == 1:
            (place / f"{number}.json").write_text(json.dumps({"caption": f"picture {number}"}))
        else:
            (place / f"{number}.txt").write_text(f"\ufeff picture {number} \r\n\r\nagain\n", encoding="utf-8")
    return tmp_path / "raw"


# ---------------------------------------------------------------------------------------------------------- the sources


def test_a_folder_is_packed_with_its_bytes_untouched(folder: Path, tmp_path: Path) -> None:
    manifest = packed(folder, tmp_path / "out", packing=Packing(shard_samples=5))
    assert [entry.samples for entry in manifest.shards] == [5, 5, 2]
    assert manifest.facts == {"source_kind": "folder", "counts": {"written": 12}}
    found = facts_by_source(tmp_path / "out")
    assert found["a/1.jpg"] == {"captions": ["picture 1"], "width": 24, "height": 16, "source": "a/1.jpg"}
    assert found["b/deep/0.jpg"]["captions"] == found["b/deep/0.jpg"]["captions"] == ["picture 0", "again"]
    assert found["a/5.jpg"]["captions"] == ["picture 5", "again"]
    key = key_of("a/1.jpg")
    assert samples_in(tmp_path / "out")[key]["jpg"] == (folder / "a/1.jpg").read_bytes()
    assert not (tmp_path / "out/left_out.jsonl").exists()


def test_names_of_all_alphabets_and_equal_stems_have_keys_of_their_own(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    names = ["猫.png", "кот.png", "a b.png", "a_b.png", "a.b.png", "a.c.png", "cat.jpg", "cat.png", "x/cat.jpg", "CAT.JPG"]
    for name in names:
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_bytes(encoded(format="PNG" if name.endswith("png") else "JPEG"))
        (raw / name).with_suffix(".txt").write_text("größe 猫", encoding="utf-8")
    broken = os.fsdecode(b"caf\xe9.png")
    (raw / broken).write_bytes(encoded(format="PNG"))
    (raw / broken).with_suffix(".txt").write_text("latin")
    packed(raw, tmp_path / "out")
    assert set(facts_by_source(tmp_path / "out")) == {*names, "caf\\xe9.png"}
    for key, members in samples_in(tmp_path / "out").items():
        assert key.isascii()
        assert key.replace("-", "").replace("_", "").isalnum()
        assert set(members) in ({"png", "json"}, {"jpg", "json"})


def test_endings_in_capitals_are_endings(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for stem, picture, caption in (("D", "PNG", "TXT"), ("E", "Png", "Json"), ("f.g", "png", "TXT"), ("H", "PNG", "txt")):
        (raw / f"{stem}.{picture}").write_bytes(encoded(format="PNG"))
        (raw / f"{stem}.{caption}").write_text('{"caption": "E"}' if caption == "Json" else stem)
    (raw / "H.TXT").write_text("not this one")
    (raw / "d.png").write_bytes(encoded(format="PNG"))
    manifest = packed(raw, tmp_path / "out")
    assert {entry["captions"][0] for entry in facts_by_source(tmp_path / "out").values()} == {"D", "E", "f.g", "H"}
    assert left_out(manifest) == {"no caption": 1}, "d.png is another picture than D.PNG"


def test_linked_folders_are_packed_and_links_in_a_ring_end(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/deep/x.png").write_bytes(encoded(format="PNG"))
    (tmp_path / "elsewhere/deep/x.txt").write_text("linked")
    (folder / "a/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(folder)
    (tmp_path / "elsewhere/self").symlink_to("self")
    (folder / "a/up").symlink_to("..")
    (folder / ".hidden").symlink_to(tmp_path / "elsewhere")
    assert packed(folder, tmp_path / "out").samples == 13
    assert facts_by_source(tmp_path / "out")["a/link/deep/x.png"]["captions"] == ["linked"]
    (tmp_path / "link").symlink_to(folder)
    assert packed(tmp_path / "link", tmp_path / "again").samples == 13


def test_what_cannot_be_used_is_counted_and_named(folder: Path, tmp_path: Path) -> None:
    (folder / "a/none.jpg").write_bytes(encoded())
    (folder / "a/blank.jpg").write_bytes(encoded())
    (folder / "a/blank.txt").write_text(" \n\t\n")
    (folder / "a/odd.jpg").write_bytes(encoded())
    (folder / "a/odd.json").write_text('{"captions": [3, null, ""]}')
    (folder / "a/bad.jpg").write_bytes(encoded())
    (folder / "a/bad.json").write_text('{"captions": [')
    (folder / "a/cut.jpg").write_bytes(encoded(200, 200)[:-300])
    (folder / "a/cut.txt").write_text("cut off")
    (folder / "a/text.png").write_text("no picture at all")
    (folder / "a/text.txt").write_text("text")
    (folder / "a/empty.webp").write_bytes(b"")
    (folder / "a/empty.txt").write_text("empty")
    (folder / "a/link.png").symlink_to("nowhere.png")
    (folder / "a/link.txt").write_text("a link")
    (folder / "a/small.png").write_bytes(encoded(30, 9, "PNG"))
    (folder / "a/small.txt").write_text("small")
    (folder / "a/._1.jpg").write_bytes(b"what macOS leaves")
    manifest = packed(folder, tmp_path / "out", packing=Packing(min_size_px=10))
    assert manifest.samples == 12
    assert left_out(manifest) == {"no caption": 4, "no picture": 1, "too small": 1, "unreadable picture": 3}
    lines = [json.loads(line) for line in (tmp_path / "out/left_out.jsonl").read_text().splitlines()]
    assert {line["source"]: line["reason"] for line in lines} == {
        "a/none.jpg": "no caption",
        "a/blank.jpg": "no caption",
        "a/odd.jpg": "no caption",
        "a/bad.jpg": "no caption",
        "a/cut.jpg": "unreadable picture",
        "a/text.png": "unreadable picture",
        "a/empty.webp": "unreadable picture",
        "a/link.png": "no picture",
        "a/small.png": "too small",
    }
    details = {line["source"]: line.get("detail", "") for line in lines}
    assert details["a/small.png"] == "30 x 9 px"
    assert details["a/text.png"] == details["a/empty.webp"] == "its format is not known"
    assert not any("object at" in detail for detail in details.values())


def test_twenty_of_each_reason_are_named(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for number in range(30):
        (tmp_path / f"raw/{number:02d}.png").write_bytes(encoded(format="PNG"))
    (tmp_path / "raw/99.png").write_bytes(encoded(format="PNG"))
    (tmp_path / "raw/99.txt").write_text("one")
    manifest = packed(tmp_path / "raw", tmp_path / "out")
    assert left_out(manifest) == {"no caption": 30}
    assert len((tmp_path / "out/left_out.jsonl").read_text().splitlines()) == 20


def write_parquet(path: Path, columns: Mapping[str, Any], group_rows: int = 4) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(dict(columns)), path, row_group_size=group_rows)


def test_parquet_of_hugging_face_structs_is_read_by_row_groups(tmp_path: Path) -> None:
    pictures = [encoded(format="PNG" if n % 2 else "WEBP", seed=n, lossless=True) for n in range(18)]
    cells = [{"bytes": data, "path": f"{n}.png" if n else None} for n, data in enumerate(pictures)]
    captions = [[f"row {n}", " "] if n != 3 else [] for n in range(18)]
    write_parquet(tmp_path / "t.parquet", {"id": list(range(18)), "image": cells, "captions": captions})
    manifest = packed(tmp_path / "t.parquet", tmp_path / "out", packing=Packing(shard_samples=5))
    assert [entry.samples for entry in manifest.shards] == [5, 2, 5, 3, 2], "units are whole row groups: 8, 8 and 2 rows"
    assert left_out(manifest) == {"no caption": 1}
    stored = {json.loads(m["json"])["captions"][0]: m.get("png") or m["webp"] for m in samples_in(tmp_path / "out").values()}
    assert stored == {f"row {n}": pictures[n] for n in range(18) if n != 3}


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_paths_are_relative_to_the_table(tmp_path: Path, form: str) -> None:
    (tmp_path / "data/images").mkdir(parents=True)
    for number in range(7):
        (tmp_path / f"data/images/{number}.jpg").write_bytes(encoded(seed=number))
    paths = [f"images/{n}.jpg" for n in range(7)]
    paths[2], paths[3], paths[4] = str(tmp_path / "data/images/2.jpg"), "images/gone.jpg", ""
    columns = {"url": ["x"] * 7, "file": paths, "text": [f"row {n}" for n in range(7)]}
    if form == "parquet":
        write_parquet(tmp_path / "data/t.parquet", columns)
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        lines = [json.dumps(row) for row in rows]
        (tmp_path / "data/t.jsonl").write_text("\n".join([*lines[:2], "", '{"broken', "[]", *lines[2:]]))
    manifest = packed(tmp_path / "data", tmp_path / "out", columns=Columns("file"), packing=Packing(shard_samples=3))
    assert left_out(manifest) == {"no picture": 2, **({"unreadable row": 2} if form == "jsonl" else {})}
    found = {entry["captions"][0] for entry in facts_by_source(tmp_path / "out").values()}
    assert found == {"row 0", "row 1", "row 2", "row 5", "row 6"}


def test_pictures_at_addresses_are_fetched_and_dead_ones_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ATTEMPTS", 1)
    with server_of(Mood(encoded())) as root:
        rows = [{"url": f"{root}/{n}.jpg?sig=a%2Bb", "caption": f"row {n}"} for n in range(40)]
        rows[7]["url"] = "http://127.0.0.1:9/dead.jpg"
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        manifest = packed(tmp_path / "t.jsonl", tmp_path / "out", packing=Packing(shard_samples=25))
    assert [entry.samples for entry in manifest.shards] == [24, 15]
    assert left_out(manifest) == {"unreachable picture": 1}
    assert [json.loads(m["json"])["captions"] for m in samples_in(tmp_path / "out").values()] == [
        [f"row {n}"] for n in range(40) if n != 7
    ]


def test_a_cell_that_can_be_no_address_is_left_out_and_the_others_are_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    (tmp_path / "good.jpg").write_bytes(encoded())
    (tmp_path / "folder").mkdir()
    bad = ["s3://b/x//y", "s3://b/x/./y", "s3://b/x/../y", "s3://b/\u0001", "s3://b/\0", "s3://b/\ud800", "ftp://h/x", "://"]
    bad += [
        "nul\0",
        "half\ud83d",
        "byte\udce9",
        "x" * 100_000,
        "folder",
        "good.jpg/x",
        "http://[h/x",
        "http://h/\udfff",
        "http://\0/",
    ]
    with server_of(Mood(encoded(seed=1))) as root:
        good = ["good.jpg", "./folder/../good.jpg", f"{root}//a.jpg", f"{root}/a/./../b//c%20d.jpg#e", f"{root}/\n"]
        rows = [{"url": cell, "caption": f"row {number}"} for number, cell in enumerate(good + bad)]
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        manifest = packed(tmp_path / "t.jsonl", tmp_path / "out")
    assert manifest.samples == len(good)
    assert left_out(manifest) == {"no picture": len(bad)}
    lines = (tmp_path / "out/left_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["detail"].isprintable() for line in lines)
    assert max(map(len, lines)) < 2200


def test_a_row_of_parquet_that_is_no_text_is_left_out(tmp_path: Path) -> None:
    import pyarrow as pa

    (tmp_path / "a.jpg").write_bytes(encoded())
    texts = pa.array([b"one", b"caf\xe9", b"three"], pa.binary()).view(pa.string())
    write_parquet(tmp_path / "t.parquet", {"path": ["a.jpg"] * 3, "text": texts})
    manifest = packed(tmp_path / "t.parquet", tmp_path / "out")
    assert (manifest.samples, left_out(manifest)) == (2, {"unreadable row": 1})


def test_members_whose_names_are_no_text_are_packed_or_left_out(tmp_path: Path) -> None:
    names = [os.fsdecode(b"caf\xe9"), "a"]
    members = {f"{name}.{ending}": data for name in names for ending, data in (("jpg", encoded()), ("txt", b"x"))}
    write_tar(tmp_path / "t.tar", members | {os.fsdecode(b"b.caf\xe9"): b"x"})
    manifest = packed(tmp_path / "t.tar", tmp_path / "out")
    assert (manifest.samples, left_out(manifest)) == (2, {"no picture": 1})
    assert "caf\\xe9" in json.loads((tmp_path / "out/left_out.jsonl").read_text())["detail"]
    (tmp_path / "captions.json").write_text('{"a": "one"}')
    (tmp_path / "list.txt").write_text(f"t.tar\t{tmp_path}/t.tar\n")
    manifest = packed(tmp_path / "list.txt", tmp_path / "sam", captions=str(tmp_path / "captions.json"))
    assert (manifest.samples, left_out(manifest)) == (1, {"no picture": 1, "no caption": 1})


def test_a_network_that_is_gone_stops_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ATTEMPTS", 1)
    rows = [{"url": f"http://127.0.0.1:9/{n}.jpg", "caption": "x"} for n in range(20)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="not one of 20 pictures of unit 00000-000000 could be fetched"):
        packed(tmp_path / "t.jsonl", tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


def img2dataset_tar(path: Path, first: int, count: int = 5) -> bytes:
    members: dict[str, bytes] = {}
    for number in range(first, first + count):
        facts = {"caption": f"picture {number}", "url": "http://x", "key": f"{number:09d}", "status": "success"}
        members[f"{number:09d}.jpg"] = encoded(seed=number)
        members[f"{number:09d}.txt"] = f"picture {number}".encode()
        members[f"{number:09d}.json"] = json.dumps(facts).encode()
    return write_tar(path, members)


def test_tars_of_img2dataset_are_packed(tmp_path: Path) -> None:
    for number in range(3):
        img2dataset_tar(tmp_path / f"raw/{number:05d}.tar", 5 * number)
    (tmp_path / "raw/00000_stats.json").write_text("{}")
    manifest = packed(tmp_path / "raw", tmp_path / "out", packing=Packing(shard_samples=4))
    assert [entry.samples for entry in manifest.shards] == [4, 1] * 3
    assert manifest.facts["source_kind"] == "tars"
    found = facts_by_source(tmp_path / "out")
    assert found["00001.tar/000000007"] == {
        "captions": ["picture 7"],
        "width": 24,
        "height": 16,
        "source": "00001.tar/000000007",
    }
    again = packed(str(tmp_path / "raw/{00000..00002}.tar"), tmp_path / "again", packing=Packing(shard_samples=4))
    assert again.shards == manifest.shards


def test_tars_whose_ending_is_in_capitals_are_tars(tmp_path: Path) -> None:
    img2dataset_tar(tmp_path / "raw/0.TAR", 0)
    for source in (tmp_path / "raw/0.TAR", tmp_path / "raw"):
        assert packed(source, tmp_path / f"out-{source.name}").samples == 5
    assert index_shards(str(tmp_path / "raw")).samples == 5


@pytest.mark.parametrize("name", ["0.tar.gz", "0.TGZ", "0.tar.zst"])
def test_a_compressed_tar_is_one_sentence_and_not_passed_over(tmp_path: Path, name: str) -> None:
    img2dataset_tar(tmp_path / "raw/1.tar", 0)
    (tmp_path / "raw" / name).write_bytes(b"compressed")
    for act in (
        lambda: packed(tmp_path / "raw" / name, tmp_path / "out"),
        lambda: packed(tmp_path / "raw", tmp_path / "out"),
        lambda: index_shards(str(tmp_path / "raw")),
    ):
        with pytest.raises(UserError, match=f"raw/{name} is compressed, and samples are read in place: unpack it to a .tar"):
            act()


@pytest.mark.parametrize("name", ["a.zip", "a.csv", "a", "a.png"])
def test_a_file_of_no_kind_that_is_read_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"1")
    with pytest.raises(UserError, match=f"{name} is no kind of file that is read: a folder of pictures, "):
        packed(tmp_path / name, tmp_path / "out")
    with pytest.raises(UserError, match=f"{name} is a file, not a folder"):
        index_shards(str(tmp_path / name))


def test_other_members_and_lone_texts_in_tars(tmp_path: Path) -> None:
    members = {
        "d/1.image.png": encoded(format="PNG"),
        "d/1.txt": b"from the txt\nwhole",
        "d/1.json": b"broken",
        "d/2.txt": b"no picture",
        "d/3.jpeg": encoded(),
        "d/4.jpg": encoded(format="PNG"),
        "d/4.json": json.dumps({"caption": None, "captions": ["true format is png"]}).encode(),
    }
    write_tar(tmp_path / "t.tar", members)
    manifest = packed(tmp_path / "t.tar", tmp_path / "out")
    assert left_out(manifest) == {"no picture": 1, "no caption": 1}
    found = {key.partition("-")[0]: members for key, members in samples_in(tmp_path / "out").items()}
    assert {key: sorted(members) for key, members in found.items()} == {"1": ["json", "png"], "4": ["json", "png"]}
    assert json.loads(found["1"]["json"])["captions"] == ["from the txt\nwhole"]


def test_a_damaged_tar_stops_the_work_and_names_it(tmp_path: Path) -> None:
    data = img2dataset_tar(tmp_path / "raw/a.tar", 0)
    (tmp_path / "raw/b.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"b\.tar is damaged"):
        packed(tmp_path / "raw", tmp_path / "out")
    (tmp_path / "raw/b.tar").unlink()
    assert packed(tmp_path / "raw", tmp_path / "out").samples == 5


# -------------------------------------------------------------------------------------------------------------- SA-1B


def sam_tar(path: Path, first: int, count: int = 6) -> bytes:
    members: dict[str, bytes] = {}
    for number in range(first, first + count):
        members[f"./sa_{number}.jpg"] = encoded(60, 40, seed=number)
        members[f"./sa_{number}.json"] = json.dumps({"annotations": [{"segmentation": "x" * 50}]}).encode()
    return write_tar(path, members)


@pytest.mark.parametrize("form", ["json", "records", "jsonl", "parquet"])
def test_sam_llava_joins_the_captions_and_deletes_the_tars(tmp_path: Path, form: str) -> None:
    data = sam_tar(tmp_path / "t/sa_000000.tar", 1)
    captions = {f"sa_{n}.jpg" if n % 2 else f"sa_{n}": f"a picture of {n}" for n in range(1, 6)}
    records = [{"image": name, "caption": text} for name, text in captions.items()]
    table = tmp_path / f"captions.{'json' if form == 'records' else form}"
    if form == "parquet":
        write_parquet(table, {"__key__": list(captions), "txt": list(captions.values())})
    elif form == "jsonl":
        table.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        table.write_text(json.dumps(captions if form == "json" else records))
    mood = Mood(data, broken_bodies=1)
    with server_of(mood) as root:
        listed = f"file_name\tcdn_link\nsa_000000.tar\t{root}/m1/sa.tar?oh=00_A&oe=6%2F\t{hashlib.sha256(data).hexdigest()}\n"
        (tmp_path / "list.txt").write_text(listed)
        manifest = packed(tmp_path / "list.txt", tmp_path / "out", packing=Packing(size_px=20), captions=str(table))
    assert left_out(manifest) == {"no caption": 1}
    found = facts_by_source(tmp_path / "out")
    assert found["sa_000000.tar/sa_3"] == {
        "captions": ["a picture of 3"],
        "width": 30,
        "height": 20,
        "source": "sa_000000.tar/sa_3",
    }
    assert not list((tmp_path / "out/.scratch").glob("*.tar"))
    assert any("oh=00_A&oe=6%2F" in request for request in mood.requests)


def test_a_wrong_checksum_is_one_sentence_and_the_next_start_downloads_again(tmp_path: Path) -> None:
    data = sam_tar(tmp_path / "t/sa_000000.tar", 1)
    (tmp_path / "captions.json").write_text('{"sa_1": "one"}')
    with server_of(Mood(data)) as root:
        address = f"{root}/sa.tar?secret=1"
        (tmp_path / "list.txt").write_text(f"sa_000000.tar\t{address}\t{'0' * 64}\n")
        with pytest.raises(UserError, match=r"has the SHA-256 .* and the list says 000000000000") as error:
            packed(tmp_path / "list.txt", tmp_path / "out", captions=str(tmp_path / "captions.json"))
        assert "secret" not in str(error.value)
        (tmp_path / "list.txt").write_text(f"sa_000000.tar\t{address}\t{hashlib.sha256(data).hexdigest()}\n")
        assert packed(tmp_path / "list.txt", tmp_path / "out", captions=str(tmp_path / "captions.json")).samples == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "lists no tars"),
        ("file_name\tcdn_link\n", "lists no tars"),
        ("a.tar\thttp://x/a\na.tar\thttp://x/b\n", "line 2 lists a.tar again"),
        ("a.tar\thttp://x/a\nb.tar http://x/b\n", "line 2 is no `name.tar<TAB>URL[<TAB>sha256]`: 'b.tar http://x/b'"),
        ("a.tar\thttp://x/a\tabc\n", "lists no tars"),
    ],
)
def test_a_bad_list_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError) as error:
        read_list(str(tmp_path / "list.txt"))
    assert said in str(error.value)


def test_a_newer_list_of_the_same_tars_goes_on(tmp_path: Path) -> None:
    for number in range(2):
        sam_tar(tmp_path / f"t/sa_{number}.tar", 10 * number + 1)
    (tmp_path / "captions.json").write_text(json.dumps({f"sa_{n}": str(n) for n in range(30)}))
    options = {"captions": str(tmp_path / "captions.json")}
    (tmp_path / "list.txt").write_text(f"sa_0.tar\t{tmp_path}/t/sa_0.tar\n")
    assert packed(tmp_path / "list.txt", tmp_path / "out", **options).samples == 6
    (tmp_path / "t/sa_0.tar").unlink()
    (tmp_path / "list.txt").write_text(f"sa_0.tar\thttp://expired/x\nsa_1.tar\t{tmp_path}/t/sa_1.tar\n")
    assert packed(tmp_path / "list.txt", tmp_path / "out", **options).samples == 12
    (tmp_path / "captions.json").write_text('{"sa_1": "another"}')
    with pytest.raises(UserError, match="made with other settings"):
        packed(tmp_path / "list.txt", tmp_path / "out", **options)


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
