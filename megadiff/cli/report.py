"""`megadiff report` and `megadiff compare`: what came of a run, for people to look at."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from megadiff.cli.arguments import Verbs, add_verb, launched_run
from megadiff.config.errors import UserError
from megadiff.config.run_folder import RunFolder
from megadiff.files import write_text
from megadiff.report import comparison
from megadiff.report.kept import ENDING, kept_curves, read_curves
from megadiff.report.page import page
from megadiff.report.records import RunRecord, read_run

if TYPE_CHECKING:
    from megadiff.types import Metric

EXAMPLES = """\
  megadiff report runs/quickstart
  megadiff report runs/quickstart --against runs/before --out report.html
"""
COMPARE_EXAMPLES = """\
  megadiff compare runs/quickstart runs/before
  megadiff compare runs/a runs/b runs/c --out comparison.html
  megadiff compare runs/quickstart runs/rerun --keep quickstart.jsonl
  megadiff compare runs/quickstart examples/curves/quickstart.jsonl
"""


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "report",
        "a run as one HTML page: curves, samples, figures, incidents",
        "Write a page that holds everything itself: the curves of each stage, what was drawn while training, the samples and\n"
        "figures of the end, and the run's incidents. Reads the run's folder alone, also while it trains.",
        EXAMPLES,
    )
    parser.add_argument("run_place", metavar="RUN", help="the run's folder, or its YAML file")
    parser.add_argument(
        "--against", metavar="RUN", nargs="+", default=[], help="runs whose curves and figures are shown beside"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="the page (default: report.html in the run's folder)")
    parser.set_defaults(run=run_report)

    parser = add_verb(
        verbs,
        "compare",
        "runs beside each other: curves, figures, configurations",
        "Print for every curve of the first run and each of the others how it ends, the first step at which they differ by\n"
        "more than the tolerance, and the largest difference; then the figures, and the differences of the configurations.\n"
        "CURVES.jsonl is what --keep wrote of an earlier run; the noise of its reruns is tolerated as well.",
        COMPARE_EXAMPLES,
    )
    parser.add_argument(
        "run_places", metavar="RUN", nargs="+", help="two or more folders of runs, their YAML files, or CURVES.jsonl"
    )
    parser.add_argument("--tolerance", metavar="SHARE", type=float, default=0.01, help="relative, 0.01 by default")
    parser.add_argument("--out", metavar="FILE", type=Path, help="also a page with the curves drawn over each other")
    parser.add_argument(
        "--keep",
        metavar="CURVES.jsonl",
        type=Path,
        help="keep the first run's curves, and how far the others, its reruns, are from them (their noise)",
    )
    parser.set_defaults(run=run_compare)


def run_report(arguments: argparse.Namespace) -> int:
    run = launched_run(arguments.run_place)
    out = arguments.out or run.paths.report
    _write(out, _records([arguments.run_place, *arguments.against]))
    print(f"report: {out}")
    return 0


def run_compare(arguments: argparse.Namespace) -> int:
    if len(arguments.run_places) < 2:
        raise UserError("compare needs two runs or more; `megadiff report RUN` shows one")
    if arguments.keep and arguments.keep.suffix != ENDING:
        raise UserError(f"--keep {arguments.keep} must end in {ENDING}")
    first, *others = records = _records(arguments.run_places)
    for other in others:
        found = list(comparison.differences(first, other, arguments.tolerance))
        _print(comparison.table(found, (first.title, other.title)))
        print(comparison.departures(found, (first.title, other.title)), end="\n\n")
    _print(figures(records))
    for other in others:
        lines = comparison.configuration_difference(first, other)
        print(f"configuration of {first.title} (-) and {other.title} (+)" + (":" if lines else ": the same"))
        print("\n".join(lines))
    if arguments.out:
        _write(arguments.out, records)
        print(f"page: {arguments.out}")
    if arguments.keep:
        _save(arguments.keep, kept_curves(first, others))
        print(f"curves: {arguments.keep}")
    return 0


def figures(records: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Rows of the runs' figures, with a head; those that do not compare with the first run's say why."""
    from megadiff.evaluation.results import differing, read_results  # torch is imported with it

    paths = [RunFolder(record.folder).results for record in records]
    results = [read_results(path) if path.exists() else {} for path in paths]
    rows: list[tuple[str, ...]] = [("figure", *(record.title for record in records), "")]
    for name in dict.fromkeys(name for each in results for name in each):
        of_runs = [each.get(name) for each in results]
        first, *others = of_runs
        # Other weights are what is compared.
        apart = {key for other in others if first and other for key in differing(first, other)} - {"weights"}
        note = f"do not compare: other {', '.join(sorted(apart))}" if apart else ""
        rows.append((name, *("-" if one is None else _figure(one) for one in of_runs), note))
    return rows


def _figure(metric: Metric) -> str:
    interval = "" if metric.low is None or metric.high is None else f" [{metric.low:.4g}, {metric.high:.4g}]"
    return f"{metric.value:.4g}{interval}"


def _records(places: Sequence[str]) -> list[RunRecord]:
    """Runs, titled by their names, and where two have one name, by their folders; and kept curves, by their files."""
    runs = {place: launched_run(place) for place in places if not place.endswith(ENDING)}
    names = [run.name for run in runs.values()]
    titles = {place: run.name if names.count(run.name) == 1 else run.folder for place, run in runs.items()}
    return [read_run(runs[place], titles[place]) if place in runs else read_curves(Path(place)) for place in places]


def _write(out: Path, records: Sequence[RunRecord]) -> None:
    tables = [("Figures", rows)] if len(rows := figures(records)) > 1 else []
    listings: list[tuple[str, Sequence[str]]] = [
        (f"Configuration, {records[0].title} (-) and {other.title} (+)", comparison.configuration_difference(records[0], other))
        for other in records[1:]
    ] or [("Configuration", records[0].configuration)]
    _save(out, page(records, tables, listings))


def _save(out: Path, text: str) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None


def _print(rows: Sequence[tuple[str, ...]]) -> None:
    if len(rows) < 2:
        return
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
