"""One way to read and write any address: a file path, or s3:// gs:// az:// http(s)://. The only file that imports obstore.

Credentials come from the usual places (AWS_*, GOOGLE_*, AZURE_* variables, ~/.aws, instance metadata) and are never logged.
A reading asks for one version of an object: when a body breaks, the rest is asked for by Range with If-Match.
"""

from __future__ import annotations

import configparser
import errno
import fcntl
import os
import random
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, unquote

import obstore
from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import HTTPStore, from_url

from megadiff.config.errors import UserError

CHUNK_BYTES = 2**18
"""Bodies are taken in chunks of at least this size; what is lost when one breaks is less."""
ATTEMPTS = 8
"""So often in a row may a request fail, or a body break without another chunk, before that is an error."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 15.0

Result = TypeVar("Result")


class StorageError(UserError):
    """An object that is missing, forbidden, out of reach, or that changed while it was read."""


class MissingError(StorageError):
    """An object that does not exist."""


class AddressError(StorageError):
    """An address that can be no object's."""


class FullError(StorageError):
    """A disk without room for what should be written."""


def is_local(address: str) -> bool:
    """Whether the address is a path on this machine."""
    return "://" not in address or address.startswith("file://")


def is_url(address: str) -> bool:
    """Whether the address is a URL, which is sent to its server as it is written; all others name keys and paths, raw."""
    return _URL.match(address) is not None


def local_path(address: str) -> Path:
    """Raises AddressError if it holds what no path can: a NUL, or half of a surrogate pair."""
    try:
        if b"\0" in os.fsencode(address):
            raise AddressError(f"{shown(address)} is no address that can be read: a path holds no NUL")
    except UnicodeEncodeError:
        raise AddressError(f"{shown(address)} is no address that can be read: it holds half of a surrogate pair") from None
    return Path(address.removeprefix("file://"))


def join(folder: str, name: str) -> str:
    """The address of `name`, a raw name, inside `folder`."""
    if is_url(folder):
        folder, name = _without_query(folder), quote(name, _AS_IS, errors="surrogatepass")
    return f"{folder.rstrip('/')}/{name}"


def is_json(address: str) -> bool:
    """Whether an address names a JSON file, not a folder."""
    return _without_query(address).endswith(".json")


def folder_of(address: str) -> str:
    """The folder of a JSON file that is named itself or by its folder."""
    return parent(address) if is_json(address) else address


def parent(address: str) -> str:
    """The folder that an address lies in."""
    if is_local(address):
        return str(local_path(address).parent)
    return _without_query(address).rstrip("/").rpartition("/")[0]


def read_bytes(address: str, offset: int = 0, length: int | None = None) -> bytes:
    """The object's bytes, or `length` of them from `offset`.

    Raises:
        StorageError: it is missing, forbidden or out of reach after several attempts, or changed meanwhile.
    """
    if is_local(address):
        return _read_file(address, offset, length)
    if length == 0:
        return b""
    return b"".join(chunk for _, chunk in _chunks(address, offset, None if length is None else offset + length))


def read_whole(address: str) -> memoryview:
    """The object's bytes without a second copy of them, for large ones. Raises as `read_bytes`."""
    if is_local(address):
        return memoryview(_read_file(address, 0, None))
    store, path = _store_and_path(address)
    try:
        return memoryview(obstore.get(store, path).bytes())  # the client mends a body that breaks a few times by itself
    except (BaseError, OSError):
        pass  # and what it gives up on is read piece by piece
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
    if is_local(address):
        return _write_file(address, data)
    store, path = _store_and_path(address)
    _with_retries(address, lambda: obstore.put(store, path, data))
    return None


def download(address: str, path: Path) -> None:
    """Copy an object to a local path, which appears only when it is whole; where there is a file, nothing is done.

    Processes that want the same path wait for the first. What a killed one has left is gone on with, if the object is still
    the same version.

    Raises:
        FullError: the disk is full. StorageError: as `read_bytes`, or the path cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial) as file:
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
                    _tag_file(partial).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(str(path), error) from None


def exists(address: str) -> bool:
    """Whether there is an object, or on this machine a file or a folder. Raises StorageError if that cannot be told."""
    try:
        size(address)
    except MissingError:
        return False
    return True


def size(address: str) -> int:
    """The object's size in bytes. Raises MissingError if there is none, StorageError if it cannot be reached."""
    if is_local(address):
        try:
            return local_path(address).stat().st_size
        except FileNotFoundError:
            raise MissingError(f"{shown(address)} does not exist") from None
        except OSError as error:
            raise unreadable(address, error) from None
    store, path = _store_and_path(address)
    return int(_with_retries(address, lambda: obstore.head(store, path))["size"])


