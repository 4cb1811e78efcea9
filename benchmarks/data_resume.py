"""Seconds and memory to go on in the middle of an epoch: from nothing to the first batch after the point where a run stopped.

    python -m benchmarks.data_resume [--samples 24000] [--repeats 3] [--json FILE]

Every measurement is a process of its own that reads local copies, so that the network plays no part, and stops at the first
batch; what it imports is loaded before the clock starts. One process runs up to the point, keeps the state that the
competitor's own `state_dict` tells, and notes the batch that would have come next; the others resume and must find that
batch. megadiff, streaming and litdata compute where to go on; webdataset reads and throws away what came before, undecoded.

The last rows are the bookkeeping alone, for data of which only the list of shards exists: reading the list and computing what
the first step after epoch 3.5 reads. Competitors take turns; medians are told. Memory is the peak above what was held when the
clock started.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_sets import LENGTH, VOCABULARY, caption_of, write
from megadiff import torchvision_ops

BATCH = 256
POINTS = (0.1, 0.5, 0.9)
PER_SHARD = 10_000
"""Samples of a shard of which only the entry in the list exists."""
State = dict[str, Any]
Opened = tuple[Iterator[Any], Callable[[], State]]
"""Batches of latents from a state on, and what tells the state after those taken."""


# --------------------------------------------------------------------------------------------------------- competitors


def megadiff(folder: Path, state: State | None) -> Opened:
    from megadiff.config.schema import CaptionField, Data, LatentField, Model
    from megadiff.data.reading.loader import Loader

    tokens = {"kind": "tokens", "vocabulary": VOCABULARY, "length": LENGTH, "end_id": 1, "pad_id": 0}
    grid = {"kind": "grid", "channels": 4, "height": 32, "width": 32}
    modalities = {
        "image": {"space": grid, "process": {"kind": "gaussian"}},
        "text": {"space": tokens, "process": {"kind": "masked"}},
    }
    model = Model.model_validate({"modalities": modalities, "width": 16, "heads": 1, "head_dim": 16, "joint_depth": 1})
    text = CaptionField(member="tokens.npy", tokenizer="examples/emoji32/tokenizer.json")
    data = Data(train=str(folder), fields={"image": LatentField(), "text": text}, lanes=4, block_shards=2, workers=1)
    loader = Loader(data, model, seed=0, global_samples=BATCH, micro_batch=BATCH)
    if state is not None:
        loader.load_state(state)
    return (loader.take_stored()[0].states["image"].numpy() for _ in iter(int, 1)), loader.state


def webdataset(folder: Path, state: State | None) -> Opened:
    import webdataset as wds

    from megadiff.data.codecs.base import array_of

    def decode(sample: dict[str, Any]) -> tuple[Any, Any]:
        return array_of(sample, "latents.npy"), caption_of(array_of(sample, "tokens.npy"), 0)

    def collate(rows: list[tuple[Any, Any]]) -> Any:
        return [np.stack(column) for column in zip(*rows, strict=True)]

    taken = state["batches"] if state else 0
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    set_ = wds.WebDataset(urls, shardshuffle=100, seed=0).shuffle(1000, seed=0).slice(taken * BATCH, None)
    batches = enumerate(set_.map(decode).batched(BATCH, collation_fn=collate), taken + 1)
    last = [taken]

    def counted() -> Iterator[Any]:
        for last[0], (latents, _) in batches:
            yield latents

    return counted(), lambda: {"batches": last[0]}


def _collate(rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    return np.stack([np.asarray(row["latents"]) for row in rows]), np.stack(
        [caption_of(np.asarray(row["tokens"]), 0) for row in rows]
    )


def streaming(folder: Path, state: State | None) -> Opened:
    from streaming import StreamingDataLoader, StreamingDataset

    set_ = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
    loader = StreamingDataLoader(set_, batch_size=BATCH, collate_fn=_collate)
    if state is not None:
        loader.load_state_dict(state)
    return (latents for latents, _ in loader), loader.state_dict


def litdata(folder: Path, state: State | None) -> Opened:
    from litdata import StreamingDataLoader, StreamingDataset

    set_ = StreamingDataset(str(folder), shuffle=True, drop_last=True)
    loader = StreamingDataLoader(set_, batch_size=BATCH, num_workers=0, collate_fn=_collate, drop_last=True)
    if state is not None:
        loader.load_state_dict(state)
    return (latents for latents, _ in loader), loader.state_dict


CASES: dict[str, tuple[Callable[[Path, State | None], Opened], str, tuple[str, ...]]] = {
    "megadiff": (megadiff, "shards", ("megadiff.data.reading.loader",)),
    "webdataset": (webdataset, "shards", ("webdataset", "megadiff.data.codecs.base")),
    "streaming": (streaming, "mds", ("torch.utils.data",)),
    "litdata": (litdata, "litdata", ("litdata",)),
}


# ---------------------------------------------------------------------------------------- shards that exist as a list only


def list_megadiff(folder: Path, shards: int) -> None:
    from megadiff.data.shards.shard import Manifest, ShardEntry, write_manifest

    names = (f"{number:07d}.tar" for number in range(shards))
    entries = (ShardEntry(name, PER_SHARD, 180_000_000, hashlib.sha256(name.encode()).hexdigest()) for name in names)
    write_manifest(str(folder), Manifest(tuple(entries)))


def keep_megadiff(folder: Path, shards: int) -> None:
    """One rank of 8, with 512 lanes and global batches of 2,048 samples."""
    from megadiff.data.reading.mixture import Mixture
    from megadiff.data.shards.shard import read_manifest

    mixture = Mixture({"train": read_manifest(str(folder))}, 512, 4, 0)
    step = round(3.5 * shards * PER_SHARD / 2048)
    mixture.step(step, range(256), 2048)
    mixture.shards_ahead(step, range(256), 2048)


def list_streaming(folder: Path, shards: int) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"n": "int"}) as writer:
        writer.write({"n": 0})
    index = json.loads((folder / "index.json").read_text())
    (one,) = index["shards"]
    names = ({**one["raw_data"], "basename": f"shard.{number:07d}.mds"} for number in range(shards))
    index["shards"] = [{**one, "samples": PER_SHARD, "raw_data": name} for name in names]
    (folder / "index.json").write_text(json.dumps(index))


def keep_streaming(folder: Path, shards: int) -> None:
    """A node of 8 ranks: its first rank does this for all."""
    from streaming import StreamingDataset
    from streaming.base.batching import generate_work
    from streaming.base.world import World

    set_ = StreamingDataset(
        remote=str(folder.with_name("elsewhere")),
        local=str(folder),
        shuffle=True,
        batch_size=BATCH,
        num_canonical_nodes=1,
        shuffle_block_size=4_000_000,  # its own choice for one node
    )
    generate_work(set_.batching_method, set_, World(1, 8, 1, 0), 3, shards * PER_SHARD // 2)


def list_litdata(folder: Path, shards: int) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_size=1)
    writer.add_item(0, {"n": 0})
    writer.done()
    writer.merge()
    index = json.loads((folder / "index.json").read_text())
    (one,) = index["chunks"]
    index["chunks"] = [{**one, "chunk_size": PER_SHARD, "filename": f"chunk-0-{number}.bin"} for number in range(shards)]
    (folder / "index.json").write_text(json.dumps(index))


def keep_litdata(folder: Path, shards: int) -> None:
    """One rank of 8."""
    from litdata import StreamingDataset
    from litdata.utilities.env import _DistributedEnv

    os.environ["LITDATA_POSIX_FAST"] = "0"  # as from object storage
    set_ = StreamingDataset(str(folder), shuffle=True, drop_last=True)
    set_.distributed_env = _DistributedEnv(8, 0, 1)
    set_.set_batch_size(BATCH)
    set_.current_epoch = 4
    set_.load_state_dict(set_.state_dict(shards * PER_SHARD // 16 // BATCH * BATCH, 1, BATCH))
    iter(set_)


LISTS = {
    "megadiff": (list_megadiff, keep_megadiff),
    "streaming": (list_streaming, keep_streaming),
    "litdata": (list_litdata, keep_litdata),
}


# ------------------------------------------------------------------------------------------------------- one measurement


def _import(case: str) -> None:
    import torch

    torch.set_num_threads(1)
    if case == "streaming":
        torchvision_ops.declare_missing()
        importlib.import_module("streaming")
        importlib.import_module("streaming.base.batching")
    if case == "megadiff":
        importlib.import_module("megadiff.data.reading.mixture")
    for module in CASES[case][2]:
        importlib.import_module(module)


def run_up_to(case: str, folder: Path, batches: int) -> dict[str, Any]:
    taken, tell = CASES[case][0](folder, None)
    for _ in range(batches):
        next(taken)
    return {"state": tell(), "next": _digest(next(taken))}


def resume(case: str, folder: Path, state: State) -> dict[str, Any]:
    clock = _Clock()
    taken, _ = CASES[case][0](folder, state)
    batch = next(taken)
    return {**clock.read(), "next": _digest(batch)}


def keep_books(case: str, folder: Path, shards: int) -> dict[str, Any]:
    clock = _Clock()
    LISTS[case][1](folder, shards)
    return clock.read()


class _Clock:
    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._held = _status_mib("VmRSS")
        self._began = time.perf_counter()

    def read(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self._began
        return {"seconds": seconds, "peak_mib": _status_mib("VmHWM") - self._held}


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def _digest(latents: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(latents).tobytes()).hexdigest()


def _child(what: str, case: str, folder: Path, value: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.data_resume", "--child", json.dumps([what, case, str(folder), value])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{what}, {case}: {done.stderr[-800:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/data_resume.json"))
    parser.add_argument("--samples", type=int, default=24000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shards", type=int, nargs="*", default=[1_000, 3_000, 100_000, 1_000_000], help="of 10,000 samples")
    parser.add_argument("--most-peer-shards", type=int, default=3_000, help="streaming holds 8 bytes and more per sample")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, case, folder, value = json.loads(arguments.child)
        _import(case)
        measure: dict[str, Callable[..., Any]] = {"run": run_up_to, "resume": resume, "books": keep_books}
        if what == "list":
            LISTS[case][0](Path(folder), value)
            print("{}", flush=True)
        else:
            print(json.dumps(measure[what](case, Path(folder), value), default=str), flush=True)
        os._exit(0)  # threads that read ahead are none of this benchmark's business
    rows = []
    print("| | stopped at | seconds | MiB above start | the batch that would have come |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        rows += samples_that_exist(Path(root), arguments.samples, arguments.repeats)
    for shards in arguments.shards:
        cases = [case for case in LISTS if case == "megadiff" or shards <= arguments.most_peer_shards]
        with tempfile.TemporaryDirectory() as root:
            rows += lists_alone(Path(root), cases, shards, arguments.repeats)
    packages = ("numpy", "torch", "webdataset", "mosaicml-streaming", "litdata")
    versions = {name: importlib.metadata.version(name) for name in packages}
    record = {"cores": len(os.sched_getaffinity(0)), "versions": versions, "samples": arguments.samples, "rows": rows}
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def samples_that_exist(root: Path, samples: int, repeats: int) -> list[dict[str, Any]]:
    for _, kind, _ in CASES.values():
        if not (root / kind).exists():
            (root / kind).mkdir()
            write(kind, root / kind, "latents", samples)
    rows = []
    for point in POINTS:
        stopped = {case: _child("run", case, root / CASES[case][1], round(point * samples / BATCH)) for case in CASES}
        found: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
        for _ in range(repeats):
            for case in CASES:
                found[case].append(_child("resume", case, root / CASES[case][1], stopped[case]["state"]))
        for case, runs in found.items():
            same = all(run.pop("next") == stopped[case]["next"] for run in runs)
            rows.append({"case": case, "point": point, "same_batch": same, **_medians(runs), "runs": runs})
            _show(case, f"{point:.0%} of {samples:,}", rows[-1], "yes" if same else "no")
    return rows


def lists_alone(root: Path, cases: list[str], shards: int, repeats: int) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    for case in cases:
        (root / case).mkdir()
        _child("list", case, root / case, shards)
    for _ in range(repeats):
        for case in cases:
            found[case].append(_child("books", case, root / case, shards))
    rows = []
    for case, runs in found.items():
        rows.append({"case": f"{case}, bookkeeping", "samples": shards * PER_SHARD, **_medians(runs), "runs": runs})
        _show(f"{case}, bookkeeping", f"epoch 3.5 of {shards * PER_SHARD:,}", rows[-1], "")
    return rows


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in ("seconds", "peak_mib")}


def _show(case: str, where: str, row: dict[str, Any], same: str) -> None:
    print(f"| {case} | {where} | {row['seconds']:.3f} | {row['peak_mib']:,.0f} | {same} |", flush=True)


if __name__ == "__main__":
    main()
