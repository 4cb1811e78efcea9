"""Every kind of source of raw pictures: folders, tables, tars, SA-1B; what is left out of them and why."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from megadiff.config.errors import UserError
from megadiff.data.packing.build import Columns
from megadiff.data.packing.pack import Packing, left_out
from megadiff.data.packing.source import key_of
from megadiff.data.packing.sources.sam_llava import read_list
from megadiff.data.shards.shard import index_shards
from megadiff.storage import store
from tests.data.packs import encoded, facts_by_source, img2dataset_tar, packed, samples_in, write_parquet, write_tar
from tests.storage.servers import Mood, server_of

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
