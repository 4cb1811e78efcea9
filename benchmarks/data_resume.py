"""Seconds and memory to go on in the middle of an epoch: from nothing to the first batch after the point where a run stopped.

    python -m benchmarks.data_resume [--samples 24000] [--json FILE]

Every measurement is a process of its own that reads local copies, so that the network plays no part, and stops at the first
batch; what it imports is loaded before the clock starts. megadiff, streaming and litdata compute where to go on; webdataset
reads and throws away what came before. The last rows are megadiff's bookkeeping alone (reading the manifest, the first step's
samples and the shards ahead) for 1 and 10 thousand million samples, in the middle of epoch 3.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.data_sets import LENGTH, VOCABULARY, allow_torchvision, caption_of, write

BATCH = 256
POINTS = (0.1, 0.5, 0.9)


def megadiff(folder: Path, samples: int, point: float, _: Path) -> None:
    from megadiff.config.schema import CaptionField, Data, LatentField, Model
    from megadiff.data.loader import Loader

    tokens = {"kind": "tokens", "vocabulary": VOCABULARY, "length": LENGTH, "end_id": 1, "pad_id": 0}
    grid = {"kind": "grid", "channels": 4, "height": 32, "width": 32}
    modalities = {
        "image": {"space": grid, "process": {"kind": "gaussian"}},
        "text": {"space": tokens, "process": {"kind": "masked"}},
    }
    model = Model.model_validate({"modalities": modalities, "width": 16, "heads": 1, "head_dim": 16, "joint_depth": 1})
    text = CaptionField(member="tokens.npy", tokenizer="examples/emoji32/tokenizer.json")
    data = Data(train=str(folder), fields={"image": LatentField(), "text": text}, lanes=4, block_shards=2, workers=1)
    step = round(point * samples / BATCH)
    loader = Loader(data, model, seed=0, global_samples=BATCH, micro_batch=BATCH, data_step=step)
    loader.take_stored()


def webdataset(folder: Path, samples: int, point: float, _: Path) -> None:
    import numpy as np
    import webdataset as wds

    from megadiff.data.codec import array_of

    def decode(sample: dict[str, Any]) -> tuple[Any, Any]:
        return array_of(sample, "latents.npy"), caption_of(array_of(sample, "tokens.npy"), 0)

    def collate(rows: list[tuple[Any, Any]]) -> Any:
        return [np.stack(column) for column in zip(*rows, strict=True)]

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    set_ = wds.WebDataset(urls, shardshuffle=100, seed=0).shuffle(1000).map(decode).batched(BATCH, collation_fn=collate)
    batches = iter(set_)
    for _step in range(round(point * samples / BATCH) + 1):
        next(batches)


def streaming(folder: Path, samples: int, point: float, _: Path) -> None:
    from streaming import StreamingDataLoader, StreamingDataset

    set_ = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
    loader = StreamingDataLoader(set_, batch_size=BATCH, collate_fn=lambda rows: (rows,))
    done = round(point * samples / BATCH) * BATCH
    where = {"epoch": 0, "sample_in_epoch": done, "shuffle_seed": set_.shuffle_seed}
    loader.load_state_dict({**where, "num_canonical_nodes": 1, "initial_physical_nodes": 1})
    next(iter(loader))


def litdata(folder: Path, samples: int, point: float, scratch: Path) -> None:
    from litdata import StreamingDataLoader, StreamingDataset

    state = scratch / "state.json"

    def loader() -> Any:
        set_ = StreamingDataset(str(folder), shuffle=True, drop_last=True)
        return StreamingDataLoader(set_, batch_size=BATCH, num_workers=0, collate_fn=lambda rows: (rows,), drop_last=True)

    if not state.exists():  # the run that stops: only it can tell its state
        first = loader()
        batches = iter(first)
        for _ in range(max(1, round(point * samples / BATCH))):
            next(batches)
        state.write_text(json.dumps(first.state_dict(), default=str))
        return
    resumed = loader()
    resumed.load_state_dict(json.loads(state.read_text()))
    next(iter(resumed))


CASES: dict[str, tuple[Callable[..., None], str, tuple[str, ...]]] = {
    "megadiff": (megadiff, "shards", ("megadiff.data.loader",)),
    "webdataset": (webdataset, "shards", ("webdataset", "megadiff.data.codec")),
    "streaming": (streaming, "mds", ("torch.utils.data",)),
    "litdata": (litdata, "litdata", ("litdata",)),
}


def bookkeeping(shards: int, folder: Path) -> dict[str, float]:
    """Of a manifest of so many shards of 10,000 samples: seconds until it is known what the first step reads."""
    from megadiff.data.mixture import Mixture
    from megadiff.data.shards import Manifest, ShardEntry, read_manifest, write_manifest

    if not (folder / "manifest.json").exists():
        names = (f"{number:07d}.tar" for number in range(shards))
        entries = (ShardEntry(name, 10_000, 180_000_000, hashlib.sha256(name.encode()).hexdigest()) for name in names)
        write_manifest(str(folder), Manifest(tuple(entries)))
        return {}
    before = _forget_peak()
    began = time.perf_counter()
    mixture = Mixture({"train": read_manifest(str(folder))}, 512, 4, 0)
    step = round(3.5 * shards * 10_000 / 2048)
    mixture.step(step, range(256), 2048)
    mixture.shards_ahead(step, range(256), 2048)
    return {"seconds": time.perf_counter() - began, "peak_mib": _resident_mib("VmHWM") - before}


def measure(case: str, point: float, samples: int, root: Path, scratch: Path) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    resume, kind, modules = CASES[case]
    if case == "streaming":
        allow_torchvision()
        importlib.import_module("streaming")
    for module in modules:
        importlib.import_module(module)
    before = _forget_peak()
    began = time.perf_counter()
    resume(root / kind, samples, point, scratch)
    return {"seconds": time.perf_counter() - began, "peak_mib": _resident_mib("VmHWM") - before}


def _forget_peak() -> float:
    """Begin to look for the largest resident size anew; returns the present one in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident_mib("VmRSS")


