"""The share of training steps that waits for data, out of object storage with empty caches.

    python -m benchmarks.data_wait [--samples 24000] [--step-ms 150] [--json FILE]

The training thread multiplies matrices for about so long per batch of 256 samples (moments and token ids, as in
data_throughput) while the loader's threads fetch and decode. The first batch is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import data_throughput
from benchmarks.data_sets import prepare


def work_of(milliseconds: float) -> tuple[torch.Tensor, int]:
    """A matrix, and how many of its products take about so long here."""
    matrix = torch.randn(512, 512) / 512**0.5
    began = time.perf_counter()
    for _ in range(50):
        matrix @ matrix
    each = (time.perf_counter() - began) / 50 * 1000
    return matrix, max(1, round(milliseconds / each))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/data_wait.json"))
    parser.add_argument("--samples", type=int, default=24000)
    parser.add_argument("--step-ms", type=float, nargs="+", default=[25.0, 50.0, 150.0])
    parser.add_argument("--bucket", default="bench")
    arguments = parser.parse_args()
    prepare(arguments.bucket, "latents", arguments.samples)
    torch.set_num_threads(1)
    rows = []
    print("| step, ms | first batch, s | of the time waited | samples per second |\n|---|---|---|---|")
    for step_ms in arguments.step_ms:
        rows.append(measure(arguments, step_ms))
        row = rows[-1]
        print(f"| {row['step_ms']:.0f} | {row['first_batch_s']:.2f} | {row['wait_share']:.2%} | {row['samples_per_s']:,.0f} |")
    arguments.json.write_text(json.dumps({"cores": len(os.sched_getaffinity(0)), "batch": 256, "rows": rows}, indent=1) + "\n")


def measure(arguments: argparse.Namespace, step_ms: float) -> dict[str, Any]:
    address = f"s3://{arguments.bucket}/latents-{arguments.samples}"
    asked = argparse.Namespace(child="megadiff", kind="latents", address=address, samples=arguments.samples, rank=0, ranks=1)
    epoch = data_throughput.megadiff(asked, {"workers": 1}, Path())
    matrix, products = work_of(step_ms)
    began = time.perf_counter()
    waited, worked, first, read = 0.0, 0.0, 0.0, 0
    batches = epoch()
    while True:
        before = time.perf_counter()
        size = next(batches, None)
        after = time.perf_counter()
        if size is None:
            break
        first, waited = (after - began, 0.0) if not read else (first, waited + after - before)
        read += size
        for _ in range(products):
            matrix @ matrix
        worked += time.perf_counter() - after
    return {
        "step_ms": worked / (read / 256) * 1000,
        "first_batch_s": first,
        "wait_share": waited / (waited + worked),
        "samples_per_s": read / (time.perf_counter() - began),
    }


if __name__ == "__main__":
    main()
