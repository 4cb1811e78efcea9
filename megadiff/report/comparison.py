"""Where the curves of two runs part, and how far apart they end."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megadiff.report.records import RATE, SPEED, RunRecord, Series, StageRecord

MOST_NAMED = 5
"""Curves that a sentence names."""
NOISE_FACTOR = 3.0
"""A rerun may be this many times as far from a kept run as the reruns were that its noise is known by: they were few."""


@dataclass(frozen=True)
class Difference:
    """A curve of one run beside the same of another.

    Attributes:
        steps: that both have.
        ends: of both (Series.end), over the steps that both have if there are any; None for a run without the curve.
        parts_at: the first step at which they differ by more than the tolerance, and by more than NOISE_FACTOR times the noise
            of reruns where that is known; None if there is none.
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

    A training curve of which one run has means over several steps is compared by these.

    Args:
        tolerance: relative.
    """
    for stage in one.stages:
        if (theirs := other.stage(stage.name)) is not None:
            every, noise = max(stage.every, theirs.every), {**stage.noise, **theirs.noise}
            own, others = curves(stage, every), curves(theirs, every)
            for name in dict.fromkeys([*own, *others]):
                yield _difference(stage.name, name, own.get(name), others.get(name), tolerance, noise.get(name))


def configuration_difference(one: RunRecord, other: RunRecord) -> list[str]:
    """The lines in which two resolved configurations differ, as `diff -u` shows them, without its head."""
    return list(difflib.unified_diff(one.configuration, other.configuration, n=2, lineterm=""))[2:]


def curves(stage: StageRecord, every: int) -> dict[str, Series]:
    """The curves that are compared, by name; those of training as means over `every` steps."""
    found = {name: series for name, series in stage.training.items() if name not in (RATE, SPEED)}
    if every != stage.every:
        found = {name: series.windows(every) for name, series in found.items()}
    for curve in stage.held_out:
        what = "NELBO" if curve.time is None else f"t {curve.time:.3f}"
        condition = "given" if curve.given else "absent"
        found[f"held-out {curve.target}/{what} {condition} {curve.weights}"] = curve.series
    return found


def relative(one: Series, other: Series) -> list[float]:
    """The relative differences of two series with the same steps."""
    pairs = zip(one.values, other.values, strict=True)
    return [abs(value - theirs) / max(abs(value), abs(theirs), 1e-30) for value, theirs in pairs]


def departures(found: Sequence[Difference], titles: tuple[str, str]) -> str:
    """A sentence about where the first run departs from the second."""
    apart = sorted((one for one in found if one.parts_at is not None), key=lambda one: one.parts_at or 0)
    if not apart:
        return f"{titles[0]} does not depart from {titles[1]} in any curve"
    named = ", ".join(f"{one.stage} {one.curve} from step {one.parts_at}" for one in apart[:MOST_NAMED])
    more = f" and {len(apart) - MOST_NAMED} more" if len(apart) > MOST_NAMED else ""
    return f"{titles[0]} departs from {titles[1]} in {len(apart)} of {len(found)} curves: {named}{more}"


def _difference(
    stage: str, name: str, own: Series | None, other: Series | None, tolerance: float, noise: Series | None
) -> Difference:
    common = sorted({*own.steps} & {*other.steps}) if own and other else []
    if own is None or other is None or not common:
        return Difference(stage, name, 0, (own.end if own else None, other.end if other else None), None, 0.0)
    one, two = own.at(common), other.at(common)
    apart, allowed = relative(one, two), [tolerance] * len(common)
    if noise is not None:
        allowed = [max(tolerance, NOISE_FACTOR * far) for far in noise.at(common).values]
    parts_at = next((step for step, far, most in zip(common, apart, allowed, strict=True) if far > most), None)
    return Difference(stage, name, len(common), (one.end, two.end), parts_at, max(apart))


def table(found: Sequence[Difference], titles: tuple[str, str]) -> list[tuple[str, ...]]:
    """Rows of text with a head."""
    rows: list[tuple[str, ...]] = [("stage", "curve", *titles, "parts at step", "largest difference")]
    for one in found:
        ends = tuple("-" if end is None else f"{end:.5g}" for end in one.ends)
        parts = "no common step" if not one.steps else "-" if one.parts_at is None else str(one.parts_at)
        rows.append((one.stage, one.curve, *ends, parts, f"{100 * one.largest:.2g} %" if one.steps else ""))
    return rows
