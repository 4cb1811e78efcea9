"""One rank of a loader test: reads its part of some global batches and prints their sample ids, slots, keys and hashes."""

from __future__ import annotations

import hashlib
import json
import os
import sys

from megadiff.data.reading.loader import Loader
from megadiff.types import Batch
from tests.data.small import tiny


def digests(batch: Batch) -> list[str]:
    """A hash per sample of what its states hold."""
    rows = zip(*(batch.states[name] for name in sorted(batch.states)), strict=True)
    return [hashlib.sha256(b"".join(state.numpy().tobytes() for state in row)).hexdigest() for row in rows]


def main() -> None:
    request = json.loads(sys.argv[1])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    data, model = tiny()
    loader = Loader(
        data.model_copy(update={"workers": request["workers"]}),
        model,
        seed=request["seed"],
        global_samples=request["global_samples"],
        micro_batch=request["micro_batch"],
        data_rank=rank,
        data_ranks=world,
    )
    if request["state"] is not None:
        loader.load_state(request["state"])
    steps = []
    for _ in range(request["steps"]):
        batches = loader.take()
        steps.append(
            {
                "ids": [name for batch in batches for name in batch.ids],
                "slots": [slot for batch in batches for slot in batch.slots.tolist()],
                "keys": [key for batch in batches for key in batch.keys.tolist()],
                "states": [digest for batch in batches for digest in digests(batch)],
            }
        )
    state = loader.state()
    loader.close()
    print(json.dumps({"steps": steps, "state": state, "rank": rank}))


if __name__ == "__main__":
    main()
