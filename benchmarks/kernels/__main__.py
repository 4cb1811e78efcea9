"""The ops of kernels/ beside their peers, on one GPU, in one run; a CSV and a JSON named after the GPU.

    python -m benchmarks.kernels [--op NAME ...] [--folder DIR]
    TRITON_INTERPRET=1 MEGADIFF_KERNELS=triton python -m benchmarks.kernels --toy     # tiny shapes on a CPU, no times

An implementation that the machine lacks is a row "absent: why"; peers to install beforehand: flash-attn, liger-kernel.
Times are medians with an empty L2 cache. `error` is of the first output, relative to the reference's in float32; of the
training step it is the first loss itself.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.kernels import adaln, attention, draws, losses, measure, step
from benchmarks.kernels.measure import Machine, Row
from megadiff.kernels import toolchain

OPS = {"joint_attention": attention, "head_draw": draws, "head_loss": losses, "gated_adaln": adaln}
STEP = "step"
SHOWN = ("shape", "passes", "implementation", "microseconds", "over_floor", "peak_mib", "error", "status")


def rows(ops: Iterable[str], machine: Machine) -> Iterable[Row]:
    for name in ops:
        if name == STEP:
            yield from step.rows(machine)
        else:
            for case in OPS[name].cases(machine):
                yield from measure.rows(case, machine)


def cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=[*OPS, STEP], default=[*OPS, STEP])
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--toy", action="store_true", help="tiny shapes on the CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    if arguments.toy and not toolchain.interpreted():
        parser.error("--toy runs in Triton's interpreter; set TRITON_INTERPRET=1")
    if not arguments.toy and (fault := toolchain.fault()) is not None:
        parser.error(f"kernels cannot run here: {fault}; --toy runs tiny shapes without a GPU")
    machine = Machine(torch.device("cpu" if arguments.toy else "cuda"), arguments.toy)
    gpu = "toy" if arguments.toy else torch.cuda.get_device_name()
    name = f"kernels_{gpu.replace(' ', '_')}"
    versions = {"gpu": gpu, "torch": torch.__version__, **toolchain.toolchain()._asdict()}
    found: list[Row] = []
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with (arguments.folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(Row._fields)
        print("| " + " | ".join(SHOWN) + " |\n|" + "---|" * len(SHOWN))
        for row in rows(arguments.op, machine):
            found.append(row)
            table.writerow(row)
            file.flush()
            print("| " + " | ".join(cell(getattr(row, column)) for column in SHOWN) + " |", flush=True)
    record = {**versions, "cuda_driver": toolchain.driver_version(), "rows": [row._asdict() for row in found]}
    (arguments.folder / f"{name}.json").write_text(json.dumps(record, indent=1) + os.linesep, encoding="utf-8")


if __name__ == "__main__":
    main()
