"""Where the curves of two runs part, and how far apart they end."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megadiff.report.records import RATE, SPEED, RunRecord, Series, StageRecord


@dataclass(frozen=True)
class Difference:
    """A curve of one run beside the same of another.

    Attributes:
        steps: that both have.
        ends: of both (Series.end), over the steps that both have if there are any; None for a run without the curve.
        parts_at: the first step at which they differ by more than the tolerance; None if there is none.
        largest: relative difference at any step.
    """

    stage: str
    curve: str
    steps: int
    ends: tuple[float | None, float | None]
    parts_at: int | None
    largest: float


def differences(one: RunRecord, other: RunRecord, tolerance: float) -> Iterator[Difference]:
    """Every curve of losses and gradient norms of two runs, and those that were measured on held-out data.

    Args:
        tolerance: relative.
    """
    theirs = {stage.name: stage for stage in other.stages}
    for stage in one.stages:
        if stage.name in theirs:
            own, others = _curves(stage), _curves(theirs[stage.name])
            for name in dict.fromkeys([*own, *others]):
                yield _difference(stage.name, name, own.get(name), others.get(name), tolerance)


def configuration_difference(one: RunRecord, other: RunRecord) -> list[str]:
    """The lines in which two resolved configurations differ, as `diff -u` shows them, without its head."""
    return list(difflib.unified_diff(one.configuration, other.configuration, n=2, lineterm=""))[2:]


def _curves(stage: StageRecord) -> dict[str, Series]:
    curves = {name: series for name, series in stage.training.items() if name not in (RATE, SPEED)}
    for curve in stage.held_out:
        what = "NELBO" if curve.time is None else f"t {curve.time:.3f}"
        condition = "given" if curve.given else "absent"
        curves[f"held-out {curve.target}/{what} {condition} {curve.weights}"] = curve.series
    return curves


def _difference(stage: str, name: str, own: Series | None, other: Series | None, tolerance: float) -> Difference:
    common = sorted({*own.steps} & {*other.steps}) if own and other else []
    if own is None or other is None or not common:
        return Difference(stage, name, 0, (own.end if own else None, other.end if other else None), None, 0.0)
    one, two = own.at(common), other.at(common)
    pairs = zip(one.values, two.values, strict=True)
    relative = [abs(value - theirs) / max(abs(value), abs(theirs), 1e-30) for value, theirs in pairs]
    parts_at = next((step for step, far in zip(common, relative, strict=True) if far > tolerance), None)
    return Difference(stage, name, len(common), (one.end, two.end), parts_at, max(relative))


def table(found: Sequence[Difference], titles: tuple[str, str]) -> list[tuple[str, ...]]:
    """Rows of text with a head."""
    rows: list[tuple[str, ...]] = [("stage", "curve", *titles, "parts at step", "largest difference")]
    for one in found:
        ends = tuple("-" if end is None else f"{end:.5g}" for end in one.ends)
        parts = "no common step" if not one.steps else "-" if one.parts_at is None else str(one.parts_at)
        rows.append((one.stage, one.curve, *ends, parts, f"{100 * one.largest:.2g} %" if one.steps else ""))
    return rows
