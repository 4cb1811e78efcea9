"""A rank on a node of its own that takes part in a preflight, and sees its node as its entry of the request says."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from megadiff.config.load import load_run
from megadiff.distributed.preflight import Probes, preflight
from megadiff.distributed.ranks import Ranks
from megadiff.engine.start import start_process_group
from megadiff.storage.errors import StorageError


def read(address: str, how: str) -> None:
    if how == "forbidden":
        raise StorageError(f"{address} may not be read or written with the credentials at hand")
    if how == "silent":
        time.sleep(600)


def network(rank: int, how: str) -> Callable[..., None]:
    def all_reduce(numbers: torch.Tensor, group: Any) -> None:
        over_all = group is None
        if how == "silent":
            time.sleep(600)
        if how == "slow" and not over_all:
            time.sleep(0.5)
        if how == "sends wrong" and over_all:
            numbers[rank] = 7.0
        dist.all_reduce(numbers, group=group)
        if how == "gets wrong" and over_all:
            numbers[0] = 7.0

    return all_reduce


def main(request: dict[str, Any]) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own = request["ranks"][rank]
    os.environ |= {"SLURMD_NODENAME": own.get("node", f"node{rank}"), "SLURM_JOB_ID": "1"}
    run = load_run("tests/tiny.yaml", request["overrides"])
    Path(run.folder).mkdir(parents=True, exist_ok=True)
    probes = Probes(
        clock=lambda: time.time() + own.get("ahead_s", 0.0),
        versions=lambda: {"NVIDIA driver": own.get("driver", "550.54")},
        free_bytes=lambda folder: own.get("free", 2**40),
        read=lambda address: read(address, own.get("store", "")),
        all_reduce=network(rank, own.get("network", "")),
    )
    said, began = "", time.monotonic()

    def examine(joined: Store, device: torch.device) -> None:
        nonlocal said
        ranks, objects = Ranks(rank, world, 0), {"data.train": "s3://bucket/manifest.json"}
        said = preflight(run, run.stages[0], objects, ranks=ranks, joined=joined, device=device, probes=probes)

    fault = ""
    try:
        start_process_group(Ranks(rank, world, 0), own.get("facts"), examine=examine)
        dist.barrier()  # the store ends with rank 0
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    print(json.dumps({"fault": fault, "note": said, "seconds": time.monotonic() - began}), flush=True)
    os._exit(0)  # as `megadiff train` leaves, whatever its threads wait for


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
