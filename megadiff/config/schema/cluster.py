"""Where a run is launched: this machine, a Slurm cluster, or machines under DeepSpeed's launcher."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from megadiff.config.schema.base import LocalPath, NotNegative, Positive, Section

OWN_OPTIONS = frozenset(
    {
        *("array", "chdir", "dependency", "error", "export", "export-file", "input", "job-name", "kill-on-invalid-dep"),
        *("cpus-per-task", "gpus", "gpus-per-node", "gpus-per-task", "nodes", "ntasks", "ntasks-per-node", "time"),
        *("no-kill", "no-requeue", "open-mode", "output", "parsable", "requeue", "signal", "test-only", "wait", "wrap"),
    }
)
"""Options of sbatch that megadiff writes itself."""


def _is_variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{name!r} is no name of an environment variable")
    return name


def _is_one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{text!r} must be printable and on one line")
    return text


def _is_free_option(text: str) -> str:
    option = re.match(r"--([a-z0-9-]+)", text)
    if option is None:
        raise ValueError(f"{text!r} must be a long option of sbatch, such as --mem=0")
    if option[1] in OWN_OPTIONS:
        raise ValueError(f"{text!r}: megadiff sets --{option[1]} itself")
    return text


Line = Annotated[str, AfterValidator(_is_one_line), Field(min_length=1)]
Variable = Annotated[str, AfterValidator(_is_variable)]
SbatchOption = Annotated[Line, AfterValidator(_is_free_option)]


class Machines(Section):
    """What every kind of cluster has: ranks on nodes, and what they find there."""

    gpus_per_node: NotNegative = 0
    """GPUs of each node, one rank on each; 0 trains on CPUs."""
    gpu: Literal["a100", "h100", "h200"] | None = None
    """What they are; a model that cannot fit into their memory is then refused before a launch, and `plan` tells times."""
    network_gbit_per_s: Positive | None = None
    """Between nodes, of each GPU's port, each way; None: as in the maker's own nodes. For `plan` alone."""
    processes_per_node: Positive = 1
    """Ranks of each node without GPUs."""
    cpus_per_process: Positive = 1
    """Cores of each rank; its OMP_NUM_THREADS, unless the run's `launch.threads_per_process` is set."""
    environment: dict[Variable, Line] = Field(default_factory=dict)
    """Environment variables of every rank."""
    nccl: dict[Variable, Line] = Field(default_factory=dict)
    """Settings of NCCL by their names without the prefix: `SOCKET_IFNAME: ib0` sets NCCL_SOCKET_IFNAME."""
    cache: LocalPath | None = None
    """A folder on a disk of each node's own, for what Triton and torch compile; each user has a folder in it."""

    @property
    def accelerated(self) -> bool:
        return self.gpus_per_node > 0

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or self.processes_per_node

    @model_validator(mode="after")
    def _one_rank_per_gpu(self) -> Machines:
        if self.gpus_per_node and "processes_per_node" in self.model_fields_set:
            raise ValueError("gpus_per_node and processes_per_node exclude each other: every GPU has one rank")
        if self.gpu and not self.gpus_per_node:
            raise ValueError(f"gpu is {self.gpu}, and gpus_per_node is 0; give their number")
        return self


class LocalCluster(Machines):
    """This machine alone; nothing is submitted."""

    kind: Literal["local"] = "local"


class Allocation(Machines):
    """What a job asks Slurm for, and how it survives there."""

    nodes: Positive = 1
    least_nodes: Positive | None = None
    """Where fewer than `nodes` are free, a job starts, or starts again, on fewer, down to so many; None: on `nodes` alone."""
    time_limit_minutes: Positive = 24 * 60
    """Time limit of a job; at its end the stage goes on in the same job's next turn, from a checkpoint."""
    stop_before_s: Positive = 600
    """Seconds before the time limit at which ranks are told to save; Slurm may be a minute early."""
    restarts: NotNegative = 10
    """Most restarts of a stage's job after failures of ranks or nodes; the time limit's do not count."""
    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    exclude: Line | None = None
    """Nodes to keep out of, as Slurm writes lists: `node[3-5],node9`."""
    options: tuple[SbatchOption, ...] = ()
    """Further options of sbatch, such as `--mem=0` or `--reservation=NAME`."""
    modules: tuple[Line, ...] = ()
    """Environment modules that a job loads."""
    container: tuple[Line, ...] = ()
    """The command before every rank's own, a word per entry: `[apptainer, exec, --nv, image.sif]`."""
    python: Line | None = None
    """The interpreter on the nodes, or in the container; None: the one that launches."""

    @property
    def fewest_nodes(self) -> int:
        return self.least_nodes or self.nodes

    @model_validator(mode="after")
    def _fewest_are_no_more(self) -> Allocation:
        if self.fewest_nodes > self.nodes:
            raise ValueError(f"least_nodes ({self.least_nodes}) must not be more than nodes ({self.nodes})")
        return self

    @model_validator(mode="after")
    def _stops_before_its_limit(self) -> Allocation:
        if self.stop_before_s >= 60 * self.time_limit_minutes:
            raise ValueError(
                f"stop_before_s ({self.stop_before_s}) must be less than time_limit_minutes "
                f"({self.time_limit_minutes}) = {60 * self.time_limit_minutes} s"
            )
        return self


class SlurmCluster(Allocation):
    """A Slurm allocation, where srun starts one task per rank."""

    kind: Literal["slurm"] = "slurm"


class DeepSpeedCluster(Allocation):
    """DeepSpeed's launcher, once on each node: of a Slurm allocation, or of machines that are reached by ssh."""

    kind: Literal["deepspeed"] = "deepspeed"
    hosts: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], ...] = ()
    """Machines that are reached by ssh without a password, rank 0's first; empty: those of a Slurm allocation."""

    @model_validator(mode="after")
    def _hosts_are_no_allocation(self) -> DeepSpeedCluster:
        if not self.hosts:
            return self
        of_slurm = set(Allocation.model_fields) - set(Machines.model_fields) - {"python"}
        if given := sorted(of_slurm & self.model_fields_set):
            raise ValueError(f"{', '.join(given)}: of a Slurm allocation, and hosts are reached without one")
        if len(set(self.hosts)) < len(self.hosts):
            raise ValueError("hosts must differ: DeepSpeed's launcher runs once on each")
        return self


Cluster = LocalCluster | SlurmCluster | DeepSpeedCluster
KINDS: dict[str, type[Cluster]] = {"local": LocalCluster, "slurm": SlurmCluster, "deepspeed": DeepSpeedCluster}
