"""How well an epoch is shuffled: where samples that are neighbours in a shard end up, beside a full shuffle and the peers.

    python -m benchmarks.data_order [--shards 100] [--per-shard 1000] [--ranks 8] [--json FILE]

Every order is the one in which the competitor's own code deals the samples to data-parallel ranks of one node, one worker each;
a batch is the global one, 256 samples of all ranks together. Told are

- the median distance in the epoch, in batches, of two neighbours of a shard (of a full shuffle: 0.293 of the epoch);
- how much more often than in a full shuffle they come in one batch;
- the shards that a batch draws on, and
- those in use at once: begun by a batch and not yet finished. That is what shuffling costs: they lie in memory or on a disk
  (webdataset streams its shards; its cost is the buffer, which holds single samples of so many);
- the samples of the epoch that are left out or come twice.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megadiff import torchvision_ops

BATCH = 256
Numbers = NDArray[np.int64]


class Size(NamedTuple):
    shards: int
    per_shard: int
    ranks: int

    @property
    def samples(self) -> int:
        return self.shards * self.per_shard

    @property
    def rank_batch(self) -> int:
        return BATCH // self.ranks


Competitor = Callable[[Size, Path], Numbers]
"""The samples' numbers, [batches, 256]."""


def full(size: Size, _: Path) -> Numbers:
    return _together([np.random.default_rng(0).permutation(size.samples)], size._replace(ranks=1))