def list_names(folder: str) -> list[str]:
    """Sorted names of the objects directly inside a folder."""
    if is_local(folder):
        try:
            return sorted(path.name for path in local_path(folder).iterdir() if path.is_file())
        except NotADirectoryError:
            raise StorageError(f"{shown(folder)} is a file, not a folder") from None
        except OSError as error:
            raise StorageError(f"{shown(folder)} cannot be listed: {error.strerror}") from None
    store, path = _store_and_path(folder)
    found = _with_retries(folder, lambda: obstore.list_with_delimiter(store, path))
    return sorted(entry["path"].rpartition("/")[2] for entry in found["objects"])


def shown(address: str) -> str:
    """An address as it may be printed: in one line, and without what a URL's query or user part may give away."""
    if not is_url(address):
        return printable(address)
    scheme, _, rest = _without_query(address).partition("://")
    host, slash, path = rest.partition("/")
    return printable(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}")


def printable(text: str) -> str:
    """A name or address as one line that UTF-8 can hold: control letters, bytes of no UTF-8 and half pairs as escapes."""
    return re.sub("[\x00-\x1f\x7f\ud800-\udfff]", lambda letter: _escaped(letter[0]), text)


def _escaped(letter: str) -> str:
    is_byte = "\udc80" <= letter <= "\udcff"  # as Python holds the bytes of a path that are no UTF-8
    return f"\\x{ord(letter) - 0xDC00:02x}" if is_byte else ascii(letter)[1:-1]


# --------------------------------------------------------------------------------------------------------------- files


def _read_file(address: str, offset: int, length: int | None) -> bytes:
    try:
        with local_path(address).open("rb") as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)
    except OSError as error:
        raise unreadable(address, error) from None


def unreadable(address: str, error: OSError) -> StorageError:
    """What a failure to read a file means: there is none, or it cannot be had."""
    kind = MissingError if error.errno in _NO_FILE else StorageError
    return kind(f"{shown(address)} cannot be read: {error.strerror}")


_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


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
        raise _unwritable(address, error) from None


def _unwritable(address: str, error: OSError) -> StorageError:
    kind = FullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
    return kind(f"{shown(address)} cannot be written: {error.strerror}")


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file at a path, made if it is not there, held by this process alone."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(path, file):
                yield file
                return
        finally:  # its holder has renamed or deleted it meanwhile: take the one that is there now
            file.close()


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _fill(file: BinaryIO, partial: Path, address: str) -> None:
    """Bring a partial copy to its end."""
    if is_local(address):
        with _opened(address) as source:
            file.truncate(0)
            shutil.copyfileobj(source, file, CHUNK_BYTES)
        return
    start, tag = file.seek(0, os.SEEK_END), _tag_of(partial)
    if not tag:
        start = _emptied(file)
    try:
        _append(file, partial, address, start, tag)
    except _ChangedError:
        if not start:
            raise
        _append(file, partial, address, _emptied(file), None)  # what was there is of an older version


def _append(file: BinaryIO, partial: Path, address: str, start: int, tag: str | None) -> None:
    version = _Version(tag)
    for _, chunk in _chunks(address, start, None, version):
        if version.tag != tag:
            _tag_file(partial).write_text(version.tag or "", encoding="utf-8")
            tag = version.tag
        file.write(chunk)


def _emptied(file: BinaryIO) -> int:
    file.seek(0)
    return file.truncate(0)


def _tag_file(partial: Path) -> Path:
    return partial.with_name(partial.name + ".etag")


def _tag_of(partial: Path) -> str | None:
    try:
        return _tag_file(partial).read_text(encoding="utf-8") or None
    except OSError:
        return None


def _opened(address: str) -> BinaryIO:
    try:
        return local_path(address).open("rb")
    except OSError as error:
        raise unreadable(address, error) from None


# ------------------------------------------------------------------------------------------------------ distant objects


class _ChangedError(StorageError):
    """Another version of an object than the one that was being read."""


class _Version:
    """Which version of an object is being read: its ETag, once it is known."""

    def __init__(self, tag: str | None = None) -> None:
        self.tag = tag

    def check(self, tag: str | None) -> None:
        """Not every server heeds If-Match; what it sends says which version it is."""
        if self.tag is not None and tag not in (None, self.tag):
            raise PreconditionError("it has another ETag than at the start")
        self.tag = self.tag or tag


