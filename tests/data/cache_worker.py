"""One process of a test: reads shards through a cache that another process uses as well; prints how many came back right."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from megadiff.config.schema import Cache
from megadiff.data.shards.cache import ShardCache
from megadiff.data.shards.reader import ShardReader
from megadiff.data.shards.shard import read_manifest
from megadiff.storage import store
from tests.data.small import sample


def chunks_of(content: bytes) -> Iterator[tuple[int, memoryview]]:
    yield len(content), memoryview(content)


def main() -> None:
    request = json.loads(sys.argv[1])
    manifest = read_manifest(request["far"])
    # A folder stands in for a bucket: only the transport is replaced.
    far = Path(request["far"])
    store._chunks = lambda address, *_: chunks_of((far / address.removeprefix("far://bucket/")).read_bytes())  # type: ignore[assignment]
    cache = Cache(folder=request["cache"], max_bytes=request["max_bytes"])
    reader = ShardReader("far://bucket", manifest, ShardCache(cache), keep=request["keep"])
    step = 1 + int(os.environ["RANK"])
    numbers = [(turn * step) % len(manifest.shards) for turn in range(request["readings"])]
    print(json.dumps({"right": sum(reader.members(number, 0) == sample(number) for number in numbers)}))


if __name__ == "__main__":
    main()
