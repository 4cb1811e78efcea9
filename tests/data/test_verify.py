"""Verifying a data set: every kind of fault is planted in real shards, found, and named; whole data has none."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadiff.data.errors import DataError
from megadiff.data.inspection import verify as module
from megadiff.data.inspection.show import in_order  # type: ignore[attr-defined]
from megadiff.data.inspection.verify import Fault, Kind, verify
from megadiff.data.shards.shard import Manifest, Members, ShardEntry, index_shards, read_manifest, write_manifest, write_shard
from megadiff.storage import store
from megadiff.storage.errors import StorageError
from tests.data.small import TRAIN, sample, write_source

MODES: list[dict[str, bool]] = [{"quick": True}, {}, {"decode": True}]


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def faults(address: Path | str, **options: Any) -> list[Fault]:
    result = verify(str(address), **options)
    assert sum(result.counts.values()) == len(result.faults)
    assert result.whole == (not result.faults)
    return list(result.faults)


def the_fault(address: Path | str, **options: Any) -> Fault:
    (fault,) = faults(address, **options)
    return fault


def relist(folder: Path, change: Callable[[list[ShardEntry]], list[ShardEntry]]) -> None:
    """Write the manifest anew with other entries."""
    manifest = read_manifest(str(folder))
    write_manifest(str(folder), Manifest(tuple(change(list(manifest.shards)))))


def entry_of(path: Path, samples: int, name: str | None = None) -> ShardEntry:
    data = path.read_bytes()
    return ShardEntry(name or path.name, samples, len(data), hashlib.sha256(data).hexdigest())


# ------------------------------------------------------------------------------------------------------------ whole data


@pytest.mark.parametrize("mode", MODES)
def test_whole_data_has_no_fault(tmp_path: Path, mode: dict[str, bool]) -> None:
    address = write_source(tmp_path, [3, 1, 5])
    for given in (address, str(tmp_path)):
        result = verify(given, **mode)
        assert result.whole
        assert result.faults == ()
        assert result.note == ""
        assert (result.shards, result.samples) == (3, 9)
        assert result.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))


def test_the_example_is_whole_to_the_last_member() -> None:
    assert faults(TRAIN, decode=True) == []


def test_shards_in_folders_below_the_manifest_are_whole_as_well(tmp_path: Path) -> None:
    write_source(tmp_path / "train", [2])
    entry = read_manifest(str(tmp_path / "train")).shards[0]
    write_manifest(str(tmp_path), Manifest((replace(entry, name="train/000.tar"),)))
    assert faults(tmp_path) == []


# ------------------------------------------------------------------------------------------------------- shards, manifest


@pytest.mark.parametrize("mode", MODES)
def test_a_missing_shard_is_found(tmp_path: Path, mode: dict[str, bool]) -> None:
    write_source(tmp_path, [2, 2])
    (tmp_path / "001.tar").unlink()
    fault = the_fault(tmp_path, **mode)
    assert (fault.kind, fault.object) == (Kind.MISSING, f"{tmp_path}/001.tar")
    assert "not there" in fault.detail


def test_a_folder_of_shards_that_is_gone_is_so_many_missing_shards(tmp_path: Path) -> None:
    entries = tuple(ShardEntry(f"gone/{number}.tar", 1, 10, str(number)) for number in range(3))
    write_manifest(str(tmp_path), Manifest(entries))
    result = verify(str(tmp_path))
    assert result.counts == {Kind.MISSING: 3}
    assert result.note == ""


@pytest.mark.parametrize("mode", MODES)
def test_a_truncated_shard_is_found_with_both_sizes(tmp_path: Path, mode: dict[str, bool]) -> None:
    write_source(tmp_path, [2, 2])
    path = tmp_path / "000.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    fault = the_fault(tmp_path, **mode)
    assert (fault.kind, fault.object) == (Kind.TRUNCATED, f"{tmp_path}/000.tar")
    assert fault.detail == f"it has {size - 1:,} bytes, and the manifest says {size:,}"


@pytest.mark.parametrize("mode", MODES)
def test_a_shard_that_has_grown_is_of_another_size(tmp_path: Path, mode: dict[str, bool]) -> None:
    write_source(tmp_path, [2, 2])
    with (tmp_path / "000.tar").open("ab") as file:
        file.write(b"\0")
    assert the_fault(tmp_path, **mode).kind is Kind.SIZE


def test_one_changed_byte_in_a_picture_is_found_but_not_by_a_quick_look(tmp_path: Path) -> None:
    write_source(tmp_path, [2, 2])
    path = tmp_path / "001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 1
    path.write_bytes(data)
    assert faults(tmp_path, quick=True) == []
    fault = the_fault(tmp_path)
    assert (fault.kind, fault.object) == (Kind.CORRUPT, f"{tmp_path}/001.tar")
    assert f"its sha256 is {hashlib.sha256(data).hexdigest()[:12]}" in fault.detail
    assert "tar" not in fault.detail
    assert [found.kind for found in faults(tmp_path, decode=True)] == [Kind.CORRUPT, Kind.DAMAGED]


def test_what_is_no_tar_is_found_even_with_the_right_hash(tmp_path: Path) -> None:
    write_source(tmp_path, [2, 2])
    (tmp_path / "001.tar").write_bytes(b"no tar" * 500)
    relist(tmp_path, lambda entries: [entries[0], entry_of(tmp_path / "001.tar", 2)])
    fault = the_fault(tmp_path)
    assert (fault.kind, fault.object) == (Kind.CORRUPT, f"{tmp_path}/001.tar")
    assert "no whole tar" in fault.detail
    assert "sha256" not in fault.detail


def test_a_shard_that_is_neither_the_listed_one_nor_a_tar_is_one_fault(tmp_path: Path) -> None:
    write_source(tmp_path, [2])
    path = tmp_path / "000.tar"
    path.write_bytes(b"x" * path.stat().st_size)
    fault = the_fault(tmp_path)
    assert fault.kind is Kind.CORRUPT
    assert "sha256" in fault.detail
    assert "no whole tar" in fault.detail


def test_another_number_of_samples_is_found_with_both(tmp_path: Path) -> None:
    write_source(tmp_path, [2, 3])
    relist(tmp_path, lambda entries: [entries[0], replace(entries[1], samples=4)])
    assert faults(tmp_path, quick=True) == []
    fault = the_fault(tmp_path)
    assert (fault.kind, fault.object) == (Kind.SAMPLES, f"{tmp_path}/001.tar")
    assert fault.detail == "it holds 3 samples, and the manifest says 4"


@pytest.mark.parametrize("error", ["it may not be read", "it cannot be reached"])
def test_a_shard_that_cannot_be_read_is_a_fault_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    write_source(tmp_path, [1, 1, 1])
    (tmp_path / "002.tar").unlink()
    read_whole = store.read_whole

    def refuse(address: str) -> memoryview:
        if address.endswith("000.tar"):
            raise StorageError(error)
        return read_whole(address)

    monkeypatch.setattr(store, "read_whole", refuse)
    found = faults(tmp_path)
    assert [(fault.kind, fault.object[-7:]) for fault in found] == [(Kind.UNREADABLE, "000.tar"), (Kind.MISSING, "002.tar")]
    assert error in found[0].detail


@pytest.mark.parametrize("mode", MODES)
def test_a_tar_that_is_not_listed_is_found_in_every_folder_of_shards(tmp_path: Path, mode: dict[str, bool]) -> None:
    write_source(tmp_path / "train", [2, 1])
    listed = read_manifest(str(tmp_path / "train")).shards[0]
    write_manifest(str(tmp_path), Manifest((replace(listed, name="train/000.tar"),)))
    (tmp_path / "left.tar").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"")
    found = faults(tmp_path, **mode)
    assert {fault.kind for fault in found} == {Kind.UNLISTED}
    assert [fault.object for fault in found] == [f"{tmp_path}/left.tar", f"{tmp_path}/train/001.tar"]


@pytest.mark.parametrize("failing", ["http", "forbidden"])
def test_a_folder_that_cannot_be_listed_is_told_and_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    write_source(tmp_path, [2])
    address = str(tmp_path)
    if failing == "http":
        address = "http://server/data"
        monkeypatch.setattr(store, "read_bytes", lambda _: (tmp_path / "manifest.json").read_bytes())
        monkeypatch.setattr(store, "read_whole", lambda _: memoryview((tmp_path / "000.tar").read_bytes()))
        monkeypatch.setattr(store, "size", lambda _: (tmp_path / "000.tar").stat().st_size)
    else:

        def refuse(folder: str) -> list[str]:
            raise StorageError(f"{folder} may not be listed")

        monkeypatch.setattr(store, "list_names", refuse)
    result = verify(address)
    assert result.whole
    assert "not looked for" in result.note
    assert "listed" in result.note


def test_a_manifest_that_cannot_be_read_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"manifest\.json"):
        verify(str(tmp_path))
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="no manifest"):
        verify(str(tmp_path))


# ------------------------------------------------------------------------------------------------------------- duplicates


@pytest.mark.parametrize("mode", MODES)
def test_the_same_content_under_two_names_is_one_fault_and_not_one_per_sample(tmp_path: Path, mode: dict[str, bool]) -> None:
    write_source(tmp_path, [4])
    (tmp_path / "copy.tar").write_bytes((tmp_path / "000.tar").read_bytes())
    relist(tmp_path, lambda entries: [*entries, replace(entries[0], name="copy.tar")])
    fault = the_fault(tmp_path, **mode)
    assert (fault.kind, fault.object) == (Kind.DUPLICATE, f"{tmp_path}/copy.tar")
    assert fault.detail == "the manifest lists the same hash for 000.tar"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("samples", "said"), [(4, "alike"), (5, "with other numbers")])
def test_a_name_that_is_listed_twice_is_found(tmp_path: Path, mode: dict[str, bool], samples: int, said: str) -> None:
    write_source(tmp_path, [4])
    relist(tmp_path, lambda entries: [replace(entries[0], samples=samples), *entries])
    fault = the_fault(tmp_path, **mode)
    assert (fault.kind, fault.object) == (Kind.DUPLICATE, f"{tmp_path}/000.tar")
    assert f"lists it twice, {said}" in fault.detail


def test_a_key_in_two_shards_is_found_and_both_are_named(tmp_path: Path) -> None:
    entries = [
        write_shard(str(tmp_path), f"{shard}.tar", {key: sample(place + 10 * shard) for place, key in enumerate(keys)})
        for shard, keys in enumerate((["a", "b", "c"], ["d", "e"], ["b", "f", "d"], ["g", "b"]))
    ]
    write_manifest(str(tmp_path), Manifest(tuple(entries)))
    assert faults(tmp_path, quick=True) == []
    found = [(fault.kind, fault.object, fault.detail.split()[0]) for fault in faults(tmp_path)]
    assert found == [
        (Kind.DUPLICATE, f"{tmp_path}/2.tar b", f"{tmp_path}/0.tar"),
        (Kind.DUPLICATE, f"{tmp_path}/2.tar d", f"{tmp_path}/1.tar"),
        (Kind.DUPLICATE, f"{tmp_path}/3.tar b", f"{tmp_path}/0.tar"),
    ]


def test_keys_whose_hashes_collide_are_no_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path, [2, 2])

    class Constant:
        def __init__(self, data: bytes, digest_size: int) -> None: ...

        def digest(self) -> bytes:
            return bytes(8)

    monkeypatch.setattr(module.hashlib, "blake2b", Constant)  # type: ignore[attr-defined]
    contents = module._Contents(str(tmp_path))
    for number, name in enumerate(("x.tar", "y.tar")):
        keys = ["a", "b", "c"] if number == 0 else ["c", "d"]
        checked = module._Checked(keys=keys, members=[("png",)] * len(keys))
        contents.add(ShardEntry(name, len(keys), 1, str(number)), checked)
    assert [fault.object for fault in contents.duplicates()] == [f"{tmp_path}/y.tar c"]


@pytest.mark.parametrize("again", ["a.txt", "a.TXT"])
def test_a_member_that_a_tar_holds_twice_is_found(tmp_path: Path, again: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("a.txt", b"one"), ("b.txt", b"two"), (again, b"three")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (tmp_path / "0.tar").write_bytes(buffer.getvalue())
    write_manifest(str(tmp_path), index_shards(str(tmp_path)))
    fault = the_fault(tmp_path)
    assert (fault.kind, fault.object) == (Kind.DUPLICATE, f"{tmp_path}/0.tar a.txt")
    assert "more than once" in fault.detail


def test_a_member_of_a_kind_that_is_not_read_is_named(tmp_path: Path) -> None:
    write_source(tmp_path, [2])
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("a.npy")
        info.type = b"S"
        tar.addfile(info)
    (tmp_path / "000.tar").write_bytes(buffer.getvalue())
    entry = ShardEntry("000.tar", 2, len(buffer.getvalue()), hashlib.sha256(buffer.getvalue()).hexdigest())
    write_manifest(str(tmp_path), Manifest((entry,)))
    fault = the_fault(tmp_path)
    assert fault.kind is Kind.CORRUPT
    assert fault.detail == "its member 'a.npy' is stored without its zeros (tar --sparse), which is not read"


# ---------------------------------------------------------------------------------------------------------------- members


def test_a_sample_without_a_member_that_most_have_is_found_wherever_it_lies(tmp_path: Path) -> None:
    bare: Members = {"png": sample(4)["png"]}
    extra: Members = {**sample(1), "txt": b"more than the others have"}
    write_source(tmp_path, [3, 3], {4: bare, 1: extra})
    fault = the_fault(tmp_path)
    assert (fault.kind, fault.object) == (Kind.INCOMPLETE, f"{tmp_path}/001.tar 00004")
    assert fault.detail == "it has no .json (as 5 of 6 samples have)"


def test_a_first_shard_without_any_text_is_found_sample_by_sample(tmp_path: Path) -> None:
    bare = {number: {"png": sample(number)["png"]} for number in range(2)}
    write_source(tmp_path, [2, 5], bare)
    assert [fault.object for fault in faults(tmp_path)] == [f"{tmp_path}/000.tar 0000{number}" for number in range(2)]


def test_a_member_that_only_half_of_the_samples_have_is_missed_in_none(tmp_path: Path) -> None:
    write_source(tmp_path, [2, 2], {number: {"png": sample(number)["png"]} for number in (0, 3)})
    assert faults(tmp_path) == []


ODD = {
    "png": (sample(1)["png"][:50], "no readable picture"),
    "seg.jpg": (b"GIF and nothing more", "no readable picture: its format is not known"),
    "latents.npy": (npy(np.array([[0.5, np.nan], [np.inf, 1]], dtype=np.float16)), "2 of its 4 numbers are not finite"),
    "tokens.npy": (npy(np.arange(9, dtype=np.int32))[:-1], "no whole NumPy array"),
    "features.npy": (b"", "no NumPy array"),
    "json": (b'{"captions": ["a"', "no JSON"),
    "meta.json": (b"[" * 100_000, "no JSON"),
    "txt": (b"caf\xe9", "no text in UTF-8"),
}


@pytest.mark.parametrize("ending", ODD)
def test_a_damaged_member_is_found_by_decoding_alone_and_named(tmp_path: Path, ending: str) -> None:
    content, said = ODD[ending]
    good = {"latents.npy": npy(np.zeros((4, 2, 2), np.float16)), "tokens.npy": npy(np.arange(9, dtype=np.int32))}
    whole: Members = {**sample(1), "txt": "café".encode(), "features.npy": npy(np.ones(3)), **good, "cls": b"\xff"}
    whole |= {"seg.jpg": sample(2)["png"], "meta.json": b"[]"}
    write_source(tmp_path, [2, 2], dict.fromkeys(range(4), whole) | {2: {**whole, ending: content}})
    assert faults(tmp_path) == []
    fault = the_fault(tmp_path, decode=True)
    assert (fault.kind, fault.object) == (Kind.DAMAGED, f"{tmp_path}/001.tar 00002.{ending}")
    assert said in fault.detail
    assert "\n" not in str(fault)


# ---------------------------------------------------------------------------------------------------------- how it is done


def broken(folder: Path) -> None:
    """Faults of several kinds in many shards."""
    write_source(folder, [2] * 12, {5: {"png": b"", "json": b"{}"}, 20: {"json": b"{}"}})
    (folder / "004.tar").unlink()
    (folder / "007.tar").write_bytes(b"")
    relist(folder, lambda entries: [replace(entry, samples=3) if entry.name == "009.tar" else entry for entry in entries])


def test_faults_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    broken(tmp_path)
    alone = faults(tmp_path, decode=True, workers=1)
    kinds = [fault.kind for fault in alone]
    assert kinds == [Kind.DAMAGED, Kind.MISSING, Kind.TRUNCATED, Kind.SAMPLES, Kind.INCOMPLETE]
    assert faults(tmp_path, decode=True, workers=8) == alone


def test_faults_and_progress_are_told_on_the_way(tmp_path: Path) -> None:
    broken(tmp_path)
    told: list[Fault] = []
    steps: list[tuple[int, int]] = []
    result = verify(str(tmp_path), report=told.append, progress=lambda done, total: steps.append((done, total)))
    assert tuple(told) == result.faults
    assert steps == [(done, 12) for done in range(1, 13)]


def test_of_each_kind_so_many_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    write_source(tmp_path, [1] * 9)
    for number in range(5):
        (tmp_path / f"00{number}.tar").unlink()
    (tmp_path / "more.tar").write_bytes(b"")
    told: list[Fault] = []
    result = verify(str(tmp_path), keep=2, report=told.append)
    assert result.counts == {Kind.MISSING: 5, Kind.UNLISTED: 1}
    assert [fault.kind for fault in result.faults].count(Kind.MISSING) == 2
    assert len(told) == 6


def test_no_more_than_a_few_items_are_worked_on_ahead() -> None:
    taken: list[int] = []
    results = in_order((taken.append(number) or number for number in range(1000)), lambda number: number, threads=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(taken) <= 3 + 2 * 2
    assert list(results) == list(range(3, 1000))


def test_a_quick_look_reads_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path, [1, 1])
    monkeypatch.setattr(store, "read_whole", lambda _: pytest.fail("a shard was read"))
    assert faults(tmp_path, quick=True) == []


def test_a_key_that_is_no_utf_8_can_be_printed(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("caf\udce9.json", "b.json", "c.json"):
            info = tarfile.TarInfo(name)
            info.size = 1 if name == "b.json" else 2
            tar.addfile(info, io.BytesIO(b"{}"))
    (tmp_path / "0.tar").write_bytes(buffer.getvalue())
    (tmp_path / "1.tar").write_bytes(buffer.getvalue() + bytes(512))
    write_manifest(str(tmp_path), index_shards(str(tmp_path)))
    found = faults(tmp_path, decode=True)
    assert json.dumps([str(fault) for fault in found]).count(r"caf\\udce9") == 0
    assert any("caf\\xe9" in str(fault) for fault in found)
    for fault in found:
        str(fault).encode()
