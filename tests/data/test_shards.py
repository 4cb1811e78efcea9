"""Tar shards, manifests and the node-local cache."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from webdataset.tariterators import base_plus_ext

from megadiff.config.errors import UserError
from megadiff.config.schema import Cache
from megadiff.data.errors import DataError
from megadiff.data.shards import reader as reader_module
from megadiff.data.shards.cache import ShardCache
from megadiff.data.shards.reader import ShardReader
from megadiff.data.shards.shard import (
    Manifest,
    Shard,
    ShardEntry,
    index_shards,
    pack_shard,
    read_manifest,
    write_manifest,
    write_shard,
)
from megadiff.storage import clients, store
from tests.data.small import TRAIN, sample, write_source
from tests.ranks import run_ranks

WORKER = Path(__file__).with_name("cache_worker.py")
ONE_SHARD = '{"format": "megadiff-shards", "version": 1, "shards": [{"name": "a", "samples": 3, "bytes": 1, "sha256": ""}]}'
PAIRS = {"b": {"png": b"picture", "json": b"{}"}, "a": {"json": b"x" * 3000, "png": b""}}


def test_what_is_no_samples_member_is_not_counted_and_the_rest_is_as_webdataset_groups_it(tmp_path: Path) -> None:
    names = [
        "README",
        ".DS_Store",
        "a.png",
        "a.json",
        "._a.png",
        "d/LICENSE",
        "d/.hidden.png",
        "d/b.image.png",
        "d/b.JSON",
        "c.txt",
    ]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    shard = Shard("0.tar", tmp_path / "0.tar")
    read = {shard.key(place): set(shard.members(place)) for place in range(len(shard))}
    assert read == {"a": {"png", "json"}, "d/b": {"image.png", "json"}, "c": {"txt"}}
    assert index_shards(str(tmp_path)).samples == 3
    theirs: dict[str, set[str]] = {}
    for name in names:
        key, ending = base_plus_ext(name)
        if key and key != "d/":  # it takes d/.hidden.png for one
            theirs.setdefault(key, set()).add(ending.lower())
    assert theirs == read


def test_a_tar_whose_name_is_no_text_is_listed_and_read(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.tar")
    (tmp_path / name).write_bytes(pack_shard(PAIRS))
    manifest = index_shards(str(tmp_path))
    address = write_manifest(str(tmp_path), manifest)
    assert read_manifest(address) == manifest
    assert ShardReader(str(tmp_path), manifest).members(0, 0) == PAIRS["b"]


def far_away(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Make far://bucket/... an address whose objects lie in a folder; returns the list of the addresses downloaded."""
    downloaded: list[str] = []

    def chunks(address: str, start: int = 0, *_: Any) -> Iterator[tuple[int, memoryview]]:
        downloaded.append(address)
        content = (folder / address.removeprefix("far://bucket/")).read_bytes()
        yield len(content), memoryview(content)[start:]

    monkeypatch.setattr(store, "_chunks", chunks)
    monkeypatch.setattr(clients, "client_and_key", lambda address: (None, address))
    monkeypatch.setattr(store.obstore, "get", _broken)  # type: ignore[attr-defined]
    return downloaded


def _broken(*_: Any) -> None:
    raise OSError("the client has given up")


def held_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def test_samples_come_back_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    entry = write_shard(str(tmp_path), "0.tar", PAIRS)
    for source in (tmp_path / "0.tar", (tmp_path / "0.tar").read_bytes()):
        shard = Shard("0.tar", source)
        assert len(shard) == entry.samples == 2
        assert {shard.key(place): shard.members(place) for place in range(2)} == PAIRS
        assert [shard.key(place) for place in range(2)] == ["b", "a"]


def test_an_entry_holds_the_size_and_the_hash_of_its_file(tmp_path: Path) -> None:
    entry = write_shard(str(tmp_path), "0.tar", PAIRS)
    content = (tmp_path / "0.tar").read_bytes()
    assert entry == ShardEntry("0.tar", 2, len(content), hashlib.sha256(content).hexdigest())


