"""`megadiff plan`: several DeepSpeed JSONs and node counts for a run, side by side. Without torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megadiff.cli.arguments import Verbs, add_run, add_verb, cluster_of, positive, sort_overrides
from megadiff.cli.layout_table import size
from megadiff.config.deepspeed import load_deepspeed
from megadiff.config.errors import UserError
from megadiff.config.gpus import GPUS
from megadiff.config.load import load_run
from megadiff.config.planning import Choice, choices, gpu_of, node_count

EXAMPLES = """\
  megadiff plan configs/run/paper_8gpu.yaml --deepspeed ds_configs/*.json --cluster configs/cluster/slurm.yaml --nodes 1 2 4
  megadiff plan configs/run/paper_8gpu.yaml stages.*.batch.micro_batch=8 --deepspeed ds_configs/zero2.json \\
      --cluster configs/cluster/slurm.yaml --gpu a100 h100 h200
"""

HEADER = (
    *("JSON", "nodes", "ranks", "GPU", "stage", "P x R x T", "micro-batches", "held", "sent", "bubble"),
    *("step, s", "MFU", "limit"),
)


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "plan",
        "compare DeepSpeed JSONs and node counts for a run",
        "For each DeepSpeed JSON, number of nodes, GPU and stage, a row: ranks as pipeline stages x replicas x tensor ranks,\n"
        "micro-batches of a step, bytes that the fullest rank holds and sends per step, the share of a step that pipeline\n"
        "stages wait, and by the GPU's data sheet the seconds of a step and the model FLOPs utilisation: bounds, from\n"
        "everything overlapped to nothing overlapped at peak rates, and what takes the most. A real step takes longer\n"
        "(docs/planning.md). What does not divide or fit says so. Overrides stand before the options.",
        EXAMPLES,
    )
    add_run(parser)
    parser.add_argument("--deepspeed", metavar="DS.json", nargs="+", required=True, help="the DeepSpeed JSONs")
    parser.add_argument("--cluster", metavar="CLUSTER.yaml", required=True, help="the machines; overrides: cluster.a=b")
    parser.add_argument("--nodes", metavar="N", nargs="+", type=positive, help="numbers of nodes (default: the cluster's)")
    parser.add_argument("--gpu", nargs="+", choices=list(GPUS), help="GPUs of each node (default: the cluster's `gpu`)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, bytes by kind")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    of_cluster, of_run = sort_overrides(arguments.overrides)
    cluster, loaded = cluster_of(arguments, of_cluster), load_run(arguments.run_file, of_run)
    assert cluster is not None  # the parser requires it
    if arguments.gpu and not cluster.accelerated:
        raise UserError(f"--gpu {' '.join(arguments.gpu)}, and the nodes of {arguments.cluster} have none (gpus_per_node)")
    gpus = [GPUS[name] for name in arguments.gpu] if arguments.gpu else [gpu_of(cluster)]
    trees = {path: load_deepspeed(path) for path in arguments.deepspeed}
    found = [
        choice
        for path, tree in trees.items()
        for nodes in arguments.nodes or [node_count(cluster)]
        for gpu in gpus
        for choice in choices(loaded, Path(path).name, tree, cluster, nodes, gpu)
    ]
    print(json.dumps([as_json(choice) for choice in found], indent=2) if arguments.json else table(found))
    return 0


def as_json(choice: Choice) -> dict[str, Any]:
    """A row with all its numbers; those that a refused run has not are null."""
    numbers, layout, time = asdict(choice), choice.layout, choice.time
    if layout is not None:
        numbers["layout"] = {"pipeline": layout.pipeline, "data": layout.data_ranks, "tensor": layout.tensor}
    else:
        numbers |= {"micro_batches": None, "bubble": None}
    if time is not None:
        numbers["time"] |= {"least_s": time.least_s, "apart_s": time.apart_s, "limit": time.limit}
        numbers["utilisation"] = {"most": time.utilisation(time.least_s), "apart": time.utilisation(time.apart_s)}
    return numbers


def table(found: Sequence[Choice]) -> str:
    """A line per choice; what is wrong with one ends its line."""
    lines = [HEADER, *(_cells(choice) for choice in found)]
    shown = [place for place in range(len(HEADER)) if any(line[place] != "-" for line in lines[1:])]
    widths = {place: max(len(line[place]) for line in lines) for place in shown}
    texts = [
        "  ".join(line[place].ljust(widths[place]) if place in (0, 4) else line[place].rjust(widths[place]) for place in shown)
        for line in lines
    ]
    faults = ["", *(choice.fault for choice in found)]
    return "\n".join(f"{text}  {fault}".rstrip() for text, fault in zip(texts, faults, strict=True))


def _cells(choice: Choice) -> tuple[str, ...]:
    """As in HEADER; `-` is unknown."""
    place = (choice.json, str(choice.nodes), str(choice.ranks), choice.gpu or "-")
    layout, time = choice.layout, choice.time
    if layout is None or choice.held is None or choice.sent is None:
        return (*place, *["-"] * (len(HEADER) - len(place)))
    numbers = (
        choice.stage or "-",
        f"{layout.pipeline} x {layout.data_ranks} x {layout.tensor}",
        f"{choice.micro_batches:,}",
        size(choice.held["total"]),
        size(choice.sent["total"]),
        f"{choice.bubble:.1%}",
    )
    if time is None:
        return (*place, *numbers, "-", "-", "-")
    mfu = f"{time.utilisation(time.least_s):.0%} - {time.utilisation(time.apart_s):.0%}"
    return (*place, *numbers, f"{time.least_s:.3g} - {time.apart_s:.3g}", mfu, time.limit)
