"""The node-local cache: full disks, killed downloads, machines that died, shards dropped while they are read."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megadiff.config.schema import Cache
from megadiff.data.shards import cache as module
from megadiff.data.shards.cache import ShardCache
from megadiff.data.shards.reader import ShardReader
from megadiff.data.shards.shard import Manifest, ShardEntry, read_manifest
from megadiff.storage import store
from megadiff.storage.errors import FullError
from tests.data.small import sample, write_source
from tests.ranks import ROOT
from tests.storage.servers import Mood, server_of


@pytest.fixture
def far(tmp_path: Path) -> tuple[ShardEntry, bytes]:
    """A shard of two samples: its entry, and its bytes."""
    entry = read_manifest(write_source(tmp_path / "far", [2])).shards[0]
    return entry, (tmp_path / "far" / entry.name).read_bytes()


def cache_at(folder: Path, max_bytes: int = 10**9) -> ShardCache:
    return ShardCache(Cache(folder=str(folder), max_bytes=max_bytes))


def test_a_full_disk_is_warned_of_once_and_shards_are_held_in_memory(
    tmp_path: Path, far: tuple[ShardEntry, bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise FullError("the disk has no space left")

    monkeypatch.setattr(store, "download", full)
    entry, content = far
    cache = cache_at(tmp_path / "cache")
    with server_of(Mood(content)) as url, caplog.at_level(logging.WARNING):
        for _ in range(2):
            shard = cache.shard(f"{url}/{entry.name}", entry)
            assert [shard.members(place) for place in range(2)] == [sample(0), sample(1)]
    assert caplog.text.count("shards are held in memory instead") == 1


def test_a_shard_that_is_open_stays_readable_when_its_file_is_dropped(tmp_path: Path, far: tuple[ShardEntry, bytes]) -> None:
    entry, content = far
    with server_of(Mood(content)) as url:
        shard = cache_at(tmp_path / "cache").shard(f"{url}/{entry.name}", entry)
    (tmp_path / "cache" / f"{entry.sha256}.tar").unlink()
    assert shard.members(1) == sample(1)


def test_a_file_from_before_the_machines_start_is_compared(
    tmp_path: Path, far: tuple[ShardEntry, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that dies may leave the right size with nothing in it."""
    entry, content = far
    path = tmp_path / "cache" / f"{entry.sha256}.tar"
    path.parent.mkdir()
    path.write_bytes(bytes(len(content)))
    monkeypatch.setattr(module, "_started", lambda: time.time() + 100)
    mood = Mood(content)
    with server_of(mood) as url:
        assert cache_at(path.parent).shard(f"{url}/{entry.name}", entry).members(0) == sample(0)
        assert path.read_bytes() == content
        cache_at(path.parent).shard(f"{url}/{entry.name}", entry)
    assert mood.requests == [f"GET /{entry.name}"]


def test_what_killed_downloads_left_makes_room_and_what_is_under_way_does_not(
    tmp_path: Path, far: tuple[ShardEntry, bytes]
) -> None:
    entry, content = far
    folder = tmp_path / "cache"
    folder.mkdir()
    abandoned, busy = folder / ".one.tar.partial", folder / ".two.tar.partial"
    for path in (abandoned, busy):
        path.write_bytes(b"x" * 100)
    (folder / ".one.tar.partial.etag").write_text("tag")
    with busy.open("rb") as held, server_of(Mood(content)) as url:
        fcntl.flock(held, fcntl.LOCK_EX)
        cache_at(folder, 2 * entry.bytes).shard(f"{url}/{entry.name}", entry)
    left = {path.name for path in folder.iterdir()}
    assert left == {".lock", busy.name, f"{entry.sha256}.tar"}


KILLED = """
import sys
from megadiff.config.schema import Cache
from megadiff.data.shards.cache import ShardCache
from megadiff.data.shards.shard import read_manifest
from megadiff.storage import store
store.CHUNK_BYTES = 1024
entry = read_manifest(sys.argv[2]).shards[0]
original = store._chunks
def slowly(*arguments):
    import time
    for number, found in enumerate(original(*arguments)):
        yield found
        if number == 2:
            print("half", flush=True)
            time.sleep(100)
store._chunks = slowly
ShardCache(Cache(folder=sys.argv[1])).shard(sys.argv[3], entry)
"""


@pytest.mark.distributed
def test_a_process_that_is_killed_amid_a_download_hinders_nobody_and_its_bytes_are_used(tmp_path: Path) -> None:
    address = write_source(tmp_path / "far", [30])
    entry = read_manifest(address).shards[0]
    mood = Mood((tmp_path / "far" / entry.name).read_bytes())
    folder = tmp_path / "cache"
    with server_of(mood) as url:
        command = [sys.executable, "-c", KILLED, str(folder), address, f"{url}/{entry.name}"]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert child.stdout is not None
        assert child.stdout.readline() == b"half\n"
        child.send_signal(signal.SIGKILL)
        child.communicate()
        # What it had written lay in the buffers of the process; at most a chunk or so may be missing.
        came = (folder / f".{entry.sha256}.tar.partial").stat().st_size
        shard = cache_at(folder).shard(f"{url}/{entry.name}", entry)
        assert shard.members(29) == sample(29)
    assert mood.requests[-1] == (f"GET /{entry.name} bytes={came}-" if came else f"GET /{entry.name}")
    assert {path.name for path in folder.iterdir()} == {".lock", f"{entry.sha256}.tar"}


def test_expected_shards_are_opened_ahead_and_the_others_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    address = write_source(tmp_path, [1] * 6)
    opened: list[int] = []
    original = ShardReader._read
    monkeypatch.setattr(ShardReader, "_read", lambda self, index: opened.append(index) or original(self, index))
    with ThreadPoolExecutor(1) as pool:
        reader = ShardReader(str(tmp_path), read_manifest(address), fetchers=pool)
        reader.expect([4, 2])
        assert reader.members(2, 0) == sample(2)
        assert opened == [4, 2]
        reader.expect([2, 5])
        assert reader.members(4, 0) == sample(4)  # nobody expects it any more, and it is had all the same
    assert sorted(opened) == [2, 4, 4, 5]


def test_a_shard_that_could_not_be_had_is_tried_again(tmp_path: Path) -> None:
    manifest = read_manifest(write_source(tmp_path, [1]))
    reader = ShardReader(str(tmp_path), Manifest(manifest.shards))
    (tmp_path / "000.tar").rename(tmp_path / "aside")
    with pytest.raises(module.DataError, match=r"000\.tar cannot be read"):  # type: ignore[attr-defined]
        reader.shard(0)
    (tmp_path / "aside").rename(tmp_path / "000.tar")
    assert reader.members(0, 0) == sample(0)
