"""Folders on this machine and in a bucket of an S3 server in Python."""

from __future__ import annotations

import logging
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from megadiff.storage import clients, store
from tests.ranks import free_port
from tests.storage.servers import use_s3


@pytest.fixture(autouse=True)
def fresh_clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No client, pause or credential outlives a test."""
    monkeypatch.setattr(store, "_FIRST_PAUSE_S", 0.001)
    clients.bucket_client.cache_clear()
    yield
    clients.bucket_client.cache_clear()


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port())
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_folder(moto_url: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The address of an empty folder in a bucket of its own."""
    use_s3(monkeypatch, moto_url)
    bucket = "b" + re.sub(r"[^a-z0-9]", "", request.node.name.lower())[-50:]
    with urllib.request.urlopen(urllib.request.Request(f"{moto_url}/{bucket}", method="PUT")) as answer:
        assert answer.status == 200
    return f"s3://{bucket}/some/folder"


@pytest.fixture(params=["file", "file-url", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_folder"))
    path = tmp_path / "some" / "folder"
    return str(path) if request.param == "file" else f"file://{path}"