def test_the_same_samples_give_the_same_bytes_whatever_the_order_of_their_members() -> None:
    turned = {key: dict(reversed(members.items())) for key, members in PAIRS.items()}
    assert pack_shard(PAIRS) == pack_shard(turned)
    with tarfile.open(fileobj=io.BytesIO(pack_shard(PAIRS))) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


def test_a_tar_made_by_others_is_read_by_key_with_folders_and_long_endings() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(_directory("set"))
        for name in ("set/1.PNG", "set/1.seg.png", "set/1.json", "set/2.json", "3.json"):
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    shard = Shard("other.tar", buffer.getvalue())
    assert [shard.key(place) for place in range(len(shard))] == ["set/1", "set/2", "3"]
    assert shard.members(0) == {"png": b"set/1.PNG", "seg.png": b"set/1.seg.png", "json": b"set/1.json"}


def _directory(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def test_the_index_of_a_folder_equals_the_manifest_that_its_writer_made(tmp_path: Path) -> None:
    address = write_source(tmp_path, [3, 1, 5])
    assert index_shards(str(tmp_path)) == read_manifest(address)


def test_the_index_of_the_example_equals_its_manifest() -> None:
    assert index_shards(str(TRAIN)) == read_manifest(str(TRAIN))


def test_indexing_again_keeps_the_facts_and_drops_what_is_gone(tmp_path: Path) -> None:
    write_source(tmp_path, [2, 3])
    before = index_shards(str(tmp_path))
    write_manifest(str(tmp_path), Manifest(before.shards, {"licences": {"noto": "Apache-2.0"}}))
    (tmp_path / "000.tar").unlink()
    assert index_shards(str(tmp_path)) == Manifest(before.shards[1:], {"licences": {"noto": "Apache-2.0"}})


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_missing_or_damaged_manifest_does_not_hinder_indexing(tmp_path: Path, content: str | None) -> None:
    write_source(tmp_path, [2])
    (tmp_path / "manifest.json").unlink()
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    assert index_shards(str(tmp_path)).facts == {}


def test_indexing_reports_how_far_it_is(tmp_path: Path) -> None:
    write_source(tmp_path, [1, 2])
    seen: list[tuple[int, int]] = []
    index_shards(str(tmp_path), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_a_manifest_comes_back_with_its_facts(tmp_path: Path) -> None:
    manifest = Manifest((ShardEntry("x.tar", 4, 10, "00"),), {"split": "train", "labels": "é"})
    address = write_manifest(str(tmp_path), manifest)
    assert read_manifest(address) == read_manifest(str(tmp_path)) == manifest
    assert manifest.samples == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no manifest"),
        ("[1, 2]", "no manifest"),
        ("{}", "no manifest"),
        ('{"format": "other", "version": 1, "shards": []}', "is a other of version 1"),
        ('{"format": "megadiff-shards", "version": 2, "shards": []}', "of version 2; this program reads megadiff-shards 1"),
        ('{"format": "megadiff-shards", "version": 1, "shards": []}', "lists no samples"),
        ('{"format": "megadiff-shards", "version": 1, "shards": [{"name": "a"}]}', "no manifest"),
        ('{"format": "megadiff-shards", "version": 1, "shards": 7}', "no manifest"),
        (ONE_SHARD.replace("3", '"3"'), "`samples` must be whole numbers"),
        (ONE_SHARD.replace("3", "-3"), "`samples` must be whole numbers"),
        (ONE_SHARD.replace('"bytes": 1', '"bytes": null'), "`bytes` a whole number"),
    ],
)  # fmt: skip
def test_a_damaged_manifest_gives_one_sentence_that_names_it(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError) as caught:
        read_manifest(str(tmp_path))
    message = str(caught.value)
    assert str(tmp_path / "manifest.json") in message
    assert said in message
    assert "\n" not in message


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json cannot be read: No such file"):
        read_manifest(str(tmp_path))


