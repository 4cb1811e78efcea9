"""Addresses: files and S3 behave alike; what an address can be."""

from __future__ import annotations

import errno
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from megadiff.data.reading.loader import Loader
from megadiff.data.shards.shard import index_shards, read_manifest
from megadiff.storage import addresses, clients, store
from megadiff.storage.errors import AddressError, FullError, MissingError, StorageError
from tests.data.small import data_of, tiny, write_source
from tests.storage.servers import SECRET, Mood, server_of, use_s3

pytestmark = pytest.mark.s3

BAD = [
    *("ftp://host/x", "s3://", "://x", "s3://bucket/x//y", "s3://bucket//x", "s3://bucket/./x", "s3://bucket/x/../y"),
    *("s3://bucket/x//", "s3://bucket/a\x01", "s3://bucket/a\0b", "s3://buc\0ket/x", "s3://bucket/\ud800", "s3://b c/x"),
    *(
        "http://host/\ud800",
        "http://ho\tst/x",
        "http://[host/x",
        "http://host:99999/x",
        "http:///x",
        "http://host/" + "x" * 70_000,
    ),
    *("nul\0", "half\ud800", "file://nul\0", "s3://bucket/" + "x" * 70_000),
]


@pytest.mark.s3
@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 40])
def test_what_was_written_is_read(folder: str, content: bytes) -> None:
    address = addresses.join(folder, "a.bin")
    store.write_bytes(address, content)
    assert store.read_bytes(address) == content


@pytest.mark.s3
def test_ranges_are_read_and_end_with_the_object(folder: str) -> None:
    address = addresses.join(folder, "a.bin")
    store.write_bytes(address, b"0123456789")
    assert store.read_bytes(address, 3) == b"3456789"
    assert store.read_bytes(address, 3, 4) == b"3456"
    assert store.read_bytes(address, 8, 100) == b"89"
    assert store.read_bytes(address, 10, 1) == store.read_bytes(address, 50, 1) == store.read_bytes(address, 4, 0) == b""


@pytest.mark.s3
def test_an_object_larger_than_a_chunk_is_read_whole(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 1000)
    content = os.urandom(3500)
    address = addresses.join(folder, "a.bin")
    store.write_bytes(address, content)
    assert store.read_bytes(address) == content
    assert store.read_bytes(address, 900, 2200) == content[900:3100]


@pytest.mark.s3
def test_writing_again_replaces_the_object(folder: str) -> None:
    address = addresses.join(folder, "a.bin")
    store.write_bytes(address, b"a long first version")
    store.write_bytes(address, b"second")
    assert store.read_bytes(address) == b"second"
    assert store.list_names(folder) == ["a.bin"]


@pytest.mark.s3
def test_a_missing_object_is_one_sentence_that_names_it(folder: str, tmp_path: Path) -> None:
    store.write_bytes(addresses.join(folder, "other"), b"")
    for read in (store.read_bytes, lambda address: store.download(address, tmp_path / "never")):
        with pytest.raises(StorageError) as caught:
            read(addresses.join(folder, "absent.tar"))
        message = str(caught.value)
        assert addresses.join(folder, "absent.tar") in message
        assert re.search(r"does not exist|No such file", message)
        assert "\n" not in message


@pytest.mark.s3
def test_exists_says_whether_an_object_is_there(folder: str) -> None:
    store.write_bytes(addresses.join(folder, "a.bin"), b"1")
    assert store.exists(addresses.join(folder, "a.bin"))
    assert not store.exists(addresses.join(folder, "b.bin"))


@pytest.mark.s3
def test_a_listing_names_what_lies_directly_in_the_folder_in_order(folder: str) -> None:
    for name in ("b.tar", "a.tar", "deeper/c.tar"):
        store.write_bytes(addresses.join(folder, name), b"1")
    store.write_bytes(folder + "-beside/d.tar", b"1")
    assert store.list_names(folder) == store.list_names(folder + "/") == ["a.tar", "b.tar"]


@pytest.mark.s3
def test_a_download_is_whole_and_leaves_nothing_else(folder: str, tmp_path: Path) -> None:
    content = os.urandom(5000)
    store.write_bytes(addresses.join(folder, "a.bin"), content)
    path = tmp_path / "new" / "copy.bin"
    store.download(addresses.join(folder, "a.bin"), path)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.s3
