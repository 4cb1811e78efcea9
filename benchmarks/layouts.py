"""What each layout of ranks holds, sends and costs, counted over gloo beside the formulas of config/footprint.py.

    python -m benchmarks.layouts [--json FILE] [--run RUN.yaml] [--stages NAMES] [--steps N] [KEY=VALUE ...]

Bytes held by kind on the fullest rank, and bytes sent per step by collective, in fp32 with the JSON files of ds_configs; only
stage3_param_persistence_threshold is 0, since a model this small would never be divided. Step times are ratios to one rank with
the same global batch; the ranks share this machine's cores, so that only their overhead is told.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megadiff.config.deepspeed import load_deepspeed, resolve_run, zero_stage
from megadiff.config.footprint import Bytes, Plan, bytes_per_rank, bytes_sent_per_step
from megadiff.config.layouts import layout_of, with_sizes
from megadiff.config.load import load_run
from megadiff.config.schema import Run

RANK = Path(__file__).with_name("layout_counts.py")
NO_PERSISTENCE = {"stage3_param_persistence_threshold": 0}
OVERRIDES = ["model.modalities.text.space.vocabulary=256"]
"""Of tests/tiny.yaml, whose embedding would otherwise be most of the model."""
TOLERANCE = 0.05


@dataclass(frozen=True)
class Case:
    """A layout: a DeepSpeed JSON on so many ranks."""

    name: str
    ranks: int
    file: str
    pipeline: int | None = None
    zero: dict[str, Any] = field(default_factory=dict)

    @property
    def tree(self) -> dict[str, Any]:
        tree = load_deepspeed(f"ds_configs/{self.file}.json")
        tree["zero_optimization"] |= self.zero
        return with_sizes(tree, self.pipeline)

    def plan(self, run: Run, stage: str) -> Plan:
        resolved = resolve_run(self.tree, run, ranks=self.ranks, accelerator=False)[stage]
        layout = layout_of(self.tree, self.ranks)
        return Plan(run.model, run.stage(stage), layout, zero_stage(resolved), "fp32", resolved["zero_optimization"])


ONE = Case("1 rank", 1, "zero0")
CASES = (
    Case("ZeRO-0 x 2", 2, "zero0"),
    Case("ZeRO-1 x 2", 2, "zero1"),
    Case("ZeRO-2 x 2", 2, "zero2"),
    Case("ZeRO-3 x 2", 2, "zero3", zero=NO_PERSISTENCE),
    Case("pipeline x 2", 2, "pipeline"),
    Case("tensor x 2", 2, "tensor_zero1"),
    Case("tensor 2 x ZeRO-3 2", 4, "tensor_zero3", zero=NO_PERSISTENCE),
    Case("pipeline 2 x data 2", 4, "pipeline"),
    Case("pipeline 2 x tensor 2", 4, "pipeline_tensor"),
)

Launch = Callable[[Path, int, dict[str, Any]], list[Any]]
"""Runs a script on so many ranks with a request, and returns what each rank printed as JSON."""


def compare(case: Case, run: Run, request: dict[str, Any], launch: Launch) -> dict[str, Any]:
    """By stage of the request, the counts of every rank beside the formulas', and the slowest rank's median step."""
    ranks = launch(RANK, case.ranks, {**request, "tree": case.tree})
    compared = {}
    for stage in request["stages"]:
        plan = case.plan(run, stage)
        held, sent, own = bytes_per_rank(plan), bytes_sent_per_step(plan), [report[stage] for report in ranks]
        places = [layout_of(case.tree, case.ranks, rank).pipeline_rank for rank in range(case.ranks)]
        compared[stage] = {
            "held": [_beside(report["held"], held[place]) for report, place in zip(own, places, strict=True)],
            "sent": [_beside(report["sent"], sent[place]) for report, place in zip(own, places, strict=True)],
            "step_s": max(report["step_s"] for report in own),
        }
    return compared


def _beside(counted: dict[str, int], formula: Bytes) -> dict[str, dict[str, int]]:
    kinds = [kind for kind in {**formula, **counted} if kind != "total"]
    pairs = {kind: {"counted": counted.get(kind, 0), "formula": formula.get(kind, 0)} for kind in kinds}
    return {kind: pair for kind, pair in pairs.items() if any(pair.values())}


STATISTICS = 4096
"""Bytes of norms, losses and counts that a step may send on top; broadcasts and small sums."""


def misses(ranks: Iterable[dict[str, dict[str, int]]], aside: int = 0) -> list[str]:
    """The kinds whose formula is further from the count than TOLERANCE, with its error. Args: aside: bytes not in a formula."""
    return [
        f"{kind} {pair['formula'] / max(pair['counted'], 1) - 1:+.1%}"
        for kinds in ranks
        for kind, pair in kinds.items()
        if abs(pair["formula"] - pair["counted"]) > max(aside, TOLERANCE * pair["counted"])
    ]


def launch(script: Path, world: int, request: dict[str, Any]) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", f"benchmarks.{script.stem}", json.dumps(request)]
    ranks = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"a rank of {world} failed")
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]


def table(stage: str, results: Sequence[dict[str, Any]]) -> str:
    """The fullest rank of every layout: held in all without buffers, activations, sent, the largest errors, step time."""
    lines = [
        f"| {stage} | held, KiB | of it activations | sent, KiB | largest error held | sent | step / one rank's |",
        "|---|" + "---|" * 6,
    ]
    for result in results:
        own = result["stages"][stage]
        held = max(_counted(kinds, but="buffers") for kinds in own["held"])
        sent = max(_counted(kinds) for kinds in own["sent"])
        active = max(kinds["activations"]["counted"] for kinds in own["held"])
        errors = f"{_largest_error(own['held'], 0):.1%} | {_largest_error(own['sent'], STATISTICS):.1%}"
        sizes = f"{held / 1024:,.0f} | {active / 1024:,.0f} | {sent / 1024:,.0f}"
        lines.append(f"| {result['layout']} | {sizes} | {errors} | {own['relative']:.2f} |")
    return "\n".join(lines)


def _counted(kinds: dict[str, dict[str, int]], but: str = "") -> int:
    return sum(pair["counted"] for kind, pair in kinds.items() if kind != but)


def _largest_error(ranks: Iterable[dict[str, dict[str, int]]], aside: int) -> float:
    errors = [
        abs(pair["formula"] - pair["counted"]) / max(pair["counted"], 1)
        for kinds in ranks
        for pair in kinds.values()
        if abs(pair["formula"] - pair["counted"]) > aside
    ]
    return max(errors, default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/layouts.json"))
    parser.add_argument("--run", default="tests/tiny.yaml")
    parser.add_argument("--stages", default="second,third", help="of the run; by default joint frozen, and everything trained")
    parser.add_argument("--steps", type=int, default=7, help="of each stage; all but two are timed")
    parser.add_argument("overrides", nargs="*", default=OVERRIDES)
    arguments = parser.parse_args()
    run, stages = load_run(arguments.run, arguments.overrides), arguments.stages.split(",")
    request = {"run": arguments.run, "overrides": arguments.overrides, "stages": stages, "steps": arguments.steps}
    results: list[dict[str, Any]] = []
    for case in (ONE, *CASES):
        compared = compare(case, run, request, launch)
        first = results[0]["stages"] if results else compared
        for stage, own in compared.items():
            own["relative"] = own["step_s"] / first[stage]["step_s"]
            faults = [*misses(own["held"]), *misses(own["sent"], STATISTICS)]
            print(f"{case.name}, {stage}: {', '.join(faults) or 'all within 5 %'}", flush=True)
        results.append({"layout": case.name, "ranks": case.ranks, "stages": compared})
    for stage in stages:
        print(f"\n{table(stage, results)}")
    record = {"machine": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0)), **request}
    arguments.json.write_text(json.dumps({**record, "layouts": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
