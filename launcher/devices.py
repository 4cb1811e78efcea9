"""The accelerators of this machine, without torch."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megadiff.config.errors import UserError
from megadiff.config.schema import Launch

CPU, CUDA = "cpu", "cuda"


@dataclass(frozen=True)
class Devices:
    """The accelerators that a launch may use.

    Attributes:
        kind: `cuda`, `cpu`, or what DS_ACCELERATOR says.
        count: number of accelerators; 0 on a CPU.
        chosen: their indices, if CUDA_VISIBLE_DEVICES chooses among them.
    """

    kind: str
    count: int
    chosen: tuple[int, ...] | None = None

    @property
    def accelerated(self) -> bool:
        return self.kind != CPU

    def __str__(self) -> str:
        if not self.accelerated:
            return "the CPU"
        return f"{self.count} {'GPU' if self.kind == CUDA else self.kind}{'' if self.count == 1 else 's'}"


def find_devices(environment: Mapping[str, str] = os.environ) -> Devices:
    """The GPUs of this machine without those that CUDA_VISIBLE_DEVICES hides; the CPU if none is left.

    DeepSpeed's own switch DS_ACCELERATOR wins: `DS_ACCELERATOR=cpu` trains on the CPU of a machine with GPUs.

    Raises:
        UserError: CUDA_VISIBLE_DEVICES names devices in a way that DeepSpeed's launcher cannot take.
    """
    accelerator = environment.get("DS_ACCELERATOR", "").strip()
    if accelerator and accelerator != CUDA:
        return Devices(accelerator, 0)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    count = _gpus()
    if visible is None or not count:
        return Devices(CUDA, count) if count else Devices(CPU, 0)
    chosen = _indices(visible)
    return Devices(CUDA, len(chosen), chosen) if chosen else Devices(CPU, 0)


def processes_for(launch: Launch, devices: Devices) -> int:
    """How many ranks to start: one per GPU at most, since two on one GPU would only share it."""
    if launch.processes == "accelerators":
        return max(devices.count, 1)
    if devices.kind == CUDA:
        return min(launch.processes, devices.count)
    return launch.processes


def threads_for(launch: Launch, processes: int, environment: Mapping[str, str] = os.environ) -> int:
    """OMP_NUM_THREADS of each rank: the run's, else the environment's, else an equal share of the cores."""
    if launch.threads_per_process is not None:
        return launch.threads_per_process
    threads = environment.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > 0:
        return int(threads)
    return max(1, _cores() // processes)


def _cores() -> int:
    # Under Slurm, taskset or a container a process may use fewer cores than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in Path("/dev").glob("nvidia*"))
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def _indices(visible: str) -> tuple[int, ...]:
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if names == ["-1"]:
        return ()
    if not all(name.isdigit() for name in names):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES is {visible!r}, "
            "but DeepSpeed's launcher takes indices only; write them as nvidia-smi -L counts, such as 0,1"
        )
    return tuple(int(name) for name in names)