def test_a_folder_without_tars_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path} holds no \.tar files"):
        index_shards(str(tmp_path))


@pytest.mark.parametrize("cut", [1, 100, 512, 700, 1024, 1500, 4000])
def test_a_tar_that_is_cut_is_refused_wherever_it_is_cut(tmp_path: Path, cut: int) -> None:
    address = write_source(tmp_path, [8])
    path = tmp_path / "000.tar"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"000\.tar has \d+ bytes, and the manifest says \d+"):
        ShardReader(str(tmp_path), read_manifest(address)).shard(0)
    with pytest.raises(DataError, match=r"000\.tar is damaged"):
        index_shards(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"no tar" * 200, gzip.compress(pack_shard(PAIRS))], ids=["empty", "text", "gzip"])
def test_what_is_no_plain_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.tar is damaged"):
        index_shards(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    address = write_source(tmp_path, [2, 2])
    (tmp_path / "001.tar").unlink()
    with pytest.raises(DataError, match=r"001\.tar cannot be read \(No such file"):
        ShardReader(str(tmp_path), read_manifest(address)).shard(1)


def test_a_shard_with_another_number_of_samples_is_named_with_both(tmp_path: Path) -> None:
    write_source(tmp_path, [2, 2])
    manifest = index_shards(str(tmp_path))
    wrong = Manifest((manifest.shards[0], ShardEntry(**{**vars(manifest.shards[1]), "samples": 3})))
    with pytest.raises(DataError, match=r"001\.tar holds 2 samples, and the manifest says 3"):
        ShardReader(str(tmp_path), wrong).shard(1)


def test_a_reader_keeps_few_shards_open_and_reads_each_once_while_it_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = write_source(tmp_path, [1, 1, 1])
    opened: list[str] = []
    original = reader_module.Shard  # type: ignore[attr-defined]
    monkeypatch.setattr(
        reader_module, "Shard", lambda address, source: opened.append(Path(address).name) or original(address, source)
    )
    reader = ShardReader(str(tmp_path), read_manifest(address), keep=2)
    for index in (0, 1, 0, 1, 2, 1, 0):
        reader.shard(index)
    assert opened == ["000.tar", "001.tar", "002.tar", "000.tar"]


def test_threads_that_want_the_same_shard_read_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path, [3])
    manifest = read_manifest(str(tmp_path))
    downloaded = far_away(monkeypatch, tmp_path)
    reader = ShardReader("far://bucket", manifest)
    gate = threading.Barrier(8)

    def read(_: int) -> Any:
        gate.wait()
        return reader.members(0, 1)

    with ThreadPoolExecutor(8) as pool:
        assert all(members == sample(1) for members in pool.map(read, range(8)))
    assert len(downloaded) == 1


# ---------------------------------------------------------------------------------------------------------------- cache


def test_the_cache_downloads_a_shard_once_and_a_later_reader_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "far", [2, 2])
    manifest = read_manifest(str(tmp_path / "far"))
    downloaded = far_away(monkeypatch, tmp_path / "far")
    for _ in range(2):
        reader = ShardReader("far://bucket", manifest, ShardCache(Cache(folder=str(tmp_path / "cache"))))
        assert reader.members(1, 0) == sample(2)
    assert downloaded == ["far://bucket/001.tar"]


def test_the_cache_stays_under_its_size_and_drops_the_least_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "far", [4] * 5)
    manifest = read_manifest(str(tmp_path / "far"))
    size = manifest.shards[0].bytes
    downloaded = far_away(monkeypatch, tmp_path / "far")
    cache = ShardCache(Cache(folder=str(tmp_path / "cache"), max_bytes=3 * size + 10))

    def want(index: int) -> bool:
        """Whether it had to be downloaded."""
        before = len(downloaded)
        cache.shard(f"far://bucket/{manifest.shards[index].name}", manifest.shards[index])
        # Clocks of file systems are coarse: make uses differ.
        _age_all_but(cache.folder / f"{manifest.shards[index].sha256}.tar")
        assert held_bytes(tmp_path / "cache") <= cache.max_bytes
        return len(downloaded) > before

    assert [want(index) for index in (0, 1, 2, 0, 3, 0, 2, 1)] == [True, True, True, False, True, False, False, True]


