"""What a run's folder tells of its training."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from megadiff.config.errors import UserError
from megadiff.config.load import dump_run
from megadiff.config.run_folder import Incident, IncidentKind, StageFolder
from megadiff.config.schema import Run

LOSS, GRADIENT, RATE, SPEED = "loss", "gradient norm", "learning rate", "samples per s"
_HELD_OUT = re.compile(r"held-out (?P<target>[^/]+)/(?:t (?P<time>[\d.]+)|NELBO) (?P<given>given|absent) (?P<weights>\w+)")
_PICTURE = re.compile(r"(?P<tag>.+)-(?P<step>\d{8,})\.png")


@dataclass(frozen=True)
class Series:
    """Numbers by step, in order; steps without a finite number are left out."""

    steps: Sequence[int]
    values: Sequence[float]

    @property
    def end(self) -> float:
        """The mean of the last tenth."""
        last = self.values[-max(1, len(self.values) // 10) :]
        return sum(last) / len(last)

    def at(self, steps: Sequence[int]) -> Series:
        """The numbers of some of its steps."""
        values = dict(zip(self.steps, self.values, strict=True))
        return Series(steps, [values[step] for step in steps])

    def windows(self, every: int) -> Series:
        """Means over so many steps, at the last of them; without the window whose end the series does not reach."""
        found: dict[int, list[float]] = defaultdict(list)
        for step, value in zip(self.steps, self.values, strict=True):
            found[-(-step // every) * every].append(value)
        ends = [end for end in found if end <= self.steps[-1]]
        return Series(ends, [sum(found[end]) / len(found[end]) for end in ends])

    def smoothed(self, points: int = 200) -> Series:
        """Means of neighbours, at most so many."""
        size = -(-len(self.steps) // points)
        parts = [slice(start, start + size) for start in range(0, len(self.steps), size)]
        return Series(
            [self.steps[part][-1] for part in parts], [sum(self.values[part]) / len(self.values[part]) for part in parts]
        )


@dataclass(frozen=True)
class HeldOutCurve:
    """A held-out loss over training; `time` None: the likelihood bound."""

    target: str
    time: float | None
    given: bool
    weights: str
    series: Series


@dataclass(frozen=True)
class StageRecord:
    """A stage's records.

    Attributes:
        training: by name: LOSS, `loss/MODALITY`, `NELBO/MODALITY`, GRADIENT, RATE, SPEED.
        pictures: by tag, what was drawn while training, with its step.
        every: steps over which each number of `training` is a mean.
        noise: by a curve's name (`comparison.curves`), how far reruns are from it: relative, and never falling.
    """

    name: str
    training: Mapping[str, Series]
    held_out: Sequence[HeldOutCurve]
    pictures: Mapping[str, Sequence[tuple[int, Path]]]
    every: int = 1
    noise: Mapping[str, Series] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """A run's records. `configuration` is the resolved one, `title` tells the run from others that are shown with it."""

    title: str
    folder: Path
    configuration: Sequence[str]
    stages: Sequence[StageRecord]
    incidents: Sequence[Incident]
    sheet: Path | None

    def stage(self, name: str) -> StageRecord | None:
        """The stage of that name; None if it has not begun."""
        return next((stage for stage in self.stages if stage.name == name), None)


def read_run(run: Run, title: str) -> RunRecord:
    """Read a run's folder; a stage that has not begun is left out.

    Raises:
        UserError: a record is damaged.
    """
    paths = run.paths
    stages = [_stage(paths.stage(stage.name)) for stage in run.stages if paths.stage(stage.name).metrics.exists()]
    incidents = [Incident(**{**row, "kind": IncidentKind(row["kind"])}) for row in json_lines(paths.incidents)]
    sheet = paths.samples if paths.samples.exists() else None
    return RunRecord(title, paths.root, dump_run(run).splitlines(), stages, incidents, sheet)


def _stage(paths: StageFolder) -> StageRecord:
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)

    def add(name: str, step: int, value: float | None) -> None:
        if value is not None and math.isfinite(value):
            found[name].append((step, value))

    rows = list(json_lines(paths.metrics))
    for row in rows:
        step = row["step"]
        for name, key in ((LOSS, "loss"), (GRADIENT, "grad_norm"), (RATE, "learning_rate")):
            add(name, step, row[key])
        for key, group in (("losses", "loss"), ("nelbo", "NELBO")):
            for name, value in row.get(key, {}).items():
                add(f"{group}/{name}", step, value)
    for before, row in pairwise(rows):
        seconds = row["time"] - before["time"]
        if row["step"] == before["step"] + 1 and seconds > 0:  # no restart between them
            add(SPEED, row["step"], row["samples"] / seconds)
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in json_lines(paths.results):
        if row["value"] is not None:
            curves[row["name"]].append((row["step"], row["value"]))
    held_out = []
    for name, points in curves.items():
        if (curve := held_out_curve(name, _series(points))) is not None:
            held_out.append(curve)
    training = {name: _series(points) for name, points in found.items()}
    return StageRecord(paths.name, training, held_out, _pictures(paths.pictures))


def held_out_curve(name: str, series: Series) -> HeldOutCurve | None:
    """The held-out curve of a figure; None if the figure is another."""
    match = _HELD_OUT.fullmatch(name)
    if match is None:
        return None
    time = float(match["time"]) if match["time"] else None
    return HeldOutCurve(match["target"], time, match["given"] == "given", match["weights"], series)


def _series(points: Sequence[tuple[int, float]]) -> Series:
    return Series([step for step, _ in points], [value for _, value in points])


def _pictures(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    drawn = defaultdict(list)
    for path in sorted(folder.glob("*.png")):
        if match := _PICTURE.fullmatch(path.name):
            drawn[match["tag"]].append((int(match["step"]), path))
    return dict(drawn)


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of JSON lines; none if it is not there.

    Raises:
        UserError: a line is damaged.
    """
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is damaged ({error}); delete that line") from None
        yield row
