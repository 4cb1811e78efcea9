"""One way to read and write any address: a file path, or s3:// gs:// az:// http(s)://. The only file that imports obstore.

Credentials come from the usual places (AWS_*, GOOGLE_*, AZURE_* variables, instance metadata) and are never logged.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import from_url

from megadiff.config.errors import UserError

CHUNK_BYTES = 8 * 2**20
"""Remote objects are read in ranges of this size, so that a body that breaks costs one range."""
ATTEMPTS = 6
_FIRST_PAUSE_S = 0.2

Result = TypeVar("Result")


class StorageError(UserError):
    """An object that is missing, forbidden, out of reach, or that changed while it was read."""


class MissingError(StorageError):
    """A distant object that does not exist."""


def is_local(address: str) -> bool:
    """Whether the address is a path on this machine."""
    return "://" not in address or address.startswith("file://")


def local_path(address: str) -> Path:
    return Path(address.removeprefix("file://"))


def join(folder: str, name: str) -> str:
    """The address of `name` inside `folder`."""
    return f"{folder.rstrip('/')}/{name}"


def parent(address: str) -> str:
    """The folder that an address lies in."""
    return str(local_path(address).parent) if is_local(address) else address.rstrip("/").rpartition("/")[0]


def read_bytes(address: str, offset: int = 0, length: int | None = None) -> bytes:
    """The object's bytes, or `length` of them from `offset`.

    Raises:
        StorageError: it is missing, forbidden or out of reach after several attempts, or changed meanwhile.
    """
    if is_local(address):
        return _read_file(address, offset, length)
    store, path = _store_and_path(address)
    meta = _with_retries(address, lambda: obstore.head(store, path))
    end = meta["size"] if length is None else min(offset + length, meta["size"])
    parts = []
    while offset < end:
        stop = min(offset + CHUNK_BYTES, end)
        parts.append(_with_retries(address, lambda a=offset, b=stop: _range(store, path, a, b, meta["e_tag"])))  # type: ignore[misc]
        offset = stop
    return b"".join(parts)


def write_bytes(address: str, data: bytes) -> None:
    """Write the whole object; a reader sees the old one or the new one, never a part."""
    if is_local(address):
        return _write_file(address, data)
    store, path_in_store = _store_and_path(address)
    _with_retries(address, lambda: obstore.put(store, path_in_store, data))
    return None


def download(address: str, path: Path) -> None:
    """Copy an object to a local path, which appears only when it is whole."""
    _write_file(str(path), read_bytes(address))


def exists(address: str) -> bool:
    if is_local(address):
        return local_path(address).exists()
    store, path = _store_and_path(address)
    try:
        _with_retries(address, lambda: obstore.head(store, path))
    except MissingError:
        return False
    return True


def list_names(folder: str) -> list[str]:
    """Sorted names of the objects directly inside a folder."""
    if is_local(folder):
        try:
            return sorted(path.name for path in local_path(folder).iterdir() if path.is_file())
        except OSError as error:
            raise StorageError(f"{folder} cannot be listed: {error.strerror}") from None
    store, path = _store_and_path(folder)
    found = _with_retries(folder, lambda: obstore.list_with_delimiter(store, path))
    return sorted(entry["path"].rpartition("/")[2] for entry in found["objects"])


def _read_file(address: str, offset: int, length: int | None) -> bytes:
    try:
        with local_path(address).open("rb") as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)
    except OSError as error:
        raise StorageError(f"{address} cannot be read: {error.strerror}") from None


def _write_file(address: str, data: bytes) -> None:
    path = local_path(address)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(data)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{address} cannot be written: {error.strerror}") from None


def _range(store: Any, path: str, start: int, stop: int, tag: str | None) -> bytes:
    """One range, of the object that was there at the start (its ETag must still match)."""
    options: dict[str, Any] = {"range": (start, stop)}
    if tag is not None:
        options["if_match"] = tag
    found = obstore.get(store, path, options=options)
    # Not every server heeds If-Match; what it sends says which version it is.
    if tag is not None and found.meta["e_tag"] not in (None, tag):
        raise PreconditionError(f"{path} has another ETag than at the start")
    data = bytes(found.bytes())
    if len(data) != stop - start:
        raise OSError(f"{len(data)} bytes came instead of {stop - start}")
    return data


def _with_retries(address: str, attempt: Callable[[], Result]) -> Result:
    pause = _FIRST_PAUSE_S
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except (NotFoundError, FileNotFoundError, PermissionDeniedError, UnauthenticatedError, PermissionError) as error:
            raise _explain(address, error) from None
        except PreconditionError:
            raise StorageError(f"{address} changed while it was read; shards must not be replaced during a run") from None
        except (BaseError, OSError) as error:
            if number == ATTEMPTS:
                raise _explain(address, error) from None
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause *= 2
    raise AssertionError("unreachable")


def _explain(address: str, error: Exception) -> StorageError:
    if isinstance(error, NotFoundError | FileNotFoundError):
        return MissingError(f"{address} does not exist")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError):
        return StorageError(f"{address} may not be read or written with the credentials at hand")
    return StorageError(f"{address} cannot be reached after {ATTEMPTS} attempts: {_in_one_line(error)}")


def _in_one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error).partition("Debug source")[0]).strip()[:200]


def _store_and_path(address: str) -> tuple[Any, str]:
    scheme, _, rest = address.partition("://")
    bucket, _, path = rest.partition("/")
    return _store(f"{scheme}://{bucket}"), path


@lru_cache(maxsize=16)
def _store(root: str) -> Any:
    """One client per bucket or host; it keeps its connections."""
    retry: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}
    client: Any = {"timeout": "60s", "connect_timeout": "10s", "allow_http": True}
    config: Any = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if root.startswith("s3://") and endpoint:
        config = {"endpoint": endpoint, "virtual_hosted_style_request": "false"}
    try:
        return from_url(root, config=config or None, client_options=client, retry_config=retry)
    except (BaseError, ValueError) as error:
        raise StorageError(f"{root} is no address that can be read: {_in_one_line(error)}") from None
