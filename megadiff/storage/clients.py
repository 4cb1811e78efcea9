"""The client that an address is read and written through, and what its errors mean.

Credentials come from the usual places (AWS_*, GOOGLE_*, AZURE_* variables, ~/.aws, instance metadata) and are never logged.
"""

from __future__ import annotations

import configparser
import os
import re
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, UnauthenticatedError
from obstore.store import HTTPStore, from_url

from megadiff.storage import addresses
from megadiff.storage.errors import MissingError, StorageError

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LONGEST_BYTES = 2**14
"""The client panics at a URL of 64 KiB, and a quoted byte takes three letters; S3 keys end at 1 KiB."""
_BUCKETS = ("s3", "gs", "az", "s3a", "abfs", "abfss", "adl", "azure")
"""Schemes of addresses with a bucket and a key."""


def client_and_key(address: str) -> tuple[Any, str]:
    """The client for an address, and the key to ask it for. Raises AddressError."""
    try:
        if len(address.encode()) > _LONGEST_BYTES:
            raise addresses.not_an_address(address[:100], f"it is longer than {_LONGEST_BYTES:,} bytes")
    except UnicodeEncodeError:
        raise addresses.not_an_address(address, "it holds half of a surrogate pair") from None
    if url := addresses.URL.match(address):
        if _CONTROL.search(url[1]):
            raise addresses.not_an_address(address, "its host holds a control letter")
        return _url_client_and_key(url[1], quote(url[2], addresses.UNQUOTED + "%"), url[3] or "")
    scheme, _, rest = address.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme.lower() not in _BUCKETS:
        raise addresses.not_an_address(address, "give a path, or one that begins with s3:// gs:// az:// http:// or https://")
    if not _is_key(bucket) or (key and not _is_key(key.removesuffix("/"))):
        reason = "between its slashes stand names, not empty, no . or .., without control letters"
        raise addresses.not_an_address(address, reason)
    return bucket_client(f"{scheme.lower()}://{bucket}"), key


def _url_client_and_key(host: str, path: str, query: str) -> tuple[Any, str]:
    """The host's client, which keeps its connections, if a key gives exactly this URL; else a client for the URL alone."""
    key = unquote(path)
    if not query and quote(key, addresses.UNQUOTED) == path and _is_key(key):
        return bucket_client(host), key
    return _page_client(f"{host}/{path}{query}"), ""


def _is_key(text: str) -> bool:
    """Whether a client accepts the text as a key and asks for exactly that key."""
    return not _CONTROL.search(text) and not {"", ".", ".."} & set(text.split("/"))


_RETRY: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}
_CLIENT: Any = {"timeout": "120s", "connect_timeout": "10s", "allow_http": True}


@lru_cache(maxsize=16)
def bucket_client(root: str) -> Any:
    """One client per bucket or host; it keeps its connections."""
    config = _s3_config() if root.startswith("s3://") else {}
    try:
        return from_url(root, config=config or None, client_options=_CLIENT, retry_config=_RETRY)
    except ValueError as error:
        raise addresses.not_an_address(root, error) from None
    except BaseError as error:
        raise StorageError(f"{addresses.shown(root)} cannot be opened: {_one_line(error)}") from None


@lru_cache(maxsize=16)
def _page_client(address: str) -> Any:
    """A client for one URL that its host's client cannot express as a key."""
    try:
        return HTTPStore.from_url(address, client_options=_CLIENT, retry_config=_RETRY)
    except ValueError as error:
        raise addresses.not_an_address(address, error) from None


def _s3_config() -> Any:
    """Settings that obstore does not find by itself: the endpoint's usual variables, and the profile in ~/.aws."""
    profile = {} if "AWS_ACCESS_KEY_ID" in os.environ else _aws_profile()
    credentials = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    config = {key: profile[key] for key in credentials if key in profile}
    if "region" in profile and not {"AWS_REGION", "AWS_DEFAULT_REGION"} & os.environ.keys():
        config["region"] = profile["region"]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or profile.get("endpoint_url")
    if endpoint:
        config |= {"endpoint": endpoint, "virtual_hosted_style_request": "false"}
    return config


def _aws_profile() -> dict[str, str]:
    """The keys of the AWS profile in use, from ~/.aws/config and ~/.aws/credentials."""
    name = os.environ.get("AWS_PROFILE", "default")
    settings: dict[str, str] = {}
    sections = {"config": name if name == "default" else f"profile {name}", "credentials": name}
    for file, section in sections.items():
        place = {"config": "AWS_CONFIG_FILE", "credentials": "AWS_SHARED_CREDENTIALS_FILE"}[file]
        parser = configparser.RawConfigParser()
        try:
            parser.read(os.environ.get(place) or Path.home() / ".aws" / file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise StorageError(f"~/.aws/{file} cannot be read: {type(error).__name__}") from None
        if parser.has_section(section):
            settings |= dict(parser[section])
    return settings


# ------------------------------------------------------------------------------------------------------ what errors mean

_MISSING, _FORBIDDEN, _OTHER_REGION = ("404", "410"), ("401", "403"), "no LOCATION"
_FINAL = (*_MISSING, *_FORBIDDEN, _OTHER_REGION, "405", "406", "414", "451", "501")
"""Answers that stay the same when the request is repeated."""
_STATUS = re.compile(
    r"Error performing [A-Z]+ \S+ in [^ ,]+(?:, after \d+ retries,[^-]*)? - "
    r"(?:Server returned non-2xx status code: (\d{3})|Received redirect without LOCATION)"
)
"""The status in the text of an error whose class does not tell it. No name can imitate it: a URL has no blanks."""
_NO_BUCKET = re.compile("<Code>(NoSuchBucket|ContainerNotFound)</Code>")


def status_of(error: Exception) -> str | None:
    """The status of the server's answer; None if the error does not tell it."""
    if isinstance(error, NotFoundError | FileNotFoundError):
        return "404"
    if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError):
        return "403"
    match = _STATUS.search(str(error))
    return None if match is None else match[1] or _OTHER_REGION


def is_final(address: str, status: str | None) -> bool:
    """Whether asking again is useless. S3 answers 400 also to faults that pass: a slow body, a token that has just expired."""
    return status in _FINAL or (status == "400" and addresses.is_url(address))


def failure(address: str, error: Exception, status: str | None, attempts: int) -> StorageError:
    """The error for the user, after a request has failed for good."""
    if status in _MISSING and _NO_BUCKET.search(str(error)):
        scheme, _, rest = address.partition("://")
        return MissingError(
            f"{addresses.shown(address)} does not exist: there is no bucket {scheme}://{rest.partition('/')[0]}"
        )
    if status in _MISSING:
        return MissingError(f"{addresses.shown(address)} does not exist")
    if status in _FORBIDDEN:
        return StorageError(f"{addresses.shown(address)} may not be read or written with the credentials at hand")
    if status == _OTHER_REGION:
        return StorageError(f"{addresses.shown(address)} cannot be reached: its bucket lies in another region; set AWS_REGION")
    if is_final(address, status):
        return StorageError(f"{addresses.shown(address)} cannot be reached: the server refuses the request (status {status})")
    return StorageError(f"{addresses.shown(address)} cannot be reached after {attempts} attempts: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error).partition("Debug source")[0]).strip()
    if "169.254.169.254" in text:  # the last resort of a client that has found no keys
        return "no credentials were found (AWS_ACCESS_KEY_ID and its like, or ~/.aws)"
    return re.sub(r"\?[^\s)\"']*", "", text)[:200]  # a URL's query may be a signature