class _Retry:
    """Pauses between attempts: twice as long each time, with jitter; the count begins again with any progress."""

    def __init__(self, address: str) -> None:
        self.address, self.failures = address, 0

    def progress(self) -> None:
        self.failures = 0

    def failed(self, error: Exception) -> None:
        """Pause, or raise what the error means."""
        if isinstance(error, PreconditionError):
            raise _ChangedError(f"{shown(self.address)} changed while it was read; shards must not be replaced during a run")
        self.failures += 1
        answer = _answer(error)
        if _is_final(self.address, answer) or self.failures >= ATTEMPTS:
            raise _explain(self.address, error, answer)
        pause = min(_FIRST_PAUSE_S * 2 ** (self.failures - 1), _LONGEST_PAUSE_S)
        time.sleep(pause * random.uniform(0.5, 1.5))


def _chunks(
    address: str, start: int = 0, stop: int | None = None, version: _Version | None = None
) -> Iterator[tuple[int, memoryview]]:
    """The object's size and the chunks of a range of it (or of less, where it ends), all of one version."""
    store, path = _store_and_path(address)
    version, retry = version or _Version(), _Retry(address)
    size = None
    while size is None or start < (size if stop is None else min(stop, size)):
        try:
            found = obstore.get(store, path, options=_options(start, stop, version.tag))
            version.check(found.meta["e_tag"])
            size = int(found.meta["size"])
            end = found.range[1]
            for chunk in found.stream(min_chunk_size=CHUNK_BYTES):
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
                and _ends_before(store, path, start, version)
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


def _ends_before(store: Any, path: str, start: int, version: _Version) -> bool:
    """Whether a range was refused because the object ends where it begins. Errors do not tell; their texts hold names."""
    try:
        meta = obstore.head(store, path)
    except (BaseError, OSError):
        return False
    return int(meta["size"]) <= start and meta["e_tag"] in (None, version.tag or meta["e_tag"])


def _with_retries(address: str, attempt: Callable[[], Result]) -> Result:
    retry = _Retry(address)
    while True:
        try:
            return attempt()
        except (BaseError, OSError) as error:
            retry.failed(error)


_MISSING, _FORBIDDEN, _ELSEWHERE = ("404", "410"), ("401", "403"), "no LOCATION"
_FINAL = (*_MISSING, *_FORBIDDEN, _ELSEWHERE, "405", "406", "414", "451", "501")
"""What a server answers the same however often it is asked."""
_ANSWER = re.compile(
    r"Error performing [A-Z]+ \S+ in [^ ,]+(?:, after \d+ retries,[^-]*)? - "
    r"(?:Server returned non-2xx status code: (\d{3})|Received redirect without LOCATION)"
)
"""In the text of an error whose class does not tell it; no name can look so, for what stands in a URL has no blanks."""
_NO_BUCKET = re.compile("<Code>(NoSuchBucket|ContainerNotFound)</Code>")


def _answer(error: Exception) -> str | None:
    """The status that a server has answered with, where an error tells it."""
    if isinstance(error, NotFoundError | FileNotFoundError):
        return "404"
    if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError):
        return "403"
    found = _ANSWER.search(str(error))
    return None if found is None else found[1] or _ELSEWHERE


def _is_final(address: str, answer: str | None) -> bool:
    """S3 answers 400 also to what may pass: a body that came slowly, a token that has just expired."""
    return answer in _FINAL or (answer == "400" and is_url(address))


def _explain(address: str, error: Exception, answer: str | None) -> StorageError:
    if answer in _MISSING and _NO_BUCKET.search(str(error)):
        scheme, _, rest = address.partition("://")
        return MissingError(f"{shown(address)} does not exist: there is no bucket {scheme}://{rest.partition('/')[0]}")
    if answer in _MISSING:
        return MissingError(f"{shown(address)} does not exist")
    if answer in _FORBIDDEN:
        return StorageError(f"{shown(address)} may not be read or written with the credentials at hand")
    if answer == _ELSEWHERE:
        return StorageError(f"{shown(address)} cannot be reached: its bucket lies in another region; set AWS_REGION")
    if _is_final(address, answer):
        return StorageError(f"{shown(address)} cannot be reached: the server refuses the request (status {answer})")
    return StorageError(f"{shown(address)} cannot be reached after {ATTEMPTS} attempts: {_in_one_line(error)}")


def _in_one_line(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error).partition("Debug source")[0]).strip()
    if "169.254.169.254" in text:  # the last resort of a client that has found no keys
        return "no credentials were found (AWS_ACCESS_KEY_ID and its like, or ~/.aws)"
    return re.sub(r"\?[^\s)\"']*", "", text)[:200]  # a URL's query may be a signature