def test_a_download_that_fails_leaves_nothing(folder: str, tmp_path: Path) -> None:
    path = tmp_path / "copies" / "copy.bin"
    with pytest.raises(StorageError):
        store.download(addresses.join(folder, "absent"), path)
    assert not list(path.parent.iterdir())


@pytest.mark.s3
def test_a_copy_that_is_there_is_not_downloaded_again(folder: str, tmp_path: Path) -> None:
    path = tmp_path / "copy.bin"
    path.write_bytes(b"old")
    store.download(addresses.join(folder, "absent"), path)
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("tag", ["first", "older", ""])
def test_what_a_killed_download_left_is_gone_on_with_if_it_is_of_the_same_version(tmp_path: Path, tag: str) -> None:
    content = os.urandom(5000)
    path, partial = tmp_path / "copy.bin", tmp_path / ".copy.bin.partial"
    partial.write_bytes(content[:2000] if tag == "first" else b"x" * 2000)
    (tmp_path / ".copy.bin.partial.etag").write_text(tag and f'"{tag}"')
    mood = Mood(content)
    with server_of(mood) as url:
        store.download(f"{url}/x.tar", path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
    resumed, whole = "GET /x.tar bytes=2000-", "GET /x.tar"
    assert mood.requests == {"first": [resumed], "older": [resumed, whole], "": [whole]}[tag]


def test_a_download_that_runs_out_of_attempts_leaves_what_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ATTEMPTS", 1)
    monkeypatch.setattr(store, "CHUNK_BYTES", 1)
    content = os.urandom(4000)
    mood = Mood(content, broken_bodies=4)  # the client mends three by itself
    with server_of(mood) as url:
        with pytest.raises(StorageError, match="cannot be reached"):
            store.download(f"{url}/x.tar", tmp_path / "copy.bin")
        came = (tmp_path / ".copy.bin.partial").read_bytes()
        assert 0 < len(came) < len(content)
        assert content.startswith(came)
        store.download(f"{url}/x.tar", tmp_path / "copy.bin")
    assert (tmp_path / "copy.bin").read_bytes() == content
    assert mood.requests[-1] == f"GET /x.tar bytes={len(came)}-"


def test_threads_that_want_one_path_download_it_once(tmp_path: Path) -> None:
    mood = Mood(os.urandom(100_000))
    with server_of(mood) as url:
        threads = [threading.Thread(target=store.download, args=(f"{url}/x.tar", tmp_path / "copy")) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (tmp_path / "copy").read_bytes() == mood.content
    assert mood.requests == ["GET /x.tar"]
    assert list(tmp_path.iterdir()) == [tmp_path / "copy"]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.os, "fsync", full)  # type: ignore[attr-defined]
    with server_of(Mood(b"content")) as url, pytest.raises(FullError, match="No space left"):
        store.download(f"{url}/x.tar", tmp_path / "copy")
    assert not list(tmp_path.iterdir())


@pytest.mark.s3
def test_the_size_of_an_object_is_told_without_reading_it(folder: str) -> None:
    store.write_bytes(addresses.join(folder, "a.bin"), b"12345")
    assert store.size(addresses.join(folder, "a.bin")) == 5
    with pytest.raises(MissingError, match=r"b\.bin does not exist"):
        store.size(addresses.join(folder, "b.bin"))


def test_a_signed_url_is_asked_for_with_its_query_and_shown_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ATTEMPTS", 2)
    mood = Mood(b"content")
    with server_of(mood) as url:
        assert store.read_bytes(f"{url}/a/x.tar?oh=s%2Fe&oe=1") == b"content"
        assert mood.requests == ["GET /a/x.tar?oh=s%2Fe&oe=1"]
        mood.busy = 10**6
        with pytest.raises(StorageError, match=r"/a/x\.tar cannot be reached") as caught:
            store.read_bytes(f"{url}/a/x.tar?oh=secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("/a%20b.png", "/a%20b.png"),
        ("/a b.png", "/a%20b.png"),
        ("/été%C3%A9.png", "/%C3%A9t%C3%A9%C3%A9.png"),
        ("/a%2Fb%2bc%25d", "/a%2Fb%2bc%25d"),
        ("/a+b~[1]^|!$&'()*,;=:@", "/a+b~[1]^|!$&'()*,;=:@"),
        ("/100%", "/100%"),
        ("/x.tar#part", "/x.tar"),
        ("/x.tar?a=%2F b#c?d", "/x.tar?a=%2F%20b"),
        ("/a//b///c", "/a//b///c"),
        ("/a/./b/../c", "/a/c"),
        ("/folder/", "/folder/"),
        ("?a=1", "/?a=1"),
        ("/a\tb%00", "/a%09b%00"),
    ],
)
def test_a_url_goes_to_the_server_as_a_browser_would_send_it(written: str, asked: str) -> None:
    mood = Mood(b"content")
    with server_of(mood) as url:
        for root in (url, url.replace("http", "HTTP")):
            assert store.read_bytes(root + written) == b"content"
        assert mood.requests == [f"GET {asked}"] * 2


