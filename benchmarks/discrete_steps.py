"""Time and peak memory of one discrete sampling step at the paper's size: B = 64, L = 120, V = 49,408, width 1,024.

    python -m benchmarks.discrete_steps [--json FILE] [--batch B]

Every case runs in a process of its own; its peak is the largest resident size less what its inputs take. Peer: the same step
with dense logits, float32 Gumbel noise and an argmax over all positions, as such samplers are commonly written.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from megadiff import rng
from megadiff.kernels.head_draw import head_draw
from megadiff.types import DrawRule, RowKeys

LENGTH, VOCABULARY, WIDTH = 120, 49_408, 1_024
CASES = {
    "ancestral, step 1 of 50 (2 % of the rows)": 0.02,
    "ancestral, step 10 of 50 (2.4 % of 82 % of the rows)": 0.02,
    "confidence, first step (all rows)": 1.0,
    "confidence, guided, first step (all rows, 2 branches)": 1.0,
    "dense logits + Gumbel noise": None,
}


def run(case: str, batch: int) -> dict[str, float]:
    torch.manual_seed(0)
    branches = 2 if "guided" in case else 1
    hidden = torch.randn(branches * batch, LENGTH, WIDTH)
    weight, bias = torch.randn(VOCABULARY, WIDTH) * 0.02, torch.zeros(VOCABULARY)
    share = CASES[case]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    if share is None:
        logits = hidden @ weight.T + bias
        noise = -torch.log(-torch.log(torch.rand_like(logits) + 1e-10) + 1e-10)
        (logits + noise).argmax(-1)
    else:
        positions = torch.randperm(batch * LENGTH)[: max(1, round(share * batch * LENGTH))]
        rows = torch.stack([positions + branch * batch * LENGTH for branch in range(branches)])
        weights = torch.tensor([[3.0], [-2.0]]).expand(-1, rows.shape[1]) if branches == 2 else torch.ones_like(rows).float()
        keys = RowKeys(rng.sample_keys(0, rows[0] // LENGTH), "token", rows[0] % LENGTH)
        head_draw(hidden, weight, bias, rows, weights, keys, DrawRule())
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "peak_mib": peak / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/discrete_steps.json"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--case", choices=CASES)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run(arguments.case, arguments.batch)))
        return
    found = {}
    print(
        f"B = {arguments.batch}, L = {LENGTH}, V = {VOCABULARY:,}; [B, L, V] in float32 is "
        f"{arguments.batch * LENGTH * VOCABULARY * 4 / 2**20:,.0f} MiB\n"
    )
    print("| case | seconds | peak MiB |\n|---|---|---|")
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.discrete_steps", "--case", case, "--batch", str(arguments.batch)]
        found[case] = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        print(f"| {case} | {found[case]['seconds']:.2f} | {found[case]['peak_mib']:,.0f} |", flush=True)
    record = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "cases": found}
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
