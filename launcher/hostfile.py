"""Machines that DeepSpeed's launcher reaches by ssh, without a scheduler."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadiff.config.errors import UserError
from megadiff.config.schema import DeepSpeedCluster, Run, Stage
from megadiff.files import write_text
from megadiff.launcher.children import ERROR_FILE
from megadiff.launcher.devices import CPU, CUDA, Devices
from megadiff.launcher.job import Plan, cache_folders, check, rank_environment

RUNNER = ("-m", "deepspeed.launcher.runner", "--no_local_rank", "--log_level", "error")
"""DeepSpeed's launcher for several machines."""
_PLAIN = re.compile(r"[\w@%+=:,./ -]*")


def text(hosts: Iterable[str], slots: int) -> str:
    """A hostfile of DeepSpeed: rank 0's machine first, `slots` ranks on each."""
    return "".join(f"{host} slots={slots}\n" for host in hosts)


def ssh_command(
    hosts: Sequence[str], hostfile: Path, port: int | str, environment: Mapping[str, str], arguments: Sequence[str]
) -> list[str]:
    """The command that runs a verb of megadiff as all ranks of a hostfile, whose machines pdsh reaches by ssh.

    Raises:
        UserError: a word would not come through the shells on the way, as DeepSpeed's launcher quotes only spaces.
    """
    # Variables stand in the command, for the launcher hands on only those that it knows.
    words = [*(f"{key}={value}" for key, value in environment.items()), sys.executable, "-m", "megadiff", *arguments]
    if strange := [word for word in words if not _PLAIN.fullmatch(word)]:
        raise UserError(f"{strange[0]!r} cannot be handed to other machines by ssh: only letters, digits and @%+=:,./_- can")
    where = ["--hostfile", str(hostfile.absolute()), "--master_addr", hosts[0], "--master_port", str(port)]
    return [sys.executable, *RUNNER, *where, "--launcher", "pdsh", "--force_multi", "--no_python", "env", *words]


@dataclass(frozen=True)
class SshPlan(Plan):
    """A plan for machines that share this machine's files.

    Attributes:
        hosts: rank 0's first.
    """

    hosts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.processes} processes on {', '.join(self.hosts)}"

    def command(self, stage: Stage, port: int | str) -> list[str]:
        paths = self.run.paths
        environment = {**self.environment, ERROR_FILE: str(paths.stage(stage.name).error.absolute())}
        train = ["train", str(paths.run), "--stage", stage.name, "--deepspeed", str(paths.deepspeed)]
        return ssh_command(self.hosts, paths.hostfile, port, environment, train)

    def showcase_environment(self) -> dict[str, str]:
        """Samples are drawn here, with the threads of one machine's ranks."""
        return {**self.environment, "OMP_NUM_THREADS": str(int(self.environment["OMP_NUM_THREADS"]) * self.slots)}

    @property
    def slots(self) -> int:
        """Ranks on each machine."""
        return self.processes // len(self.hosts)

    def write_hostfile(self) -> None:
        """Raises UserError if the run's folder cannot be written."""
        write(self.run.paths.hostfile, self.hosts, self.slots)


def write(path: Path, hosts: Iterable[str], slots: int) -> None:
    """Write a hostfile; see `text`.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text(hosts, slots))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def plan_hosts(run: Run, deepspeed: Mapping[str, Any], cluster: DeepSpeedCluster) -> SshPlan:
    """Check everything that can be checked here; see `plan_launch`.

    Raises:
        UserError: the DeepSpeed JSON, the batch or the manifests' buckets do not fit the run.
    """
    ranks = len(cluster.hosts) * cluster.ranks_per_node
    devices = Devices(CUDA, ranks) if cluster.accelerated else Devices(CPU, 0)
    check(run, deepspeed, ranks, devices)
    environment = {**rank_environment(cluster, run.launch.threads_per_process), **cache_folders(cluster)}
    plan = SshPlan(run, deepspeed, devices, ranks, environment, cluster.hosts)
    for stage in run.stages:
        plan.command(stage, "PORT")
    return plan


def verb_command(arguments: Sequence[str], cluster: DeepSpeedCluster, path: Path, port: int) -> list[str]:
    """The command that runs another verb as all ranks of the machines in the hostfile `path`; raises as `ssh_command`."""
    environment = {**rank_environment(cluster), **cache_folders(cluster)}
    return ssh_command(cluster.hosts, path, port, environment, arguments)