def test_a_key_is_taken_raw_and_a_name_in_a_folder_is_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    mood = Mood(b"content")
    with server_of(mood) as url:
        use_s3(monkeypatch, url)
        for folder in ("s3://bucket/a%20b", f"{url}/bucket/a%2520b", f"{url}/bucket/a%2520b/manifest.json?x=/#y"):
            store.read_bytes(addresses.join(addresses.folder_of(folder), "c d%20#?.tar"))
    assert mood.requests == ["GET /bucket/a%2520b/c%20d%2520%23%3F.tar"] * 3


def test_urls_of_one_host_share_its_connections() -> None:
    kept = {id(clients.client_and_key(f"http://host/a%20b/{name}")[0]) for name in ("1.tar", "é", "%C3%A9", "c%20d.tar#e")}
    assert len(kept) == 1


def test_what_is_printed_of_a_url_has_no_query_user_or_fragment_and_of_a_key_is_all_of_it() -> None:
    assert addresses.shown("https://user:secret@host/a%20b?sig=secret#secret") == "https://host/a%20b"
    assert addresses.shown("s3://bucket/a?b#c@d") == "s3://bucket/a?b#c@d"


def test_the_keys_of_a_profile_are_found_where_no_variable_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    (tmp_path / "credentials").write_text(
        f"[default]\naws_access_key_id=X\n[lab]\naws_access_key_id=AKIALAB\naws_secret_access_key={SECRET}\n"
    )
    seen: list[str] = []
    monkeypatch.setattr("tests.storage.servers._Handler._answer", lambda self, *, body: _note_who(self, seen))
    with server_of(Mood(b"content")) as url:
        (tmp_path / "config").write_text(f"[profile lab]\nregion = eu-west-9\nendpoint_url = {url}\n")
        with pytest.raises(StorageError, match="may not be read or written"):
            store.read_bytes("s3://bucket/x.tar")
    assert "AKIALAB" in seen[0]
    assert "eu-west-9" in seen[0]


def _note_who(handler: Any, seen: list[str]) -> None:
    seen.append(handler.headers["Authorization"])
    handler._empty(403)


@pytest.mark.s3
def test_many_writers_of_one_address_leave_one_whole_version(folder: str) -> None:
    address = addresses.join(folder, "a.bin")
    versions = [bytes([number]) * 20_000 for number in range(8)]
    failed: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(5):
                store.write_bytes(address, content)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert store.read_bytes(address) in versions


@pytest.mark.s3
def test_parent_and_join_are_each_others_reverse(folder: str) -> None:
    assert addresses.parent(addresses.join(folder, "a.bin")) == folder.removeprefix("file://")
    assert addresses.join(folder + "/", "a") == addresses.join(folder, "a")


