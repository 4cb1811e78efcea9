"""A run, or several beside each other, as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from megadiff.report.charts import Line, chart
from megadiff.report.records import GRADIENT, RATE, SPEED, HeldOutCurve, RunRecord, StageRecord

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #18181b; max-width: 1500px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #e4e4e7; }
h3 { font-size: 1em; margin: 1.2em 0 0.3em; } .note { color: #71717a; }
.charts { display: flex; flex-wrap: wrap; gap: 12px; } .charts svg { width: 440px; height: auto; }
.strip { display: flex; gap: 12px; overflow-x: auto; } .strip figure { margin: 0; }
.strip img { max-width: 345px; } figcaption { color: #71717a; }
.beside { display: flex; gap: 24px; align-items: flex-start; overflow-x: auto; } .beside td { white-space: nowrap; }
table { border-collapse: collapse; } th, td { text-align: left; padding: 2px 14px 2px 0; vertical-align: top; }
th { border-bottom: 1px solid #e4e4e7; } pre { background: #fafafa; padding: 1em; overflow-x: auto; }
"""
Rows = Sequence[Sequence[str]]


def page(
    runs: Sequence[RunRecord], tables: Sequence[tuple[str, Rows]], listings: Sequence[tuple[str, Sequence[str]]] = ()
) -> str:
    """The page.

    Args:
        runs: the first is reported on, the others' curves are drawn beside its own.
        tables: titles and rows, the first of which is the head.
        listings: titles and lines of text.
    """
    run = runs[0]
    title = f"{run.title}, beside {', '.join(other.title for other in runs[1:])}" if len(runs) > 1 else run.title
    parts = _head(title, str(run.folder))
    for stage in run.stages:
        beside = [next((one for one in other.stages if one.name == stage.name), None) for other in runs[1:]]
        lines = _beside(stage, beside, runs) if len(runs) > 1 else _alone(stage)
        parts.append(f"<h2>Stage {_text(stage.name)}</h2>")
        charts = [chart(name, each, salt=f"{stage.name}/{name}") for name, each in lines if each]
        parts.append(f'<div class="charts">{"".join(charts)}</div>')
        parts += _evolution(stage)
    if run.sheet is not None:
        parts += ["<h2>Samples at the end</h2>", _image(run.sheet)]
    for name, rows in tables:
        parts += [f"<h2>{_text(name)}</h2>", _table(rows)]
    parts += ["<h2>Incidents</h2>", _table([("time", "stage", "step", "what"), *_incidents(run)])]
    for name, shown in listings:
        parts += [f"<h2>{_text(name)}</h2>", f"<pre>{_text(chr(10).join(shown))}</pre>"]
    return _document(title, parts)


@dataclass(frozen=True)
class Section:
    """A part of a page: text, a table (its first row is the head), and a picture beside it."""

    title: str
    note: str
    table: Rows
    picture: Path | None = None


def sections_page(title: str, note: str, sections: Sequence[Section]) -> str:
    """A page of sections."""
    parts = _head(title, note)
    for section in sections:
        parts += [f"<h2>{_text(section.title)}</h2>", f'<p class="note">{_text(section.note)}</p>']
        table = _table(section.table)
        parts.append(f'<div class="beside">{table}{_image(section.picture)}</div>' if section.picture else table)
    return _document(title, parts)


def _head(title: str, note: str) -> list[str]:
    return [f"<h1>{_text(title)}</h1>", f'<p class="note">{_text(note)}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC</p>']


def _document(title: str, parts: Sequence[str]) -> str:
    head = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title><style>{STYLE}</style></head>'
    )
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def _alone(stage: StageRecord) -> Iterator[tuple[str, list[Line]]]:
    """Charts of one run: each with the curves that belong together."""
    losses = [name for name in stage.training if name.startswith("loss/")]
    yield "training loss", [Line(stage.training[name], place, _last(name), smoothed=True) for place, name in enumerate(losses)]
    for target in dict.fromkeys(_last(name) for name in losses):
        bound = stage.training.get(f"NELBO/{target}")
        bounds = [Line(bound, 0, "training", smoothed=True)] if bound else []
        bounds += [
            Line(curve.series, 1, f"held out, others {_given(curve)}", dashed=not curve.given)
            for curve in _shown(stage, target)
            if curve.time is None
        ]
        yield f"{target}, bound in nats per token", bounds
        curves = [curve for curve in _shown(stage, target) if curve.time is not None]
        times = sorted({curve.time for curve in curves if curve.time is not None})
        yield (
            f"{target} held out, by time; dashed: others absent",
            [
                Line(curve.series, times.index(curve.time), f"t {curve.time:g}" if curve.given else "", dashed=not curve.given)
                for curve in curves
                if curve.time is not None
            ],
        )
    for name in (GRADIENT, SPEED, RATE):
        yield name, [Line(stage.training[name], 0, smoothed=name != RATE)] if name in stage.training else []


def _beside(
    stage: StageRecord, others: Sequence[StageRecord | None], runs: Sequence[RunRecord]
) -> Iterator[tuple[str, list[Line]]]:
    """Charts of several runs: each with one curve of every run."""
    stages = [(place, one) for place, one in enumerate([stage, *others]) if one is not None]
    for name in stage.training:
        lines = [(place, one.training[name]) for place, one in stages if name in one.training]
        yield name, [Line(series, place, runs[place].title, smoothed=name != RATE) for place, series in lines]
    for target in dict.fromkeys(curve.target for curve in stage.held_out):
        for time in dict.fromkeys(curve.time for curve in _shown(stage, target)):
            what = "bound in nats per token" if time is None else f"loss at t {time:g}"
            yield (
                f"{target} held out, {what}; dashed: others absent",
                [
                    Line(curve.series, place, runs[place].title if curve.given else "", dashed=not curve.given)
                    for place, one in stages
                    for curve in _shown(one, target)
                    if curve.time == time
                ],
            )


def _shown(stage: StageRecord, target: str) -> list[HeldOutCurve]:
    """The held-out curves of a modality, of the averaged weights if they were measured."""
    curves = [curve for curve in stage.held_out if curve.target == target]
    kinds = {curve.weights for curve in curves}
    return [curve for curve in curves if curve.weights == ("ema" if "ema" in kinds else "raw")]


def _evolution(stage: StageRecord) -> Iterator[str]:
    """What was drawn while training, from left to right."""
    for tag, drawn in stage.pictures.items():
        figures = [f"<figure>{_image(path)}<figcaption>step {step}</figcaption></figure>" for step, path in drawn]
        yield f'<h3>{_text(tag.replace("-", ": ", 1))}</h3><div class="strip">{"".join(figures)}</div>'


def _incidents(run: RunRecord) -> Iterator[tuple[str, ...]]:
    for one in run.incidents:
        time = f"{datetime.fromtimestamp(one.time, UTC):%Y-%m-%d %H:%M:%S}"
        yield time, one.stage, str(one.step), f"{one.kind.value} {one.detail}"


def _given(curve: HeldOutCurve) -> str:
    return "given" if curve.given else "absent"


def _last(name: str) -> str:
    return name.split("/", 1)[-1]


def _text(text: str) -> str:
    return html.escape(text, quote=False)


def _image(path: Path) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def _table(rows: Rows) -> str:
    head, *body = (list(map(_text, row)) for row in rows)
    lines = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body]
    return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{''.join(lines)}</table>"