def megadiff(lanes: int, block_shards: int) -> Competitor:
    def order(size: Size, _: Path) -> Numbers:
        from megadiff.data.reading.mixture import Mixture
        from megadiff.data.shards.shard import Manifest, ShardEntry

        manifest = Manifest(tuple(ShardEntry(f"{n}.tar", size.per_shard, 0, "") for n in range(size.shards)))
        mixture = Mixture({"train": manifest}, lanes, block_shards, 0)
        return np.stack([mixture.step(step, range(BATCH), BATCH).number for step in range(size.samples // BATCH)])

    return order


def webdataset(buffer: int) -> Competitor:
    def order(size: Size, folder: Path) -> Numbers:
        import webdataset as wds

        from megadiff.data.shards.shard import write_shard

        if not folder.exists():
            for shard in range(size.shards):
                numbers = range(shard * size.per_shard, (shard + 1) * size.per_shard)
                write_shard(str(folder), f"{shard:04d}.tar", {f"{n:08d}": {"txt": str(n).encode()} for n in numbers})
        urls = sorted(map(str, folder.glob("*.tar")))

        def numbers_of(rank: int) -> Iterator[int]:
            def split(urls: Any) -> Iterator[Any]:  # wds.split_by_node, which asks the environment for the rank
                yield from islice(urls, rank, None, size.ranks)

            set_ = wds.WebDataset(urls, shardshuffle=size.shards, nodesplitter=split, seed=0).shuffle(buffer, seed=rank)
            return (int(sample["txt"]) for sample in set_)

        return _together([np.fromiter(numbers_of(rank), np.int64) for rank in range(size.ranks)], size)

    return order


def streaming(algorithm: str, block_shards: int | None = None) -> Competitor:
    def order(size: Size, _: Path) -> Numbers:
        torchvision_ops.declare_missing()
        from streaming.base.partition import get_partitions
        from streaming.base.shuffle import get_shuffle

        nodes = 64 if algorithm in ("py1s", "py2s") else 1  # StreamingDataset's own choice
        block = max(4_000_000 // nodes, 1 << 18) if block_shards is None else block_shards * size.per_shard
        sizes = np.full(size.shards, size.per_shard, dtype=np.int64)
        shuffled = np.asarray(get_shuffle(algorithm, sizes, nodes, 0, 0, block))
        places = get_partitions("relaxed", size.samples, nodes, 1, size.ranks, 1, size.rank_batch)
        ids = np.where(places == -1, -1, shuffled[places])  # [1, ranks, 1, batches, samples of a rank's batch]
        whole = ids[0, :, 0].transpose(1, 0, 2).reshape(-1, BATCH)
        return whole[(whole != -1).all(axis=1)]

    return order


def litdata(items: str) -> Competitor:
    def order(size: Size, folder: Path) -> Numbers:
        from litdata import StreamingDataset
        from litdata.streaming.writer import BinaryWriter
        from litdata.utilities.env import _DistributedEnv

        if not folder.exists():
            folder.mkdir()
            writer = BinaryWriter(str(folder), chunk_size=size.per_shard)
            for number in range(size.samples):
                writer.add_item(number, {"n": number})
            writer.done()
            writer.merge()
        os.environ["LITDATA_POSIX_FAST"] = "0"  # of a local folder it would take other chunks' order than of object storage
        lists = []
        for rank in range(size.ranks):
            set_ = StreamingDataset(str(folder), shuffle=True, drop_last=True, item_shuffle_window=items)
            set_.distributed_env = _DistributedEnv(size.ranks, rank, 1)
            set_.set_batch_size(size.rank_batch)
            lists.append(np.fromiter((int(sample["n"]) for sample in set_), np.int64))
        return _together(lists, size)

    return order


def _together(ranks: list[Numbers], size: Size) -> Numbers:
    """Global batches of the ranks' lists; what is beyond the shortest list is left out."""
    batches = min(len(one) for one in ranks) // size.rank_batch
    parts = [one[: batches * size.rank_batch].reshape(batches, -1) for one in ranks]
    return np.concatenate(parts, axis=1)


CASES: dict[str, Competitor] = {
    "full shuffle": full,
    "megadiff, 8 lanes, block_shards 2": megadiff(8, 2),
    "megadiff, 8 lanes, block_shards 4 (default)": megadiff(8, 4),
    "megadiff, 16 lanes, block_shards 4": megadiff(16, 4),
    "megadiff, 8 lanes, block_shards 12": megadiff(8, 12),
    "webdataset, shuffle(1000)": webdataset(1000),
    "webdataset, shuffle(10000)": webdataset(10000),
    "streaming, py1e, its own block size (default)": streaming("py1e"),
    "streaming, py1e, blocks of 4 shards": streaming("py1e", 4),
    "streaming, py1e, blocks of 32 shards": streaming("py1e", 32),
    "streaming, py1br, blocks of 4 shards": streaming("py1br", 4),
    "streaming, py1br, blocks of 32 shards": streaming("py1br", 32),
    "streaming, py1s": streaming("py1s"),
    "streaming, py2s": streaming("py2s"),
    "litdata, shuffle=True (default)": litdata("auto"),
    "litdata, whole chunks shuffled": litdata("full"),
}


def quality(order: Numbers, size: Size) -> dict[str, float]:
    """Of batches [batches, 256]."""
    batches = len(order)
    step = np.full(size.samples, -1, dtype=np.int64)
    step[order.reshape(-1)] = np.repeat(np.arange(batches), BATCH)
    first = np.arange(size.samples - 1)
    first = first[(first % size.per_shard != size.per_shard - 1) & (step[first] >= 0) & (step[first + 1] >= 0)]
    one, two = step[first], step[first + 1]
    shards = order // size.per_shard
    read = len(np.unique(order))
    return {
        "distance": float(np.median(np.abs(one - two))) / batches,
        "together": float(np.mean(one == two)) / ((BATCH - 1) / (order.size - 1)),
        "shards_per_batch": float(np.mean([len(np.unique(batch)) for batch in shards])),
        "shards_in_use": float(np.mean(_in_use(shards, size.shards))),
        "left_out": 1 - read / size.samples,
        "twice": (order.size - read) / size.samples,
    }


def _in_use(shards: Numbers, count: int) -> Numbers:
    """By batch, the shards with samples in it or both before and after it."""
    steps = np.repeat(np.arange(len(shards)), BATCH)
    begun, ended = np.full(count, len(shards)), np.full(count, -1)
    np.minimum.at(begun, shards.reshape(-1), steps)
    np.maximum.at(ended, shards.reshape(-1), steps)
    change = np.zeros(len(shards) + 1, dtype=np.int64)
    np.add.at(change, begun[ended >= 0], 1)
    np.add.at(change, ended[ended >= 0] + 1, -1)
    return np.cumsum(change)[:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/data_order.json"))
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--per-shard", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--only", default="", help="cases that begin so")
    arguments = parser.parse_args()
    size = Size(arguments.shards, arguments.per_shard, arguments.ranks)
    found: dict[str, Any] = {}
    print(f"{size.shards} shards of {size.per_shard:,} samples, {size.ranks} ranks, global batches of {BATCH}\n")
    print("| | neighbours' distance / epoch | in one batch, times a full shuffle's | shards in a batch | in use | left out |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        for name, order in CASES.items():
            if not name.startswith(arguments.only):
                continue
            row = found[name] = quality(order(size, Path(root) / name.partition(",")[0]), size)
            print(
                f"| {name} | {row['distance']:.3f} | {row['together']:.1f} | {row['shards_per_batch']:.0f} "
                f"| {row['shards_in_use']:.0f} | {row['left_out']:.2%} |",
                flush=True,
            )
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "webdataset", "mosaicml-streaming", "litdata")}
    record = {**size._asdict(), "batch": BATCH, "versions": versions, "orders": found}
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