@pytest.mark.s3
def test_a_loader_over_s3_gives_the_same_batches_as_over_files(s3_folder: str, tmp_path: Path) -> None:
    sizes = [7, 9, 8]
    addresses = [write_source(tmp_path, sizes), write_source(s3_folder, sizes)]
    assert index_shards(s3_folder) == read_manifest(addresses[0])
    cache = {"folder": str(tmp_path / "cache"), "max_bytes": 10**9}
    settings: list[dict[str, Any]] = [{}, {}, {"cache": tiny()[0].model_validate({**vars(tiny()[0]), "cache": cache}).cache}]
    read = []
    for address, changes in zip([*addresses, addresses[1]], settings, strict=True):
        loader = Loader(data_of(address, **changes), tiny()[1], seed=1, global_samples=8, micro_batch=4)
        batches = [batch for _ in range(7) for batch in loader.take()]
        loader.close()
        read.append([(b.ids, b.keys.tolist(), b.states["image"].tolist(), b.states["text"].tolist()) for b in batches])
    assert read[0] == read[1] == read[2]
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3


@pytest.mark.parametrize("address", BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("act", ["read", "write", "list", "exists", "size", "download", "whole"])
def test_an_address_that_can_be_none_is_one_sentence(
    address: str, act: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_s3(monkeypatch, "http://127.0.0.1:9")
    acts: dict[str, Any] = {
        "read": store.read_bytes,
        "write": lambda address: store.write_bytes(address, b"1"),
        "list": store.list_names,
        "exists": store.exists,
        "size": store.size,
        "download": lambda address: store.download(address, tmp_path / "copy"),
        "whole": store.read_whole,
    }
    with pytest.raises(AddressError, match="is no address that can be read: ") as caught:
        acts[act](address)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message.encode()) < 300


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "file/x", "loop"])
def test_a_path_that_can_name_no_file_is_of_a_file_that_is_missing(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    address = str(tmp_path / name)
    assert not store.exists(address)
    for act in (store.read_bytes, store.size, lambda address: store.download(address, tmp_path / "copy")):
        with pytest.raises(MissingError, match=r"cannot be read|does not exist"):
            act(address)


def test_a_path_of_bytes_that_are_no_text_is_read_and_printed(tmp_path: Path) -> None:
    address = str(tmp_path / os.fsdecode(b"caf\xe9.tar"))
    store.write_bytes(address, b"1")
    assert store.read_bytes(address) == b"1"
    Path(address).unlink()
    with pytest.raises(MissingError, match=r"caf\\xe9\.tar cannot be read"):
        store.read_bytes(address)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/x\.tar cannot be written"):
        store.write_bytes(str(tmp_path / "file" / "x.tar"), b"1")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "x.tar")
    store.write_bytes(address, b"old")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match=r"x\.tar cannot be written: No space left on device"):
        store.write_bytes(address, b"new")
    assert store.read_bytes(address) == b"old"
    monkeypatch.undo()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(StorageError, match=r"x\.tar cannot be written: Input/output error"):
        store.write_bytes(address, b"new")
    assert store.read_bytes(address) == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_a_missing_folder_cannot_be_listed(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="absent cannot be listed: No such file"):
        store.list_names(str(tmp_path / "absent"))


@pytest.mark.parametrize("size", [0, 1, 2**20])
def test_a_file_is_copied_to_an_address_over_what_is_there(folder: str, tmp_path: Path, size: int) -> None:
    file, address = tmp_path / "file", f"{folder}/a/b.bin"
    store.write_bytes(address, b"before")
    file.write_bytes(bytes(size))
    store.upload(file, address)
    assert store.read_bytes(address) == bytes(size)
    assert store.list_names(f"{folder}/a") == ["b.bin"]
    with pytest.raises(StorageError, match="missing cannot be read"):
        store.upload(tmp_path / "missing", address)


def test_what_is_deleted_is_gone_and_may_be_deleted_again(folder: str) -> None:
    for name in ("a", "b"):
        store.write_bytes(f"{folder}/{name}", b"1")
    for _ in range(2):
        store.delete(f"{folder}/a")
        assert store.list_names(folder) == ["b"]


def test_folders_are_listed_without_files_and_what_lies_deeper(folder: str) -> None:
    assert store.list_folders(folder) == []
    for name in ("step_2/deeper/x", "step_1/x", "file"):
        store.write_bytes(f"{folder}/{name}", b"1")
    assert store.list_folders(folder) == ["step_1", "step_2"]
