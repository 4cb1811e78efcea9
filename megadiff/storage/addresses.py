"""Addresses, taken apart and printed: a file path, or s3:// gs:// az:// http(s)://. Nothing here is read or written."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote

from megadiff.storage.errors import AddressError

URL = re.compile(r"(https?://[^/?#]*)/?([^?#]*)(\?[^#]*)?", re.IGNORECASE)
"""Host, path and query; a fragment (# and after) is not sent to the server."""
UNQUOTED = "/!$&'()*+,:;=@[]^|"
"""The characters, beside letters, digits and -._~, that the client leaves unquoted when it makes a URL's path of a key."""


def is_local(address: str) -> bool:
    """Whether the address is a path on this machine."""
    return "://" not in address or address.startswith("file://")


def is_url(address: str) -> bool:
    """Whether the address is a URL, which is sent to its server as written; all others are unquoted keys and paths."""
    return URL.match(address) is not None


def local_path(address: str) -> Path:
    """The path that an address names. Raises AddressError if it holds a NUL or half of a surrogate pair."""
    try:
        if b"\0" in os.fsencode(address):
            raise not_an_address(address, "a path holds no NUL")
    except UnicodeEncodeError:
        raise not_an_address(address, "it holds half of a surrogate pair") from None
    return Path(address.removeprefix("file://"))


def join(folder: str, name: str) -> str:
    """The address of `name`, which is not quoted, inside `folder`."""
    if is_url(folder):
        folder, name = _without_query(folder), quote(name, UNQUOTED, errors="surrogatepass")
    return f"{folder.rstrip('/')}/{name}"


def is_json(address: str) -> bool:
    """Whether an address names a JSON file, not a folder."""
    return _without_query(address).endswith(".json")


def folder_of(address: str) -> str:
    """The folder of a JSON file, given the file's address or the folder's."""
    return parent(address) if is_json(address) else address


def parent(address: str) -> str:
    """The folder that an address lies in."""
    if is_local(address):
        return str(local_path(address).parent)
    return _without_query(address).rstrip("/").rpartition("/")[0]


def shown(address: str) -> str:
    """An address as it may be printed: in one line, and without a URL's query and user part, which may be secret."""
    if not is_url(address):
        return printable(address)
    scheme, _, rest = _without_query(address).partition("://")
    host, slash, path = rest.partition("/")
    return printable(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}")


def printable(text: str) -> str:
    """A name or address as one line of UTF-8: control characters, undecodable bytes and half surrogate pairs are escaped."""
    return re.sub("[\x00-\x1f\x7f\ud800-\udfff]", lambda letter: _escaped(letter[0]), text)


def _escaped(letter: str) -> str:
    is_byte = "\udc80" <= letter <= "\udcff"  # Python's surrogateescape: a byte of a path that is not UTF-8
    return f"\\x{ord(letter) - 0xDC00:02x}" if is_byte else ascii(letter)[1:-1]


def not_an_address(address: str, reason: object) -> AddressError:
    return AddressError(f"{shown(address)} is no address that can be read: {reason}")


def _without_query(address: str) -> str:
    return re.split("[?#]", address, maxsplit=1)[0] if is_url(address) else address
