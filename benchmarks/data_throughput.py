"""Samples per second out of object storage: our loader beside webdataset, mosaicml-streaming, litdata and a loop of GETs.

    pip install -r benchmarks/requirements-data.txt
    eval "$(tests/s3/ceph.sh env)"        # or any S3 server: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY
    python -m benchmarks.data_throughput [--kinds latents,jpeg] [--samples 32000,6000] [--repeats 3] [--json FILE]

Every measurement is a process of its own (two for two data-parallel ranks): it reads an epoch with empty caches (cold) and,
where the competitor has a cache, a second one (warm). Competitors take turns; medians are told, of the best of a few settings
of each. What comes out is the same: batches of stacked moments and token ids, or of decoded pixels and a caption. The limit is
a loop of GETs of the same shards through the library that our store uses, one at a time or four; it decodes nothing, and where
the server shares the cores, whatever is done to a sample besides takes from it.
"""

from __future__ import annotations

import argparse
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

from benchmarks.data_sets import LENGTH, VOCABULARY, caption_of, pixels_of, prepare
from megadiff import torchvision_ops

BATCH = {"latents": 256, "jpeg": 64}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "GET loop": [{"downloads": 4}],
    "megadiff": [{"workers": 1}, {"workers": 2}],
    "megadiff, cache": [{"workers": 1}, {"workers": 2}],
    "webdataset, curl": [{"workers": 0}, {"workers": 2}],
    "webdataset, pipe": [{"workers": 2}],
    "streaming": [{"workers": 0}, {"workers": 2}],
    "litdata": [{"workers": 0}, {"workers": 2}],
}
"""Those that were among the best of a larger choice (one worker and one download at a time were not)."""
CACHED = ("megadiff, cache", "streaming", "litdata")
Epoch = Callable[[], Iterator[int]]
"""One pass over the data: yields the sizes of the batches."""


# --------------------------------------------------------------------------------------------------------- competitors


def get_loop(arguments: argparse.Namespace, settings: dict[str, Any], _: Path) -> Epoch:
    from concurrent.futures import ThreadPoolExecutor

    import obstore
    from obstore.store import from_url

    from megadiff.data.shards.shard import read_manifest

    manifest = read_manifest(f"{arguments.address}/shards")
    config: Any = {"endpoint": os.environ["AWS_ENDPOINT_URL"], "virtual_hosted_style_request": "false"}
    options: Any = {"allow_http": True}
    store = from_url(f"{arguments.address}/shards", config=config, client_options=options)
    mine = manifest.shards[arguments.rank :: arguments.ranks]

    def epoch() -> Iterator[int]:
        with ThreadPoolExecutor(settings["downloads"]) as pool:
            for entry, data in zip(mine, pool.map(lambda entry: obstore.get(store, entry.name).bytes(), mine), strict=True):
                assert len(data) == entry.bytes
                yield entry.samples

    return epoch


def open_loader(arguments: argparse.Namespace, settings: dict[str, Any], cache: Path) -> Any:
    from megadiff.config.schema import Cache, CaptionField, Data, LatentField, Model, PixelField
    from megadiff.data.reading.loader import Loader

    tokenizer = "examples/emoji32/tokenizer.json"
    tokens = {"kind": "tokens", "vocabulary": VOCABULARY, "length": LENGTH, "end_id": 1, "pad_id": 0}
    text = {"space": tokens, "process": {"kind": "masked"}}
    channels, edge = (4, 32) if arguments.kind == "latents" else (3, 256)
    grid = {"kind": "grid", "channels": channels, "height": edge, "width": edge}
    image = {"space": grid, "process": {"kind": "gaussian"}}
    model = Model.model_validate(
        {"modalities": {"image": image, "text": text}, "width": 16, "heads": 1, "head_dim": 16, "joint_depth": 1}
    )
    fields = {"image": LatentField(), "text": CaptionField(member="tokens.npy", tokenizer=tokenizer)}
    if arguments.kind == "jpeg":
        fields = {"image": PixelField(member="jpg"), "text": CaptionField(member="txt", tokenizer=tokenizer)}
    data = Data(
        train=f"{arguments.address}/shards",
        fields=fields,
        lanes=4,
        block_shards=2,
        workers=settings["workers"],
        cache=Cache(folder=str(cache)) if arguments.child == "megadiff, cache" else None,
    )
    batch = BATCH[arguments.kind]
    return Loader(
        data,
        model,
        seed=0,
        global_samples=batch * arguments.ranks,
        micro_batch=batch,
        data_rank=arguments.rank,
        data_ranks=arguments.ranks,
    )