def _age_all_but(used: Path) -> None:
    for path in used.parent.glob("*.tar"):
        if path != used:
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 10))


def test_a_shard_that_was_dropped_from_the_cache_is_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "far", [2, 2])
    manifest = read_manifest(str(tmp_path / "far"))
    far_away(monkeypatch, tmp_path / "far")
    room_for_one = Cache(folder=str(tmp_path / "cache"), max_bytes=manifest.shards[0].bytes + 10)
    reader = ShardReader("far://bucket", manifest, ShardCache(room_for_one))
    for _ in range(2):
        assert [reader.members(index, 1) for index in (0, 1)] == [sample(1), sample(3)]
    assert held_bytes(tmp_path / "cache") <= room_for_one.max_bytes


@pytest.mark.parametrize("cached", [True, False])
def test_a_distant_shard_that_is_not_the_listed_one_is_named_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    write_source(tmp_path / "far", [2])
    manifest = read_manifest(str(tmp_path / "far"))
    write_source(tmp_path / "far", [2], {1: sample(7)})
    far_away(monkeypatch, tmp_path / "far")
    cache = Cache(folder=str(tmp_path / "cache")) if cached else None
    for _ in range(2):
        with pytest.raises(DataError, match=r"000\.tar is not the one that the manifest lists"):
            ShardReader("far://bucket", manifest, cache and ShardCache(cache)).shard(0)


def test_a_cached_file_that_vanishes_while_room_is_made_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "far", [2])
    manifest = read_manifest(str(tmp_path / "far"))
    far_away(monkeypatch, tmp_path / "far")
    (tmp_path / "cache").mkdir()
    # A listing names it, and it is gone when its size is asked for.
    (tmp_path / "cache" / "gone.tar").symlink_to(tmp_path / "nowhere")
    reader = ShardReader("far://bucket", manifest, ShardCache(Cache(folder=str(tmp_path / "cache"))))
    assert reader.members(0, 1) == sample(1)


def test_a_cached_file_that_is_cut_is_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "far", [2])
    manifest = read_manifest(str(tmp_path / "far"))
    far_away(monkeypatch, tmp_path / "far")
    cache = ShardCache(Cache(folder=str(tmp_path / "cache")))
    path = cache.folder / f"{manifest.shards[0].sha256}.tar"
    cache.folder.mkdir()
    path.write_bytes(b"cut")
    assert len(cache.shard("far://bucket/000.tar", manifest.shards[0])) == 2
    assert path.stat().st_size == manifest.shards[0].bytes


def test_threads_that_fight_over_a_small_cache_all_get_the_right_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "far", [1] * 6)
    manifest = read_manifest(str(tmp_path / "far"))
    far_away(monkeypatch, tmp_path / "far")
    cache = Cache(folder=str(tmp_path / "cache"), max_bytes=4 * manifest.shards[0].bytes)

    def walk(start: int) -> bool:
        reader = ShardReader("far://bucket", manifest, ShardCache(cache))
        return all(reader.members(n % 6, 0) == sample(n % 6) for n in range(start, start + 60))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(walk, range(3)))


@pytest.mark.distributed
def test_processes_that_share_a_small_cache_all_get_the_right_bytes(tmp_path: Path) -> None:
    write_source(tmp_path / "far", [1] * 6)
    size = read_manifest(str(tmp_path / "far")).shards[0].bytes
    request = {
        "far": str(tmp_path / "far"),
        "cache": str(tmp_path / "cache"),
        "max_bytes": 4 * size,
        "readings": 200,
        "keep": 1,
    }
    assert run_ranks(WORKER, 2, request) == [{"right": 200}, {"right": 200}]
    # Each process may be about to write one more than it counted.
    assert held_bytes(tmp_path / "cache") <= 5 * size
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".tar", ""}
