"""The storage room against a real S3 server: whole objects, ranges, listings, and objects that change."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megadiff.storage import clients, store
from megadiff.storage.errors import StorageError
from tests.s3.faults import FaultProxy, Plan
from tests.s3.server import Ceph

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]


@pytest.mark.parametrize("size", [0, 1, 2**20, 9 * 2**20 + 1])
def test_what_was_written_is_read(bucket: str, tmp_path: Path, size: int) -> None:
    address, content = f"{bucket}/some folder/ä+b=1.bin", os.urandom(size)
    store.write_bytes(address, content)
    assert store.read_bytes(address) == content
    assert store.size(address) == size
    store.download(address, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


def test_ranges_are_read_and_end_with_the_object(bucket: str) -> None:
    address, content = f"{bucket}/a.bin", os.urandom(3 * 2**20)
    store.write_bytes(address, content)
    for offset, length in [(0, 1), (5, None), (2**20 - 1, 2), (100, 2 * 2**20), (len(content) - 3, 100)]:
        assert store.read_bytes(address, offset, length) == content[offset : None if length is None else offset + length]
    assert store.read_bytes(address, len(content), 1) == store.read_bytes(address, 10, 0) == b""


def test_a_listing_names_what_lies_directly_in_the_folder_also_beyond_a_thousand(bucket: str) -> None:
    names = [f"{number:04d}.tar" for number in range(1005)]
    objects = [*(f"folder/{name}" for name in names), "folder/deeper/x.tar", "folder-beside/x.tar"]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.write_bytes(f"{bucket}/{name}", b""), objects))
    assert store.list_names(f"{bucket}/folder") == names
    assert store.list_names(f"{bucket}/nothing-here") == []


def test_exists_says_whether_an_object_is_there(bucket: str) -> None:
    store.write_bytes(f"{bucket}/a/b.bin", b"1")
    assert store.exists(f"{bucket}/a/b.bin")
    assert not store.exists(f"{bucket}/a/c.bin")
    assert not store.exists(f"{bucket}/a")


def test_writing_again_replaces_the_object(bucket: str) -> None:
    store.write_bytes(f"{bucket}/a.bin", b"a long first version")
    store.write_bytes(f"{bucket}/a.bin", b"second")
    assert store.read_bytes(f"{bucket}/a.bin") == b"second"


# What an error says holds the object's name, and 416 is the status of a range that begins where the object has ended.
NAMES = ["x.tar", "000416.tar"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("act", ["read", "download"])
def test_an_object_that_is_replaced_between_two_ranges_is_an_error_that_says_so(
    bucket: str, s3: Ceph, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, act: str, name: str
) -> None:
    address, path = f"{bucket}/{name}", tmp_path / "copy"
    store.write_bytes(address, bytes(6 * 2**20))

    def replace() -> None:
        client.put_object(Bucket=bucket.removeprefix("s3://"), Key=name, Body=b"1" * 6 * 2**20)

    with FaultProxy(s3.url, Plan(seed=1, truncated=1.0)) as proxy:
        proxy.before_cut = replace
        s3.use(monkeypatch, proxy.url)
        clients.bucket_client.cache_clear()
        with pytest.raises(StorageError, match="changed while it was read") as caught:
            _ = store.read_bytes(address) if act == "read" else store.download(address, path)
        clients.bucket_client.cache_clear()
    assert proxy.done["truncated"] >= 1
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not path.exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("act", ["read", "download"])
def test_a_body_that_breaks_before_a_server_that_is_busy_for_seconds_is_read_to_its_end(
    bucket: str, s3: Ceph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, act: str, name: str
) -> None:
    address, path, content = f"{bucket}/{name}", tmp_path / "copy", os.urandom(6 * 2**20)
    store.write_bytes(address, content)
    with FaultProxy(s3.url, Plan(seed=1, truncated=1.0)) as proxy:

        def become_busy() -> None:
            proxy.plan = Plan(busy=1.0)
            calm.start()

        calm = threading.Timer(3.0, lambda: setattr(proxy, "plan", Plan()))
        proxy.before_cut = become_busy
        s3.use(monkeypatch, proxy.url)
        clients.bucket_client.cache_clear()
        if act == "read":
            path.write_bytes(store.read_bytes(address))
        else:
            store.download(address, path)
        calm.join()
        clients.bucket_client.cache_clear()
    assert path.stat().st_size == len(content)
    assert path.read_bytes() == content
    assert proxy.done["truncated"] == 1
    assert proxy.done["busy"] >= 4  # more than the client itself tries
