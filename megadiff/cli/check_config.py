"""`megadiff check-config`: checks a run and prints its derived numbers. Without torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megadiff.cli import layout_table
from megadiff.cli.arguments import Verbs, add_run, add_sizes, add_verb, deepspeed_tree, positive
from megadiff.config.alignment import check_local_manifests
from megadiff.config.deepspeed import resolve_run
from megadiff.config.errors import UserError
from megadiff.config.layout import Layout
from megadiff.config.layouts import layout_of
from megadiff.config.load import load_run
from megadiff.config.planning import plan_of
from megadiff.config.schema import Run
from megadiff.config.summary import layout_summary, summary
from megadiff.launcher.devices import find_devices, processes_for

EXAMPLES = """\
  megadiff check-config configs/run/quickstart.yaml
  megadiff check-config configs/run/quickstart.yaml --deepspeed ds_configs/zero3.json --ranks 2
  megadiff check-config configs/run/quickstart.yaml --deepspeed ds_configs/zero1.json --ranks 4 --pipeline-stages 2
  megadiff check-config configs/run/quickstart.yaml --picture quickstart.png
  megadiff check-config configs/run/quickstart.yaml --json stages.joint.steps=500
"""


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "check-config",
        "check a run and print the numbers that follow from it",
        "Check a run file, and a DeepSpeed JSON against it, and print what follows for each stage: parameters in all and\n"
        "per part, trained, idle (no loss reaches them: they stay as they are) and frozen, the batch equation, tokens and\n"
        "FLOPs per sample; with a DeepSpeed JSON also which rank has which layers, bytes per rank and bytes sent per step\n"
        "(both of the fullest rank), the share of a step that pipeline stages wait (bubble), and their balance.\n"
        "Reads no data (but a stage's `alignment` against the buckets of a manifest on this machine) and, but for\n"
        "--picture, imports no torch.",
        EXAMPLES,
    )
    add_run(parser)
    parser.add_argument("--deepspeed", metavar="DS.json", help="check this DeepSpeed JSON against every stage")
    add_sizes(parser)
    parser.add_argument("--ranks", metavar="N", type=positive, help="all ranks of the run (default: as launch)")
    parser.add_argument("--json", action="store_true", help="print the resolved configuration and the derived numbers as JSON")
    parser.add_argument(
        "--picture",
        metavar="FILE.png",
        help="draw each stage's distribution of times, noise schedule, learning rate and averages' spans (imports torch)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    loaded = load_run(arguments.run_file, arguments.overrides)
    check_local_manifests(loaded)
    devices = find_devices()
    layout = Layout(0, arguments.ranks or processes_for(loaded.launch, devices))
    resolved = None
    if arguments.deepspeed:
        tree = deepspeed_tree(arguments)
        layout = layout_of(tree, layout.world)
        resolved = resolve_run(tree, loaded, ranks=layout.world, accelerator=devices.accelerated)
    stages = [summary(loaded, stage, layout.data_ranks) for stage in loaded.stages]
    if resolved is not None:
        for stage, numbers in zip(loaded.stages, stages, strict=True):
            numbers["layout"] = layout_summary(plan_of(loaded, stage, layout, resolved[stage.name]))
    if arguments.json:
        report = {"run": loaded.model_dump(mode="json"), "deepspeed": resolved, "stages": stages}
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print(table(loaded, stages, layout))
    if arguments.picture:
        _draw(loaded, Path(arguments.picture))
    return 0


def _draw(loaded: Run, path: Path) -> None:
    """Raises UserError if the file cannot be written."""
    from megadiff.evaluation.configuration import picture
    from megadiff.report.sheet import png_bytes

    try:
        path.write_bytes(png_bytes(picture(loaded)))
    except OSError as error:
        raise UserError(f"--picture {path} cannot be written: {error.strerror}") from None


def table(loaded: Run, stages: list[dict[str, Any]], layout: Layout) -> str:
    """The report for people: one column per stage."""
    rows: list[tuple[str, list[str]]] = [
        ("stage", [s["stage"] for s in stages]),
        ("steps", [f"{s['batch']['steps']:,}" for s in stages]),
        ("samples", [f"{s['batch']['samples']:,}" for s in stages]),
        ("predicts", [", ".join(s["predicted"]) for s in stages]),
        ("starts from", [_source(stage.initialise.source, stage.initialise.weights) for stage in loaded.stages]),
        ("parameters", [_count(s["parameters"]["total"]) for s in stages]),
        ("  trained", [_count(s["parameters"]["trained"]) for s in stages]),
        ("  idle", [_count(s["parameters"]["idle"]) for s in stages]),
        ("  frozen", [_count(s["parameters"]["frozen"]) for s in stages]),
    ]
    for part in ("joint", *loaded.model.modalities):
        rows.append((f"  {part}", [_part(s["parameters"]["parts"].get(part)) for s in stages]))
    batch = [s["batch"] for s in stages]
    rows += [
        ("global batch", [f"{b['global_samples']:,}" for b in batch]),
        ("  = micro batch", [f"{b['micro_batch']:,}" for b in batch]),
        ("  x data ranks", [f"{b['data_ranks']:,}" for b in batch]),
        ("  x accumulation", [f"{b['accumulation']:,}" for b in batch]),
        ("lanes per rank", [f"{b['lanes_per_rank']:,}" for b in batch]),
        ("tokens per sample", [_tokens(s["tokens_per_sample"]) for s in stages]),
        ("FLOPs per sample", [_flops(s["flops_per_sample"]) for s in stages]),
        ("FLOPs per step", [_flops(s["flops_per_step"]) for s in stages]),
    ]
    title = f"run {loaded.name}, folder {loaded.folder}, seed {loaded.seed}, {layout.world} rank{'s' * (layout.world > 1)}"
    layouts = [(s["stage"], s["layout"]) for s in stages if "layout" in s]
    grid = [layout_table.grids(layouts)] if layouts else []
    rows += layout_table.rows([summary for _, summary in layouts]) if layouts else []
    return "\n\n".join([title, *grid, _columns(rows), "sound"])


def _columns(rows: list[tuple[str, list[str]]]) -> str:
    label = max(len(name) for name, _ in rows)
    widths = [max(len(cells[column]) for _, cells in rows) for column in range(len(rows[0][1]))]
    lines = []
    for name, cells in rows:
        values = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{name.ljust(label)}  {values}")
    return "\n".join(lines)


def _source(source: str | None, weights: str) -> str:
    if source is None:
        return "fresh"
    return f"{'stage before' if source == 'previous' else source} ({weights})"


def _count(value: int) -> str:
    return f"{value:,}"


def _part(part: dict[str, int] | None) -> str:
    if part is None:
        return "-"
    state = "" if part["trained"] else " (idle)" if part["idle"] else " (frozen)"
    return f"{part['total']:,}{state}"


def _tokens(tokens: dict[str, Any]) -> str:
    return f"{tokens['total']} ({' + '.join(str(count) for count in tokens['modalities'].values())})"


def _flops(value: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:,.2f} {unit}"
    return f"{value / 1e6:,.2f} M"
