"""The share of training steps that waits for data, out of object storage with empty caches.

    python -m benchmarks.data_wait [--samples 24000] [--step-ms 25 50 150] [--repeats 3] [--json FILE]

The training thread multiplies matrices for about so long per batch of 256 samples (moments and token ids, as in
data_throughput) while the loader's threads fetch and decode. Told is, of an epoch without its first batch, the share of the
time that the thread waits for a batch: in `take_stored`, and in `take` by the loader's own count. Beside it stands the share
spent in `take` as a whole, which also draws the latents from their moments: arithmetic that a run does on its GPU, and here on
the step's core. `slower` is how much longer a step takes than without a loader: where the server and the loader's threads share
the step's cores, they take time from it that is no waiting. Every measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import data_throughput
from benchmarks.data_sets import prepare

BATCH = data_throughput.BATCH["latents"]


def products_of(matrix: torch.Tensor, milliseconds: float) -> tuple[int, float]:
    """How many products of the matrix take about so long here, and how long they do, in seconds."""
    for _ in range(20):
        matrix @ matrix
    each = min(_seconds(matrix, 20) for _ in range(3)) / 20
    count = max(1, round(milliseconds / 1000 / each))
    return count, statistics.median(_seconds(matrix, count) for _ in range(5))


def _seconds(matrix: torch.Tensor, count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        matrix @ matrix
    return time.perf_counter() - began


def measure(address: str, samples: int, workers: int, step_ms: float, drawn: bool) -> dict[str, float]:
    torch.set_num_threads(1)
    matrix = torch.randn(512, 512) / 512**0.5
    products, alone = products_of(matrix, step_ms)
    asked = argparse.Namespace(child="megadiff", kind="latents", address=address, samples=samples, rank=0, ranks=1)
    began = time.perf_counter()
    loader = data_throughput.open_loader(asked, {"workers": workers}, Path())
    take = loader.take if drawn else loader.take_stored
    take()
    first = time.perf_counter() - began
    before = loader.stats()
    taking, worked = 0.0, [_seconds(matrix, products)]
    for _ in range(samples // BATCH - 1):
        start = time.perf_counter()
        take()
        taking += time.perf_counter() - start
        worked.append(_seconds(matrix, products))
    waited = loader.stats().waited_s - before.waited_s
    loader.close()
    whole = taking + sum(worked)
    return {
        "first_batch_s": first,
        "step_ms": statistics.mean(worked) * 1000,
        "slower": statistics.mean(worked) / alone - 1,
        "take_share": taking / whole,
        "wait_share": waited / whole,
        "samples_per_s": samples // BATCH * BATCH / whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/data_wait.json"))
    parser.add_argument("--samples", type=int, default=24000)
    parser.add_argument("--step-ms", type=float, nargs="+", default=[25.0, 50.0, 150.0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bucket", default="bench")
    parser.add_argument("--child", choices=("take", "take_stored"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    address = f"s3://{arguments.bucket}/latents-{arguments.samples}"
    if arguments.child:
        print(
            json.dumps(measure(address, arguments.samples, arguments.workers, arguments.step_ms[0], arguments.child == "take"))
        )
        return
    prepare(arguments.bucket, "latents", arguments.samples)
    rows: list[dict[str, Any]] = []
    print("| | step, ms | slower than alone | first batch, s | in the call | waiting | samples per second |")
    print("|---|---|---|---|---|---|---|")
    for drawn in (False, True):
        for step_ms in arguments.step_ms:
            runs = [_child(arguments, step_ms, drawn) for _ in range(arguments.repeats)]
            row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            call = "take" if drawn else "take_stored"
            rows.append({"call": call, "asked_ms": step_ms, **row, "runs": runs})
            times = f"{row['step_ms']:.0f} | {row['slower']:.0%} | {row['first_batch_s']:.2f}"
            shares = f"{row['take_share']:.2%} | {row['wait_share']:.2%}"
            print(f"| {call} | {times} | {shares} | {row['samples_per_s']:,.0f} |", flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "obstore")}
    facts = {"cores": len(os.sched_getaffinity(0)), "versions": versions, "server": "on the same machine", "batch": BATCH}
    arguments.json.write_text(json.dumps({**facts, "workers": arguments.workers, "rows": rows}, indent=1) + "\n")


def _child(arguments: argparse.Namespace, step_ms: float, drawn: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.data_wait", "--child", "take" if drawn else "take_stored"]
    command += ["--step-ms", str(step_ms), "--bucket", arguments.bucket]
    command += ["--samples", str(arguments.samples), "--workers", str(arguments.workers)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr[-800:])
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
