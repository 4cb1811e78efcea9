"""One S3 server for all tests here, and a bucket for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import boto3
import pytest

from megadiff.storage import clients
from tests.s3.server import Ceph


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """The server, started once."""
    server = Ceph()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def client(ceph: Ceph) -> Iterator[Any]:
    """Another client than ours, for what ours does not do."""
    client = boto3.client(
        "s3",
        endpoint_url=ceph.url,
        region_name=ceph.variables["AWS_REGION"],
        aws_access_key_id=ceph.variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=ceph.variables["AWS_SECRET_ACCESS_KEY"],
    )
    yield client
    client.close()


@pytest.fixture(scope="session")
def new_bucket(client: Any) -> Callable[[], str]:
    """Makes a bucket; returns its address."""

    def make() -> str:
        name = f"b-{uuid4().hex}"
        client.create_bucket(Bucket=name)
        return f"s3://{name}"

    return make


@pytest.fixture
def s3(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ceph]:
    """The server, which S3 addresses lead to during the test. No client outlives it."""
    ceph.use(monkeypatch)
    clients.bucket_client.cache_clear()
    yield ceph
    clients.bucket_client.cache_clear()


@pytest.fixture
def bucket(s3: Ceph, new_bucket: Callable[[], str]) -> str:
    """The address of an empty bucket."""
    return new_bucket()