def megadiff(arguments: argparse.Namespace, settings: dict[str, Any], cache: Path) -> Epoch:
    loader = open_loader(arguments, settings, cache)

    def epoch() -> Iterator[int]:
        for _ in range(arguments.samples // arguments.ranks // BATCH[arguments.kind]):
            (one,) = loader.take_stored()
            yield len(one.ids)

    return epoch


def webdataset(arguments: argparse.Namespace, settings: dict[str, Any], _: Path) -> Epoch:
    import numpy as np
    import torch
    import webdataset as wds

    from benchmarks.data_sets import s3
    from megadiff.data.codecs.base import array_of
    from megadiff.data.shards.shard import read_manifest

    bucket, _, prefix = arguments.address.removeprefix("s3://").partition("/")
    client = s3()
    links = [
        client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": f"{prefix}/shards/{entry.name}"}, 86400)
        for entry in read_manifest(f"{arguments.address}/shards").shards
    ]
    urls = [f"pipe:curl -s -f '{link}'" if arguments.child.endswith("pipe") else link for link in links]
    chance = np.random.default_rng(0)

    def decode(sample: dict[str, Any]) -> tuple[Any, Any]:
        if arguments.kind == "latents":
            return array_of(sample, "latents.npy"), caption_of(array_of(sample, "tokens.npy"), int(chance.integers(5)))
        return pixels_of(sample["jpg"]), sample["txt"].decode()

    def collate(rows: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        first, second = zip(*rows, strict=True)
        texts = torch.from_numpy(np.stack(second)) if arguments.kind == "latents" else second
        return torch.from_numpy(np.stack(first)), texts

    def split(urls: Any) -> Iterator[Any]:
        yield from list(urls)[arguments.rank :: arguments.ranks]

    set_ = wds.WebDataset(urls, shardshuffle=100, nodesplitter=split, handler=wds.handlers.reraise_exception, seed=0)
    set_ = set_.shuffle(1000).map(decode).batched(BATCH[arguments.kind], collation_fn=collate, partial=True)
    loader = wds.WebLoader(set_, batch_size=None, num_workers=settings["workers"], persistent_workers=settings["workers"] > 0)
    return lambda: (len(first) for first, _ in loader)


def streaming(arguments: argparse.Namespace, settings: dict[str, Any], cache: Path) -> Epoch:
    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    from streaming import StreamingDataset

    # Both ranks are on one node: they share the local copies.
    set_ = StreamingDataset(
        remote=f"{arguments.address}/mds",
        local=str(cache),
        shuffle=True,
        batch_size=BATCH[arguments.kind],
        num_canonical_nodes=1,
    )
    return _torch_loader(arguments, settings, set_)


def litdata(arguments: argparse.Namespace, settings: dict[str, Any], cache: Path) -> Epoch:
    from litdata import StreamingDataset
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # a server on this machine has no certificate
    keys = {
        "aws_access_key_id": "AWS_ACCESS_KEY_ID",
        "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
        "endpoint_url": "AWS_ENDPOINT_URL",
    }
    set_ = StreamingDataset(
        f"{arguments.address}/litdata",
        cache_dir=str(cache),  # one for the ranks of a node, as by default: each epoch deals the chunks anew
        shuffle=True,
        drop_last=True,
        storage_options={key: os.environ[name] for key, name in keys.items()},
    )
    return _torch_loader(arguments, settings, set_)


def _torch_loader(arguments: argparse.Namespace, settings: dict[str, Any], set_: Any) -> Epoch:
    import numpy as np
    import torch
    from torch.utils.data import DataLoader

    chance = np.random.default_rng(0)

    def collate(rows: list[dict[str, Any]]) -> tuple[Any, Any]:
        if arguments.kind == "latents":
            captions = [caption_of(np.asarray(row["tokens"]), int(chance.integers(5))) for row in rows]
            return torch.from_numpy(np.stack([np.asarray(row["latents"]) for row in rows])), torch.from_numpy(
                np.stack(captions)
            )
        return torch.from_numpy(np.stack([pixels_of(row["jpg"]) for row in rows])), [row["txt"] for row in rows]

    workers, kind = settings["workers"], DataLoader
    if arguments.child == "litdata":
        from litdata import StreamingDataLoader as kind
    more = {"persistent_workers": True} if workers else {}
    loader = kind(set_, batch_size=BATCH[arguments.kind], num_workers=workers, collate_fn=collate, drop_last=True, **more)
    return lambda: (len(first) for first, _ in loader)


IMPORTS = {
    "GET loop": ("obstore", "megadiff.data.shards.shard"),
    "megadiff": ("megadiff.data.reading.loader",),
    "webdataset": ("webdataset", "boto3", "megadiff.data.codecs.base"),
    "streaming": ("boto3", "torch.utils.data"),
    "litdata": ("litdata", "torch.utils.data"),
}
"""Loaded before the clock starts."""
COMPETITORS = {"GET loop": get_loop, "megadiff": megadiff, "webdataset": webdataset, "streaming": streaming, "litdata": litdata}


# ------------------------------------------------------------------------------------------------------- one measurement


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """In a process of its own: seconds to the first batch, and samples per second after it; cold, then warm."""
    import torch

    torch.set_num_threads(1)
    if arguments.child == "streaming":
        torchvision_ops.declare_missing()
        importlib.import_module("streaming")
    cache = Path(arguments.cache)
    for module in IMPORTS[arguments.child.partition(",")[0]]:
        importlib.import_module(module)
    begin = COMPETITORS[arguments.child.partition(",")[0]]
    found: dict[str, float] = {}
    began = time.perf_counter()
    epoch = begin(arguments, json.loads(arguments.settings), cache)
    for name in ("cold", "warm") if arguments.child in CACHED else ("cold",):
        first, read, rest = 0.0, 0, 0
        for size in epoch():
            if not read:
                first = time.perf_counter() - began
            rest += size if read else 0
            read += size
        seconds = time.perf_counter() - began
        if read < 0.9 * arguments.samples / arguments.ranks:
            raise SystemExit(f"{arguments.child} read {read} samples only")
        found |= {f"{name}_first_batch_s": first, f"{name}_steady": rest / (seconds - first), f"{name}_whole": read / seconds}
        began = time.perf_counter()
    return found


def run(
    arguments: argparse.Namespace, kind: str, samples: int, name: str, settings: dict[str, Any], ranks: int
) -> dict[str, float]:
    """Sums (times: the longest) over ranks."""
    with tempfile.TemporaryDirectory() as cache:
        own = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}
        command = [sys.executable, "-m", "benchmarks.data_throughput", "--child", name, "--settings", json.dumps(settings)]
        command += ["--address", f"s3://{arguments.bucket}/{kind}-{samples}", "--kind", kind, "--samples", str(samples)]
        children = [
            subprocess.Popen(
                [*command, "--cache", cache, "--rank", str(rank), "--ranks", str(ranks)],
                env={**os.environ, **own, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            said = [child.communicate(timeout=600) for child in children]
        finally:
            for child in children:
                child.kill()  # of two ranks one may wait for the other, which has failed
        wrong = [errors for child, (_, errors) in zip(children, said, strict=True) if child.returncode]
        if wrong:
            raise RuntimeError(f"{name} {settings}: {wrong[0][-600:]}")
        parts = [json.loads(out.strip().splitlines()[-1]) for out, _ in said]
    return {key: (max if key.endswith("_s") else sum)(part[key] for part in parts) for key in parts[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/data_throughput.json"))
    parser.add_argument("--kinds", default="latents,jpeg")
    parser.add_argument("--samples", default="32000,6000")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--bucket", default="bench")
    parser.add_argument("--only", default="", help="competitors, separated by ;")
    for flag in ("--child", "--settings", "--address", "--cache", "--kind"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        arguments.samples, arguments.ranks = int(arguments.samples), int(arguments.ranks)
        print(json.dumps(measure(arguments)))
        return
    packages = ("torch", "numpy", "pillow", "obstore", "webdataset", "mosaicml-streaming", "litdata")
    record: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "server": "on the same machine",
        "batch": BATCH,
        "results": [],
    }
    for kind, samples in zip(arguments.kinds.split(","), map(int, arguments.samples.split(",")), strict=True):
        prepare(arguments.bucket, kind, samples)
        for ranks in map(int, arguments.ranks.split(",")):
            found = compare(arguments, kind, samples, ranks)
            record["results"].append({"kind": kind, "samples": samples, "ranks": ranks, **found})
            arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def compare(arguments: argparse.Namespace, kind: str, samples: int, ranks: int) -> dict[str, Any]:
    wanted = [name for name in arguments.only.split(";") if name] or list(SETTINGS)
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    failed: dict[tuple[str, str], list[str]] = {}
    for turn in range(arguments.repeats):
        for name in wanted:
            for settings in SETTINGS[name]:
                key = (name, json.dumps(settings))
                try:
                    found = run(arguments, kind, samples, name, settings, ranks)
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    failed.setdefault(key, []).append(str(error))
                    print(f"{kind}, {ranks} ranks, turn {turn}: {error}", file=sys.stderr, flush=True)
                    continue
                rows.setdefault(key, []).append(found)
                print(f"{kind}, {ranks} ranks, turn {turn}: {key} {found}", file=sys.stderr, flush=True)
    medians = {key: {m: statistics.median(one[m] for one in found) for m in found[0]} for key, found in rows.items()}
    best = {name: key for name in wanted if (key := _best(medians, name, "cold_whole"))}
    warmest = {name: key for name in wanted if (key := _best(medians, name, "warm_whole"))}
    limit = medians[best["GET loop"]]["cold_whole"] if "GET loop" in best else float("nan")
    ours = medians[best["megadiff"]]["cold_whole"] if "megadiff" in best else float("nan")
    each = _mean_bytes(arguments.bucket, kind, samples)
    print(f"\n{kind}, {samples:,} samples of {each:,.0f} bytes, {ranks} process{'es' if ranks > 1 else ''}: samples per second")
    print("| | first batch, s | cold, whole epoch | MB/s | of the GET loop | megadiff, times it | after the first | warm |")
    print("|---|---|---|---|---|---|---|---|")
    for name, key in best.items():
        m = medians[key]
        warm = f"{medians[warmest[name]]['warm_whole']:,.0f} {warmest[name][1]}" if name in warmest else ""
        whole = f"{m['cold_whole']:,.0f} {key[1]} | {m['cold_whole'] * each / 1e6:,.0f}"
        ratios = f"{m['cold_whole'] / limit:.0%} | {ours / m['cold_whole']:.2f}"
        print(f"| {name} | {m['cold_first_batch_s']:.2f} | {whole} | {ratios} | {m['cold_steady']:,.0f} | {warm} |", flush=True)
    return {
        "bytes_per_sample": each,
        "medians": [{"competitor": name, "settings": json.loads(s), **m} for (name, s), m in medians.items()],
        "best": {name: json.loads(key[1]) for name, key in best.items()},
        "best_warm": {name: json.loads(key[1]) for name, key in warmest.items()},
        "failed": [{"competitor": name, "settings": json.loads(s), "times": len(e)} for (name, s), e in failed.items()],
        "all": [{"competitor": name, "settings": json.loads(s), "runs": found} for (name, s), found in rows.items()],
    }


def _best(medians: dict[tuple[str, str], dict[str, float]], name: str, what: str) -> tuple[str, str] | None:
    """The competitor's key with the most samples per second."""
    told = [key for key, found in medians.items() if key[0] == name and what in found]
    return max(told, key=lambda key: medians[key][what], default=None)


def _mean_bytes(bucket: str, kind: str, samples: int) -> float:
    """Of a sample in our shards, tar headers included."""
    from megadiff.data.shards.shard import read_manifest

    manifest = read_manifest(f"s3://{bucket}/{kind}-{samples}/shards")
    return sum(entry.bytes for entry in manifest.shards) / manifest.samples


if __name__ == "__main__":
    main()