_URL = re.compile(r"(https?://[^/?#]*)/?([^?#]*)(\?[^#]*)?", re.IGNORECASE)
"""Host, path and query; what stands behind a # is not the server's."""
_AS_IS = "/!$&'()*+,:;=@[]^|"
"""Beside letters, digits and -._~, what the client leaves as it is when it makes a URL's path of a key."""


def _without_query(address: str) -> str:
    return re.split("[?#]", address, maxsplit=1)[0] if is_url(address) else address


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LONGEST_BYTES = 2**14
"""The client panics at a URL of 64 KiB, and every byte may take three letters of one; keys end at 1 KiB."""
_BUCKETS = ("s3", "gs", "az", "s3a", "abfs", "abfss", "adl", "azure")
"""Schemes of addresses with a bucket and a key."""


def _store_and_path(address: str) -> tuple[Any, str]:
    """A client, and the key that it is to be asked for. Raises AddressError."""
    try:
        if len(address.encode()) > _LONGEST_BYTES:
            raise _no_address(address[:100], f"it is longer than {_LONGEST_BYTES:,} bytes")
    except UnicodeEncodeError:
        raise _no_address(address, "it holds half of a surrogate pair") from None
    if url := _URL.match(address):
        if _CONTROL.search(url[1]):
            raise _no_address(address, "its host holds a control letter")
        return _host_or_page(url[1], quote(url[2], _AS_IS + "%"), url[3] or "")
    scheme, _, rest = address.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme.lower() not in _BUCKETS:
        raise _no_address(address, "give a path, or one that begins with s3:// gs:// az:// http:// or https://")
    if not _is_key(bucket) or (key and not _is_key(key.removesuffix("/"))):
        raise _no_address(address, "between its slashes stand names, not empty, no . or .., without control letters")
    return _store(f"{scheme.lower()}://{bucket}"), key


def _no_address(address: str, reason: object) -> AddressError:
    return AddressError(f"{shown(address)} is no address that can be read: {reason}")


def _host_or_page(host: str, path: str, query: str) -> tuple[Any, str]:
    """The host's client where a key makes this very URL, so that connections are kept; else a client for the URL alone."""
    key = unquote(path)
    if not query and quote(key, _AS_IS) == path and _is_key(key):
        return _store(host), key
    return _page(f"{host}/{path}{query}"), ""


def _is_key(text: str) -> bool:
    """Whether a client takes it as a key, and asks for just that."""
    return not _CONTROL.search(text) and not {"", ".", ".."} & set(text.split("/"))


_RETRY: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}
_CLIENT: Any = {"timeout": "120s", "connect_timeout": "10s", "allow_http": True}


@lru_cache(maxsize=16)
def _store(root: str) -> Any:
    """One client per bucket or host; it keeps its connections."""
    config = _s3_config() if root.startswith("s3://") else {}
    try:
        return from_url(root, config=config or None, client_options=_CLIENT, retry_config=_RETRY)
    except ValueError as error:
        raise _no_address(root, error) from None
    except BaseError as error:
        raise StorageError(f"{shown(root)} cannot be opened: {_in_one_line(error)}") from None


@lru_cache(maxsize=16)
def _page(address: str) -> Any:
    """A client for one URL that a client for its host could not name."""
    try:
        return HTTPStore.from_url(address, client_options=_CLIENT, retry_config=_RETRY)
    except ValueError as error:
        raise _no_address(address, error) from None


def _s3_config() -> Any:
    """What obstore does not find by itself: the endpoint's usual variables, and the profile in ~/.aws."""
    profile = {} if "AWS_ACCESS_KEY_ID" in os.environ else _aws_profile()
    known = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    config = {key: profile[key] for key in known if key in profile}
    if "region" in profile and not {"AWS_REGION", "AWS_DEFAULT_REGION"} & os.environ.keys():
        config["region"] = profile["region"]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or profile.get("endpoint_url")
    if endpoint:
        config |= {"endpoint": endpoint, "virtual_hosted_style_request": "false"}
    return config


def _aws_profile() -> dict[str, str]:
    """The keys of the AWS profile in use, from ~/.aws/config and ~/.aws/credentials."""
    name = os.environ.get("AWS_PROFILE", "default")
    found: dict[str, str] = {}
    sections = {"config": name if name == "default" else f"profile {name}", "credentials": name}
    for file, section in sections.items():
        place = {"config": "AWS_CONFIG_FILE", "credentials": "AWS_SHARED_CREDENTIALS_FILE"}[file]
        parser = configparser.RawConfigParser()
        try:
            parser.read(os.environ.get(place) or Path.home() / ".aws" / file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise StorageError(f"~/.aws/{file} cannot be read: {type(error).__name__}") from None
        if parser.has_section(section):
            found |= dict(parser[section])
    return found
