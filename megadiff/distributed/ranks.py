"""This process's place among the processes of a run."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megadiff.config.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's place.

    Attributes:
        rank: 0 <= rank < world, over all machines.
        world: the number of processes.
        local_rank: this process's index on its machine, and of its device.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Ranks:
        """From RANK, WORLD_SIZE and LOCAL_RANK, as launchers set them; a single process if none is set.

        Raises:
            UserError: a value is no whole number, or they contradict each other.
        """
        environment = os.environ if environment is None else environment
        tasks = _whole(environment, "SLURM_NTASKS", 1) if "SLURM_PROCID" in environment else 1
        if tasks > 1 and "RANK" not in environment:
            raise UserError(
                f"srun started {tasks} tasks, but RANK is not set; give each RANK=$SLURM_PROCID, WORLD_SIZE=$SLURM_NTASKS, "
                "LOCAL_RANK=$SLURM_LOCALID, MASTER_ADDR and MASTER_PORT, or start torchrun once per node"
            )
        rank = _whole(environment, "RANK", 0)
        world = _whole(environment, "WORLD_SIZE", 1)
        local_rank = _whole(environment, "LOCAL_RANK", 0)
        if rank >= world:
            raise UserError(f"RANK is {rank} and WORLD_SIZE is {world}; RANK must be below WORLD_SIZE: set both or neither")
        if local_rank > rank:
            raise UserError(f"LOCAL_RANK is {local_rank} and RANK is {rank}; a process's LOCAL_RANK is at most its RANK")
        return cls(rank, world, local_rank)


def _whole(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{name} is {text!r} in the environment; it must be a whole number, 0 or more")
    return int(text)


def node_name() -> str:
    """This machine's name; under Slurm the one that its options take."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def free_port() -> int:
    """A free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
