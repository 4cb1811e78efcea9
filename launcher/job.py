"""What a launch will do: its stages, devices, environment and exact commands. Pure: nothing is started or written."""

from __future__ import annotations

import base64
import getpass
import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadiff.config.alignment import check_local_manifests
from megadiff.config.deepspeed import resolve_run
from megadiff.config.errors import UserError
from megadiff.config.layouts import layout_of
from megadiff.config.schema import LocalCluster, Run, Stage
from megadiff.config.schema.cluster import Machines
from megadiff.launcher.devices import CPU, CUDA, Devices, find_devices, processes_for, threads_for

CACHES = {"TRITON_CACHE_DIR": "triton", "TORCH_EXTENSIONS_DIR": "torch_extensions", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
"""By variable, the folder of a user's cache that it names."""


@dataclass(frozen=True)
class Plan:
    """What a launch will do.

    Attributes:
        environment: variables added for every rank; always with OMP_NUM_THREADS.
    """

    run: Run
    deepspeed: Mapping[str, Any]
    devices: Devices
    processes: int
    environment: dict[str, str]

    def __str__(self) -> str:
        layout = layout_of(self.deepspeed, self.processes)
        arranged = "" if layout.data_ranks == layout.world else f", as {layout}"
        return f"{self.processes} processes on {self.devices}{arranged}"

    def command(self, stage: Stage, port: int | str) -> list[str]:
        """The command that trains one stage on all processes.

        It is DeepSpeed's launcher for one machine. Its runner (`deepspeed`) would only import torch once more to give this
        same command, look for a hostfile, and hear no SIGTERM.
        """
        # The launcher sets CUDA_VISIBLE_DEVICES to these, whatever it was.
        indices = (self.devices.chosen or range(self.processes))[: self.processes]
        ranks = base64.urlsafe_b64encode(json.dumps({"localhost": list(indices)}).encode()).decode()
        paths = self.run.paths
        return [
            *(sys.executable, "-m", "deepspeed.launcher.launch", "--world_info", ranks),
            *("--master_port", str(port), "--no_local_rank", "--log_level", "critical", "--module"),
            *("megadiff", "train", str(paths.run), "--stage", stage.name, "--deepspeed", str(paths.deepspeed)),
        ]

    def showcase_environment(self) -> dict[str, str]:
        """Samples are drawn by one process, which takes the threads of all ranks."""
        return {**self.environment, "OMP_NUM_THREADS": str(int(self.environment["OMP_NUM_THREADS"]) * self.processes)}

    def showcase(self) -> list[str]:
        """The command that makes the sheet of samples after the last stage."""
        return [sys.executable, "-m", "megadiff", "showcase", str(self.run.paths.run)]


def plan_launch(run: Run, deepspeed: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Plan:
    """Check everything that can be checked without torch and without reading shards.

    Raises:
        UserError: the DeepSpeed JSON, the batch, the devices or the manifests' buckets do not fit the run.
    """
    devices = find_devices(environment)
    processes = processes_for(run.launch, devices)
    check(run, deepspeed, processes, devices)
    added = {"OMP_NUM_THREADS": str(threads_for(run.launch, processes, environment))}
    if not devices.accelerated:
        added = {"DS_ACCELERATOR": "cpu", **added}
    return Plan(run, deepspeed, devices, processes, added)


def plan_local(run: Run, deepspeed: Mapping[str, Any], cluster: LocalCluster) -> Plan:
    """`plan_launch` on the devices that a cluster file asks for."""
    devices = devices_of(cluster)
    check(run, deepspeed, cluster.ranks_per_node, devices)
    variables = {**rank_environment(cluster, run.launch.threads_per_process), **cache_folders(cluster)}
    return Plan(run, deepspeed, devices, cluster.ranks_per_node, variables)


def check(run: Run, deepspeed: Mapping[str, Any], ranks: int, devices: Devices) -> None:
    """Raises UserError if the DeepSpeed JSON, the batch or the manifests' buckets do not fit the run on these ranks."""
    check_local_manifests(run)
    resolve_run(deepspeed, run, ranks=ranks, accelerator=devices.accelerated)


def devices_of(cluster: LocalCluster) -> Devices:
    """This machine's devices, as a cluster asks for them.

    Raises:
        UserError: it has fewer GPUs.
    """
    if not cluster.accelerated:
        return Devices(CPU, 0)
    here = find_devices()
    if here.kind != CUDA or here.count < cluster.gpus_per_node:
        raise UserError(f"gpus_per_node is {cluster.gpus_per_node}, and this machine has {here}")
    return here


def rank_environment(cluster: Machines, threads: int | None = None) -> dict[str, str]:
    """Variables of every rank on a cluster, but for those that differ between nodes or users.

    Args:
        threads: OMP_NUM_THREADS of each; None: one per core.
    """
    nccl = {f"NCCL_{key}": value for key, value in cluster.nccl.items()}
    # Also on GPUs: the shell that launches may say otherwise, and a node without its GPUs must not train on the CPU.
    accelerator = CUDA if cluster.accelerated else CPU
    return {
        "DS_ACCELERATOR": accelerator,
        "OMP_NUM_THREADS": str(threads or cluster.cpus_per_process),
        **nccl,
        **cluster.environment,
    }


def cache_folders(cluster: Machines) -> dict[str, str]:
    """Where Triton and torch keep what they compile for this user."""
    if cluster.cache is None:
        return {}
    own = Path(cluster.cache) / getpass.getuser()
    return {variable: str(own / folder) for variable, folder in CACHES.items()}


def missing_files(run: Run) -> list[str]:
    """Local files that the run names and that do not exist, as `key: path`."""
    train = run.data.train
    paths: dict[str, str | None] = {"data.held_out": run.data.held_out}
    paths |= {"data.train": train} if isinstance(train, str) else {f"data.train.{name}": at for name, at in train.items()}
    for name, source in run.data.fields.items():
        paths |= {f"data.fields.{name}.{key}": getattr(source, key) for key in source.FILES}
    return [f"{key}: {path}" for key, path in paths.items() if path and "://" not in path and not Path(path).exists()]


def describe(plan: Plan) -> str:
    """The exact commands, as a shell would take them."""
    lines = []
    ranks = f", {plan}"  # the launcher takes them encoded
    for number, stage in enumerate(plan.run.stages, 1):
        state = " (done already)" if plan.run.paths.stage(stage.name).done.exists() else ""
        lines += [f"# stage {number} of {len(plan.run.stages)}, {stage.name}: {stage.steps:,} steps{state or ranks}"]
        if not state:
            lines += [f"{shell(plan.environment)} {shlex.join(plan.command(stage, 'PORT'))}"]
    if plan.run.showcase:
        lines += ["# samples", f"{shell(plan.showcase_environment())} {shlex.join(plan.showcase())}"]
    return "\n".join(lines)


def shell(environment: Mapping[str, str]) -> str:
    """Variables as a shell takes them before a command."""
    return " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())
