"""Files on this machine: opened, read and locked, and the tags of partial copies."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megadiff.storage.addresses import local_path, shown
from megadiff.storage.errors import FullError, MissingError, StorageError

_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def opened(address: str) -> BinaryIO:
    try:
        return local_path(address).open("rb")
    except OSError as error:
        raise unreadable(address, error) from None


def read_file(address: str, offset: int, length: int | None) -> bytes:
    try:
        with local_path(address).open("rb") as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)
    except OSError as error:
        raise unreadable(address, error) from None


def unreadable(address: str, error: OSError) -> StorageError:
    """The error for a file that cannot be read: it is missing, or out of reach."""
    kind = MissingError if error.errno in _NO_FILE else StorageError
    return kind(f"{shown(address)} cannot be read: {error.strerror}")


def unwritable(address: str, error: OSError) -> StorageError:
    kind = FullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
    return kind(f"{shown(address)} cannot be written: {error.strerror}")


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """The file at a path, created if missing, under a lock of this process alone."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(path, file):
                yield file
                return
        finally:  # the last holder may have renamed or deleted it: then the next turn opens the present one
            file.close()


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def emptied(file: BinaryIO) -> int:
    file.seek(0)
    return file.truncate(0)


def tag_file(partial: Path) -> Path:
    return partial.with_name(partial.name + ".etag")


def tag_of(partial: Path) -> str | None:
    try:
        return tag_file(partial).read_text(encoding="utf-8") or None
    except OSError:
        return None
