"""Storage that fails: broken, changed, busy, refused and absent objects."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from megadiff.data.reading.loader import Loader
from megadiff.data.shards.shard import read_manifest
from megadiff.storage import addresses, clients, store
from megadiff.storage.errors import MissingError, StorageError
from tests.data.small import data_of, tiny, write_source
from tests.ranks import free_port
from tests.storage.servers import SECRET, Mood, server_of, use_s3

pytestmark = pytest.mark.s3


@pytest.mark.parametrize("address", ["http", "s3"])
@pytest.mark.parametrize("broken", [1, 4])
def test_bodies_that_break_half_way_cost_no_byte_and_repeat_none(
    monkeypatch: pytest.MonkeyPatch, address: str, broken: int
) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 10_000)
    content = os.urandom(35_000)
    mood = Mood(content, broken_bodies=broken)
    with server_of(mood) as url:
        if address == "s3":
            use_s3(monkeypatch, url)
        assert store.read_bytes(f"{url}/bucket/x.tar" if address == "http" else "s3://bucket/x.tar") == content
    assert mood.broken_bodies == 0


def test_a_loader_reads_each_sample_once_through_bodies_that_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 4096)
    address = write_source(tmp_path, [16])
    manifest = read_manifest(address)
    mood = Mood((tmp_path / "000.tar").read_bytes(), broken_bodies=3)
    monkeypatch.setattr("megadiff.data.reading.loader.read_manifest", lambda _: manifest)
    with server_of(mood) as url:
        loader = Loader(data_of(f"{url}/source/manifest.json"), tiny()[1], seed=1, global_samples=16, micro_batch=16)
        (batch,) = loader.take()
        loader.close()
    assert sorted(batch.ids) == [f"000.tar/{number:05d}" for number in range(16)]
    assert (batch.weight == 1).all()


def test_a_body_that_always_breaks_ends_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ATTEMPTS", 2)
    said = r"x\.tar cannot be reached after 2 attempts: "
    with server_of(Mood(b"x" * 1000, broken_bodies=10**6)) as url, pytest.raises(StorageError, match=said) as caught:
        store.read_bytes(f"{url}/x.tar")
    assert "\n" not in str(caught.value)


def test_a_server_that_is_busy_for_a_while_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mood = Mood(b"content", busy=3)
    with server_of(mood) as url:
        assert store.read_bytes(f"{url}/x.tar") == b"content"
    assert len(mood.requests) == 4


@pytest.mark.parametrize("address", ["http", "s3"])
def test_an_object_that_changes_between_two_ranges_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    with server_of(Mood(b"x" * 3000, broken_bodies=1, changes_after=1)) as url:
        if address == "s3":
            use_s3(monkeypatch, url)
        with pytest.raises(StorageError, match=r"x\.tar changed while it was read"):
            store.read_bytes(f"{url}/bucket/x.tar" if address == "http" else "s3://bucket/x.tar")


@pytest.mark.s3
def test_an_object_of_s3_that_is_replaced_between_two_ranges_is_an_error_that_says_so(
    s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = addresses.join(s3_folder, "x.tar")
    store.write_bytes(address, b"1" * 3000)
    original = store.obstore.get  # type: ignore[attr-defined]

    def broken(*arguments: Any, **options: Any) -> Any:
        original(*arguments, **options)
        monkeypatch.setattr(store.obstore, "get", original)  # type: ignore[attr-defined]
        store.write_bytes(address, b"2" * 3000)
        raise OSError("the connection is gone")

    version = store._Version()
    assert b"".join(chunk for _, chunk in store._chunks(address, 0, 1000, version)) == b"1" * 1000
    monkeypatch.setattr(store.obstore, "get", broken)  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=r"x\.tar changed while it was read"):
        list(store._chunks(address, 1000, None, version))


@pytest.mark.parametrize("act", ["read", "write", "list", "exists"])
def test_a_refused_connection_is_one_sentence_after_the_attempts(monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    monkeypatch.setattr(store, "ATTEMPTS", 2)
    use_s3(monkeypatch, f"http://127.0.0.1:{free_port()}")
    acts: dict[str, Any] = {
        "read": store.read_bytes,
        "write": lambda address: store.write_bytes(address, b"1"),
        "list": store.list_names,
        "exists": store.exists,
    }
    with pytest.raises(StorageError) as caught:
        acts[act]("s3://bucket/x.tar")
    message = str(caught.value)
    assert message.startswith("s3://bucket/x.tar cannot be reached after 2 attempts: ")
    assert "\n" not in message
    assert SECRET not in message


REFUSALS = {
    301: "its bucket lies in another region; set AWS_REGION",
    401: "with the credentials at hand",
    403: "with the credentials at hand",
    404: "does not exist",
    410: "does not exist",
    451: r"the server refuses the request \(status 451\)",
}


@pytest.mark.parametrize("status", REFUSALS)
@pytest.mark.parametrize("act", [store.read_bytes, store.size, store.list_names])
def test_a_refusal_or_an_absence_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, status: int, act: Any) -> None:
    mood = Mood(b"content")
    monkeypatch.setattr("tests.storage.servers._Handler._answer", lambda self, *, body: _refuse(self, mood, status))
    with server_of(mood) as url:
        use_s3(monkeypatch, url)
        with pytest.raises(StorageError, match=REFUSALS[status]) as caught:
            act("s3://bucket/x status code: 503/")
    assert len(mood.requests) == 1
    assert SECRET not in str(caught.value)
    assert isinstance(caught.value, MissingError) == (status in (404, 410))


def _refuse(handler: Any, mood: Mood, status: int, body: bytes = b"") -> None:
    mood.requests.append(handler.path)
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.mark.parametrize("status", [400, 405, 414])
def test_a_url_that_a_server_refuses_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    mood = Mood(b"content")
    monkeypatch.setattr("tests.storage.servers._Handler._answer", lambda self, *, body: _refuse(self, mood, status))
    with server_of(mood) as url, pytest.raises(StorageError, match=r"does not exist|the server refuses the request \(status 4"):
        store.read_bytes(f"{url}/x?y")
    assert len(mood.requests) == 1


@pytest.mark.parametrize("status", [400, 408, 429, 500, 503])
def test_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr(store, "ATTEMPTS", 2)
    monkeypatch.setattr(clients, "_RETRY", {"max_retries": 0})
    mood = Mood(b"content")
    monkeypatch.setattr("tests.storage.servers._Handler._answer", lambda self, *, body: _refuse(self, mood, status))
    with server_of(mood) as url:
        use_s3(monkeypatch, url)
        with pytest.raises(StorageError, match="cannot be reached after 2 attempts"):
            store.list_names("s3://bucket/x Error performing GET y in z - Server returned non-2xx status code: 404")
    assert len(mood.requests) == 2


@pytest.mark.parametrize("act", [store.read_bytes, store.list_names])
def test_a_bucket_that_is_missing_is_said_at_once(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    told = b"<Error><Code>NoSuchBucket</Code></Error>"
    mood = Mood(b"content")
    monkeypatch.setattr("tests.storage.servers._Handler._answer", lambda self, *, body: _refuse(self, mood, 404, told))
    with server_of(mood) as url:
        use_s3(monkeypatch, url)
        with pytest.raises(MissingError, match="s3://bucket/some/x does not exist: there is no bucket s3://bucket"):
            act("s3://bucket/some/x")
    assert len(mood.requests) == 1


def test_no_credentials_are_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    mood = Mood(b"content", busy=1)
    with caplog.at_level(logging.DEBUG), server_of(mood) as url:
        use_s3(monkeypatch, url)
        store.read_bytes("s3://bucket/x.tar")
    assert SECRET not in caplog.text
