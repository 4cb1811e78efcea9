"""One way to read and write any address: a file path, or s3:// gs:// az:// http(s)://.

A read keeps to one version of an object: when a body breaks, the rest is requested by Range with If-Match.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import obstore
from obstore.exceptions import BaseError, PreconditionError

from megadiff.storage import addresses, clients, local
from megadiff.storage.errors import MissingError, StorageError

CHUNK_BYTES = 2**18
"""Least size of the chunks that a body is read in; a body that breaks loses less than one."""
ATTEMPTS = 8
"""Consecutive failures after which a request is given up; every chunk received resets the count."""
_LEAST_PART, _MOST_PARTS = 2**23, 9_000
"""Bytes of a part of an upload; S3 takes 10,000 parts of an object."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 15.0

Result = TypeVar("Result")


def read_bytes(address: str, offset: int = 0, length: int | None = None) -> bytes:
    """The object's bytes, or the `length` bytes from `offset`; fewer where the object ends.

    Raises:
        StorageError: it is missing, forbidden or out of reach after several attempts, or changed meanwhile.
    """
    if addresses.is_local(address):
        return local.read_file(address, offset, length)
    if length == 0:
        return b""
    return b"".join(chunk for _, chunk in _chunks(address, offset, None if length is None else offset + length))


def read_whole(address: str) -> memoryview:
    """The object's bytes without a second copy, for large objects. Raises as `read_bytes`."""
    if addresses.is_local(address):
        return memoryview(local.read_file(address, 0, None))
    client, key = clients.client_and_key(address)
    try:
        return memoryview(obstore.get(client, key).bytes())  # the client resumes a broken body a few times by itself
    except (BaseError, OSError):
        pass  # the client gave up: read it chunk by chunk
    whole, filled = memoryview(b""), 0
    for size, chunk in _chunks(address):
        if not filled:
            whole = memoryview(bytearray(size))
        whole[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    assert filled == len(whole)
    return whole


def write_bytes(address: str, data: bytes) -> None:
    """Write the whole object; a reader sees the old one or the new one, never a part."""
    if addresses.is_local(address):
        return _write_file(address, data)
    client, key = clients.client_and_key(address)
    _retried(address, lambda: obstore.put(client, key, data))
    return None


def upload(path: Path, address: str) -> None:
    """Copy a file of any size to an address; a reader sees the old object or the new one, never a part.

    Raises:
        StorageError: the file cannot be read, or the address not be written after several attempts.
    """
    try:
        part = max(_LEAST_PART, path.stat().st_size // _MOST_PARTS + 1)
    except OSError as error:
        raise local.unreadable(str(path), error) from None
    if addresses.is_local(address):
        return _write_aside(address, lambda aside: shutil.copyfile(path, aside))
    client, key = clients.client_and_key(address)
    _retried(address, lambda: obstore.put(client, key, path, chunk_size=part))
    return None


def delete(address: str) -> None:
    """Delete an object, which may be missing. Raises StorageError."""
    if addresses.is_local(address):
        try:
            addresses.local_path(address).unlink(missing_ok=True)
        except OSError as error:
            raise local.unwritable(address, error) from None
        return
    client, key = clients.client_and_key(address)
    with suppress(MissingError):  # some stores say so
        _retried(address, lambda: obstore.delete(client, key))


def download(address: str, path: Path) -> None:
    """Copy an object to a local path, which appears only when it is whole; an existing file is left as it is.

    Processes that want the same path wait for the first. The partial copy of a killed process is continued if the object is
    still the same version.

    Raises:
        FullError: the disk is full. StorageError: as `read_bytes`, or the path cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with local.locked(partial) as file:
            if path.exists():
                partial.unlink()
                return
            try:
                _fill(file, partial, address)
                file.flush()
                os.fsync(file.fileno())  # a machine that dies must not leave a file of the right size and wrong content
                partial.replace(path)
            except OSError:
                file.truncate(0)
                raise
            finally:
                if file.seek(0, os.SEEK_END) == 0:
                    partial.unlink(missing_ok=True)
                if not partial.exists():
                    local.tag_file(partial).unlink(missing_ok=True)
    except OSError as error:
        raise local.unwritable(str(path), error) from None


def exists(address: str) -> bool:
    """Whether an object, or a file or folder of this machine, exists. Raises StorageError if it cannot be reached."""
    try:
        size(address)
    except MissingError:
        return False
    return True


def size(address: str) -> int:
    """The object's size in bytes. Raises MissingError if there is none, StorageError if it cannot be reached."""
    if addresses.is_local(address):
        try:
            return addresses.local_path(address).stat().st_size
        except FileNotFoundError:
            raise MissingError(f"{addresses.shown(address)} does not exist") from None
        except OSError as error:
            raise local.unreadable(address, error) from None
    client, key = clients.client_and_key(address)
    return int(_retried(address, lambda: obstore.head(client, key))["size"])


def list_names(folder: str) -> list[str]:
    """Sorted names of the objects directly inside a folder."""
    if addresses.is_local(folder):
        try:
            return sorted(path.name for path in addresses.local_path(folder).iterdir() if path.is_file())
        except NotADirectoryError:
            raise StorageError(f"{addresses.shown(folder)} is a file, not a folder") from None
        except OSError as error:
            raise StorageError(f"{addresses.shown(folder)} cannot be listed: {error.strerror}") from None
    client, key = clients.client_and_key(folder)
    listing = _retried(folder, lambda: obstore.list_with_delimiter(client, key))
    return sorted(entry["path"].rpartition("/")[2] for entry in listing["objects"])


def list_folders(folder: str) -> list[str]:
    """Sorted names of the folders directly inside a folder; none if there is no such folder."""
    if addresses.is_local(folder):
        try:
            return sorted(path.name for path in addresses.local_path(folder).iterdir() if path.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"{addresses.shown(folder)} cannot be listed: {error.strerror}") from None
    client, key = clients.client_and_key(folder)
    listing = _retried(folder, lambda: obstore.list_with_delimiter(client, key))
    return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in listing["common_prefixes"])


# --------------------------------------------------------------------------------------------------------------- files


def _write_file(address: str, data: bytes) -> None:
    _write_aside(address, lambda aside: aside.write_bytes(data))


def _write_aside(address: str, write: Callable[[Path], object]) -> None:
    path = addresses.local_path(address)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(aside)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise local.unwritable(address, error) from None


def _fill(file: BinaryIO, partial: Path, address: str) -> None:
    """Complete a partial copy."""
    if addresses.is_local(address):
        with local.opened(address) as source:
            file.truncate(0)
            shutil.copyfileobj(source, file, CHUNK_BYTES)
        return
    start, tag = file.seek(0, os.SEEK_END), local.tag_of(partial)
    if not tag:
        start = local.emptied(file)
    try:
        _append(file, partial, address, start, tag)
    except _ChangedError:
        if not start:
            raise
        _append(file, partial, address, local.emptied(file), None)  # the partial copy is of an older version


def _append(file: BinaryIO, partial: Path, address: str, start: int, tag: str | None) -> None:
    version = _Version(tag)
    for _, chunk in _chunks(address, start, None, version):
        if version.tag != tag:
            local.tag_file(partial).write_text(version.tag or "", encoding="utf-8")
            tag = version.tag
        file.write(chunk)


# ------------------------------------------------------------------------------------------------------ distant objects


class _ChangedError(StorageError):
    """The object was replaced while it was read."""


class _Version:
    """The version of an object that is being read: its ETag, once it is known."""

    def __init__(self, tag: str | None = None) -> None:
        self.tag = tag

    def check(self, tag: str | None) -> None:
        """Compare an answer's ETag with the version's: not every server heeds If-Match."""
        if self.tag is not None and tag not in (None, self.tag):
            raise PreconditionError("it has another ETag than at the start")
        self.tag = self.tag or tag


class _Retry:
    """Pauses between attempts, doubled each time, with jitter; any progress resets the count."""

    def __init__(self, address: str) -> None:
        self.address, self.failures = address, 0

    def progress(self) -> None:
        self.failures = 0

    def failed(self, error: Exception) -> None:
        """Pause, or raise the error's meaning if it is final."""
        if isinstance(error, PreconditionError):
            name = addresses.shown(self.address)
            raise _ChangedError(f"{name} changed while it was read; shards must not be replaced during a run")
        self.failures += 1
        status = clients.status_of(error)
        if clients.is_final(self.address, status) or self.failures >= ATTEMPTS:
            raise clients.failure(self.address, error, status, self.failures)
        pause = min(_FIRST_PAUSE_S * 2 ** (self.failures - 1), _LONGEST_PAUSE_S)
        time.sleep(pause * random.uniform(0.5, 1.5))


def _chunks(
    address: str, start: int = 0, stop: int | None = None, version: _Version | None = None
) -> Iterator[tuple[int, memoryview]]:
    """(size of the object, chunk) for the chunks of a range, all of one version; the range ends with the object."""
    client, key = clients.client_and_key(address)
    version, retry = version or _Version(), _Retry(address)
    size = None
    while size is None or start < (size if stop is None else min(stop, size)):
        try:
            answer = obstore.get(client, key, options=_options(start, stop, version.tag))
            version.check(answer.meta["e_tag"])
            size = int(answer.meta["size"])
            end = answer.range[1]
            for chunk in answer.stream(min_chunk_size=CHUNK_BYTES):
                retry.progress()
                start += len(chunk)
                yield size, memoryview(chunk)
            if start < end:
                raise OSError(f"the body ended {end - start} bytes early")
        except (BaseError, OSError) as error:
            if (
                size is None
                and start
                and not isinstance(error, PreconditionError)
                and _ends_before(client, key, start, version)
            ):
                return
            retry.failed(error)


def _options(start: int, stop: int | None, tag: str | None) -> Any:
    options: dict[str, Any] = {}
    if stop is not None:
        options["range"] = (start, stop)
    elif start:
        options["range"] = {"offset": start}
    if tag is not None and not tag.startswith("W/"):  # a weak tag never matches
        options["if_match"] = tag
    return options


def _ends_before(client: Any, key: str, start: int, version: _Version) -> bool:
    """Whether a range was refused because it begins at or after the object's end. The error itself does not tell reliably."""
    try:
        meta = obstore.head(client, key)
    except (BaseError, OSError):
        return False
    return int(meta["size"]) <= start and meta["e_tag"] in (None, version.tag or meta["e_tag"])


def _retried(address: str, attempt: Callable[[], Result]) -> Result:
    retry = _Retry(address)
    while True:
        try:
            return attempt()
        except (BaseError, OSError) as error:
            retry.failed(error)
