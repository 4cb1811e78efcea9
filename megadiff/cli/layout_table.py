"""A layout for people: which ranks have which layers, and rows of what they hold and send."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

WIDEST = 16
"""Replicas that are all shown."""

Row = tuple[str, list[str]]
"""A label, and a cell per stage of the run."""


def rows(stages: Sequence[dict[str, Any]]) -> list[Row]:
    """Rows about ZeRO, memory and traffic of each stage's `layout_summary`."""
    return [
        ("ZeRO stage", [str(stage["zero"]) for stage in stages]),
        ("precision", [stage["precision"] for stage in stages]),
        *_kinds("bytes per rank", [stage["bytes_per_rank"] for stage in stages]),
        *_kinds("bytes sent per step", [stage["bytes_sent_per_step"] for stage in stages]),
        ("bubble", [f"{stage['bubble']:.1%}" for stage in stages]),
        ("costliest stage / mean", [f"{stage['imbalance']:.2f}" for stage in stages]),
    ]


def grids(stages: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The ranks of a run's stages, of which those with the same cut share a grid: (name, `layout_summary`) each."""
    texts = [(_grid(summary), name) for name, summary in stages]
    shared = {text: [name for other, name in texts if other == text] for text, _ in texts}
    return "\n\n".join(text if len(shared) == 1 else f"{', '.join(names)}:\n{text}" for text, names in shared.items())


def _grid(summary: dict[str, Any]) -> str:
    """A row per pipeline stage, a column per replica; tensor ranks are joined by +."""
    header = ["replica", *_abbreviated([str(index) for index in range(summary["data"])])]
    lines = [header]
    for index, stage in enumerate(summary["pipeline_stages"]):
        cells = ["+".join(map(str, ranks)) for ranks in stage["ranks"]]
        lines.append([f"stage {index}: {', '.join(spans(stage['layers']))}", *_abbreviated(cells)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def spans(layers: Iterable[str]) -> list[str]:
    """Names of layers, numbered ones joined: "joint 0-3"."""
    found = []
    for name, group in groupby(layers, key=lambda layer: re.sub(r" \d+$", "", layer)):
        numbers = [layer.removeprefix(name).strip() for layer in group]
        found.append(" ".join([name, "-".join(dict.fromkeys((numbers[0], numbers[-1])))]).strip())
    return found


def _abbreviated(cells: list[str]) -> list[str]:
    return cells if len(cells) <= WIDEST else [*cells[: WIDEST - 2], "...", cells[-1]]


def _kinds(label: str, stages: Sequence[dict[str, int]]) -> list[Row]:
    """Totals, then a row per kind that is not zero in all stages."""
    kinds = [kind for kind in stages[0] if kind != "total" and any(stage[kind] for stage in stages)]
    return [
        (label, [size(stage["total"]) for stage in stages]),
        *((f"  {kind}", [size(stage[kind]) for stage in stages]) for kind in kinds),
    ]


def size(count: int) -> str:
    """Bytes in the largest unit below them."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count / 2**10:,.1f} KiB"
