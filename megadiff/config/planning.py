"""Layouts and node counts for a run, side by side: what each holds, sends and takes, and why it cannot be. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadiff.config.activations import Precision
from megadiff.config.deepspeed import load_deepspeed, resolve_run, zero_stage
from megadiff.config.errors import ConfigError
from megadiff.config.footprint import Bytes, Plan, bubble, bytes_per_rank, bytes_sent_per_step, fullest, with_total
from megadiff.config.gpus import GPUS, Gpu
from megadiff.config.layout import Layout
from megadiff.config.layouts import layout_of
from megadiff.config.schema import Cluster, DeepSpeedCluster, LocalCluster, Run, Stage
from megadiff.config.speed import Hardware, StepTime, step_time

GROWTH = (2, 4, 8, 16)
"""Multiples of the nodes that are tried for a model that does not fit."""


@dataclass(frozen=True)
class Choice:
    """A stage of a run with a DeepSpeed JSON on a number of nodes.

    Attributes:
        stage: None if the run as a whole is refused; then there are no numbers.
        held: bytes of the fullest rank in the GPU's memory, by kind; sent: those that it hands to collectives in a step.
        time: None without a known GPU.
        fault: why it cannot be, in a sentence, or nothing.
    """

    json: str
    nodes: int
    ranks: int
    gpu: str | None
    stage: str | None = None
    layout: Layout | None = None
    micro_batches: int = 0
    held: Bytes | None = None
    sent: Bytes | None = None
    bubble: float = 0.0
    time: StepTime | None = None
    fault: str = ""


def plan_of(run: Run, stage: Stage, layout: Layout, resolved: Mapping[str, Any]) -> Plan:
    """A stage with its resolved DeepSpeed JSON."""
    precision: Precision = "bf16" if resolved["bf16"]["enabled"] else "fp32"
    return Plan(run.model, stage, layout, zero_stage(resolved), precision, resolved.get("zero_optimization", {}))


def choices(run: Run, json: str, tree: Mapping[str, Any], cluster: Cluster, nodes: int, gpu: Gpu | None) -> list[Choice]:
    """A choice for each stage of a run; a single one if the run cannot be launched so.

    Args:
        json: the name of the DeepSpeed JSON `tree`.
    """
    ranks = nodes * cluster.ranks_per_node
    try:
        resolved = resolve_run(tree, run, ranks=ranks, accelerator=cluster.accelerated)
    except ConfigError as error:
        return [Choice(json, nodes, ranks, gpu.name if gpu else None, fault=str(error))]
    plans = [plan_of(run, stage, layout_of(tree, ranks), resolved[stage.name]) for stage in run.stages]
    return [_choice(plan, json, nodes, cluster, gpu) for plan in plans]


def node_count(cluster: Cluster) -> int:
    if isinstance(cluster, LocalCluster):
        return 1
    return len(cluster.hosts) if isinstance(cluster, DeepSpeedCluster) and cluster.hosts else cluster.nodes


def gpu_of(cluster: Cluster) -> Gpu | None:
    """The GPU that a cluster file names."""
    return None if cluster.gpu is None else GPUS[cluster.gpu]


def check_fits(run: Run, path: Path, tree: Mapping[str, Any], cluster: Cluster) -> None:
    """Check that every stage fits into the memory of the cluster's GPU, if its file names one.

    Args:
        path: of the DeepSpeed JSON `tree`; what lies beside it may be recommended.

    Raises:
        ConfigError: it does not; says what would fit. Or the run cannot be launched so at all.
    """
    gpu, nodes = gpu_of(cluster), node_count(cluster)
    if gpu is None:
        return
    faults = [choice for choice in choices(run, path.name, tree, cluster, nodes, gpu) if choice.fault]
    if not faults:
        return
    if faults[0].stage is None:
        raise ConfigError(faults[0].fault)
    worst = max(faults, key=lambda choice: choice.held["total"] if choice.held else 0)
    fitting = list(_fitting(run, path, tree, cluster, nodes, gpu))
    advice = (
        f"would fit: {', '.join(fitting)}"
        if fitting
        else (
            f"no JSON beside it would fit, nor would more nodes, up to {nodes * GROWTH[-1]}; lower batch.micro_batch, "
            "or set activation_checkpointing"
        )
    )
    raise ConfigError(f"stage {worst.stage} with {path.name} on {_nodes(nodes)}: {worst.fault}; {advice}")


def _fitting(run: Run, path: Path, tree: Mapping[str, Any], cluster: Cluster, nodes: int, gpu: Gpu) -> Iterator[str]:
    """What could be launched instead: other JSONs, then more nodes."""

    def fits(tree: Mapping[str, Any], nodes: int) -> bool:
        return not any(choice.fault for choice in choices(run, path.name, tree, cluster, nodes, gpu))

    for other in sorted(path.parent.glob("*.json")):
        with suppress(ConfigError):  # it may be anything
            if fits(load_deepspeed(other), nodes):
                yield other.name
    if not isinstance(cluster, LocalCluster):
        more = (nodes * factor for factor in GROWTH)
        yield from [_nodes(count) for count in more if fits(tree, count)][:1]


def _choice(plan: Plan, json: str, nodes: int, cluster: Cluster, gpu: Gpu | None) -> Choice:
    held = fullest([_on_gpu(plan, kinds) for kinds in bytes_per_rank(plan)])
    time, fault = None, ""
    if gpu is not None:
        network = gpu.network_bandwidth if cluster.network_gbit_per_s is None else cluster.network_gbit_per_s * 1e9 / 8
        time = step_time(plan, Hardware(gpu, cluster.ranks_per_node, network))
        if held["total"] > gpu.memory_bytes:
            fault = f"a rank holds {held['total'] / 2**30:.1f} GiB, and an {gpu.name} has {gpu.memory_bytes / 2**30:g}"
    return Choice(
        json=json,
        nodes=nodes,
        ranks=plan.layout.world,
        gpu=gpu.name if gpu else None,
        stage=plan.stage.name,
        layout=plan.layout,
        micro_batches=plan.micro_batches,
        held=held,
        sent=fullest(bytes_sent_per_step(plan)),
        bubble=bubble(plan.layout.pipeline, plan.micro_batches),
        time=time,
        fault=fault,
    )


def _on_gpu(plan: Plan, kinds: Bytes) -> Bytes:
    return with_total({kind: count for kind, count in kinds.items() if kind != "total" and kind not in plan.offloaded})


def _nodes(count: int) -> str:
    return f"{count} node{'s' * (count > 1)}"