def _resident_mib(what: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0]) / 1024


def _child(*arguments: object) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.data_resume", "--child", json.dumps([str(a) for a in arguments])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr[-800:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _show(case: str, where: str, found: dict[str, float]) -> None:
    print(f"| {case} | {where} | {found['seconds']:.2f} | {found['peak_mib']:,.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/data_resume.json"))
    parser.add_argument("--samples", type=int, default=24000)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        case, value, samples, root, scratch = json.loads(arguments.child)
        if case == "bookkeeping":
            print(json.dumps(bookkeeping(int(value), Path(root))), flush=True)
        else:
            print(json.dumps(measure(case, float(value), int(samples), Path(root), Path(scratch))), flush=True)
        os._exit(0)  # threads that read ahead are none of this benchmark's business
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for _, kind, _ in CASES.values():
            if not (Path(root) / kind).exists():
                (Path(root) / kind).mkdir()
                write(kind, Path(root) / kind, "latents", arguments.samples)
        print("| | stopped at | seconds | MiB above start |\n|---|---|---|---|")
        for case in CASES:
            for point in POINTS:
                with tempfile.TemporaryDirectory() as scratch:
                    if case == "litdata":
                        _child(case, point, arguments.samples, root, scratch)
                    found = _child(case, point, arguments.samples, root, scratch)
                rows.append({"case": case, "point": point, **found})
                _show(case, f"{point:.0%} of {arguments.samples:,}", found)
        for shards in (100_000, 1_000_000):
            with tempfile.TemporaryDirectory() as folder:
                _child("bookkeeping", shards, 0, folder, "")
                found = _child("bookkeeping", shards, 0, folder, "")
            rows.append({"case": "megadiff, bookkeeping", "samples": shards * 10_000, **found})
            _show("megadiff, bookkeeping", f"epoch 3.5 of {shards * 10_000:,}", found)
    record = {"cores": len(os.sched_getaffinity(0)), "samples": arguments.samples, "rows": rows}
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
