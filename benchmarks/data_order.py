"""How well an epoch is shuffled: where samples that are neighbours in a shard end up, beside a full shuffle and the peers.

    python -m benchmarks.data_order [--shards 100] [--per-shard 1000] [--json FILE]

Every order is the one in which the competitor's own code yields the samples (numbers, in its own format, one process). Told are
the median distance in the epoch of two neighbours of a shard (of a full shuffle: 0.293 of the epoch), how much more often than
in a full shuffle they come in one batch of 256, and the shards that such a batch draws on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data_sets import allow_torchvision

BATCH = 256
Numbers = NDArray[np.int64]


def full(shards: int, per_shard: int, _: Path) -> Numbers:
    return np.random.default_rng(0).permutation(shards * per_shard)


def megadiff(lanes: int, block_shards: int) -> Callable[[int, int, Path], Numbers]:
    def order(shards: int, per_shard: int, _: Path) -> Numbers:
        from megadiff.data.mixture import Mixture
        from megadiff.data.shards import Manifest, ShardEntry

        manifest = Manifest(tuple(ShardEntry(f"{n}.tar", per_shard, 0, "") for n in range(shards)))
        mixture = Mixture({"train": manifest}, lanes, block_shards, 0)
        steps = [mixture.step(step, range(BATCH), BATCH).number for step in range(shards * per_shard // BATCH)]
        return np.concatenate(steps)

    return order


def webdataset(buffer: int) -> Callable[[int, int, Path], Numbers]:
    def order(shards: int, per_shard: int, folder: Path) -> Numbers:
        import webdataset as wds

        from megadiff.data.shards import write_shard

        if not folder.exists():
            for shard in range(shards):
                numbers = range(shard * per_shard, (shard + 1) * per_shard)
                write_shard(str(folder), f"{shard:04d}.tar", {f"{n:08d}": {"txt": str(n).encode()} for n in numbers})
        urls = sorted(map(str, folder.glob("*.tar")))
        set_ = wds.WebDataset(urls, shardshuffle=shards, seed=0).shuffle(buffer)
        return np.array([int(sample["txt"]) for sample in set_])

    return order


def streaming(algorithm: str) -> Callable[[int, int, Path], Numbers]:
    def order(shards: int, per_shard: int, _: Path) -> Numbers:
        allow_torchvision()
        from streaming.base.shuffle import get_shuffle

        sizes = np.full(shards, per_shard, dtype=np.int64)
        return np.asarray(get_shuffle(algorithm, sizes, 1, 0, 0, 4_000_000))  # its block size for one node

    return order


def litdata(shards: int, per_shard: int, folder: Path) -> Numbers:
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    if not folder.exists():
        folder.mkdir()
        writer = BinaryWriter(str(folder), chunk_size=per_shard)
        for number in range(shards * per_shard):
            writer.add_item(number, {"n": number})
        writer.done()
        writer.merge()
    return np.array([int(sample["n"]) for sample in StreamingDataset(str(folder), shuffle=True)])


CASES: dict[str, Callable[[int, int, Path], Numbers]] = {
    "full shuffle": full,
    "megadiff, 8 lanes, block_shards 2": megadiff(8, 2),
    "megadiff, 8 lanes, block_shards 4 (default)": megadiff(8, 4),
    "megadiff, 16 lanes, block_shards 4": megadiff(16, 4),
    "megadiff, 8 lanes, block_shards 100": megadiff(8, 100),
    "webdataset, shuffle(1000)": webdataset(1000),
    "webdataset, shuffle(10000)": webdataset(10000),
    "streaming, py1e (default: all shards at once)": streaming("py1e"),
    "streaming, py1s": streaming("py1s"),
    "litdata, shuffle=True": litdata,
}


def quality(order: Numbers, per_shard: int) -> dict[str, float]:
    count = len(order)
    place = np.full(int(order.max()) + 1, -1, dtype=np.int64)
    place[order] = np.arange(count)
    first = np.arange(len(place) - 1)
    first = first[(first % per_shard != per_shard - 1) & (place[first] >= 0) & (place[first + 1] >= 0)]
    one, two = place[first], place[first + 1]
    batches = order[: count // BATCH * BATCH].reshape(-1, BATCH) // per_shard
    return {
        "distance": float(np.median(np.abs(one - two))) / count,
        "together": float(np.mean(one // BATCH == two // BATCH)) / ((BATCH - 1) / (count - 1)),
        "shards_per_batch": float(np.mean([len(np.unique(batch)) for batch in batches])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/data_order.json"))
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--per-shard", type=int, default=1000)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    print(f"{arguments.shards} shards of {arguments.per_shard:,} samples, batches of {BATCH}")
    print("| | neighbours' distance / epoch | in one batch, times a full shuffle's | shards in a batch |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        for name, order in CASES.items():
            row = found[name] = quality(
                order(arguments.shards, arguments.per_shard, Path(root) / name.partition(",")[0]), arguments.per_shard
            )
            print(f"| {name} | {row['distance']:.3f} | {row['together']:.1f} | {row['shards_per_batch']:.0f} |", flush=True)
    sizes = {"shards": arguments.shards, "per_shard": arguments.per_shard, "batch": BATCH}
    arguments.json.write_text(json.dumps({**sizes, "orders": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
