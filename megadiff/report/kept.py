"""A run's curves in one small file, for later runs of its recipe to be compared with.

JSON lines: a head with the run's name and configuration, then a line per curve.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megadiff.config.errors import UserError
from megadiff.report.comparison import curves, relative
from megadiff.report.records import RunRecord, Series, StageRecord, held_out_curve, json_lines

FORMAT, VERSION = "megadiff-curves", 1
ENDING = ".jsonl"
MOST_POINTS = 100
"""Numbers that are kept of a training curve, at most; each is the mean over as many steps."""


def kept_curves(run: RunRecord, reruns: Sequence[RunRecord]) -> str:
    """The text of a file of a run's curves, and of how far its reruns are from them: the noise of later ones."""
    recipe = [line for line in run.configuration if not line.startswith("folder: ")]
    lines: list[dict[str, Any]] = [{"format": FORMAT, "version": VERSION, "configuration": recipe}]
    lines += [line for stage in run.stages for line in _lines(stage, [other.stage(stage.name) for other in reruns])]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _lines(stage: StageRecord, reruns: Sequence[StageRecord | None]) -> Iterator[dict[str, Any]]:
    every = -(-max(series.steps[-1] for series in stage.training.values()) // MOST_POINTS)
    others = [curves(other, every) for other in reruns if other is not None]
    for name, series in curves(stage, every).items():
        noise = _noise(series, [each[name] for each in others if name in each])
        line: dict[str, Any] = {"stage": stage.name, "every": every, "curve": name, "steps": [*series.steps]}
        yield {**line, "values": _rounded(series.values, 5), "noise": _rounded(noise, 2)}


def _rounded(values: Sequence[float], digits: int) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]


def _noise(series: Series, reruns: Sequence[Series]) -> list[float]:
    """The largest relative difference of reruns at any step so far, by step; 0 without reruns."""
    far = dict.fromkeys(series.steps, 0.0)
    for other in reruns:
        common = sorted({*series.steps} & {*other.steps})
        for step, difference in zip(common, relative(series.at(common), other.at(common)), strict=True):
            far[step] = max(far[step], difference)
    so_far = 0.0
    return [so_far := max(so_far, far[step]) for step in series.steps]


def read_curves(path: Path) -> RunRecord:
    """The run that a file of `kept_curves` is of, titled by the file.

    Raises:
        UserError: the file is missing, damaged, or another.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        head, *lines = json_lines(path)
        if (head["format"], head["version"]) != (FORMAT, VERSION):
            raise UserError(f"{path} is a {head['format']} of version {head['version']}; this program reads {FORMAT} {VERSION}")
        by_stage: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in lines:
            by_stage[line["stage"]].append(line)
        stages = [_stage(name, own) for name, own in by_stage.items()]
        return RunRecord(str(path), path, head["configuration"], stages, (), None)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no kept curves ({type(error).__name__}: {error})") from None


def _stage(name: str, lines: Sequence[dict[str, Any]]) -> StageRecord:
    training, held_out, noise = {}, [], {}
    for line in lines:
        series = Series(line["steps"], line["values"])
        noise[line["curve"]] = Series(line["steps"], line["noise"])
        if (curve := held_out_curve(line["curve"], series)) is not None:
            held_out.append(curve)
        else:
            training[line["curve"]] = series
    return StageRecord(name, training, held_out, {}, lines[0]["every"], noise)
