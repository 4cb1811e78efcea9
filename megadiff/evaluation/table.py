"""How well a drawn table agrees with a real one: SDMetrics' error rates of columns and of pairs of columns.

Shape = 1 - KSComplement (numbers) or 1 - TVComplement (categories); trend =
1 - CorrelationSimilarity (two numbers) or 1 - ContingencySimilarity (else; numbers are cut into 10 bins).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megadiff.types import Metric

ColumnArrays = Mapping[str, NDArray[Any]]
"""Columns by name: float64 for numbers, text for categories; all of the same length."""

BINS = 10
_MOST_BARS = 15
"""A picture shows this many categories of a column, the most frequent ones."""


def columns_of(rows: Sequence[Mapping[str, Any]]) -> ColumnArrays:
    """Columns from rows."""
    return {name: _column([row[name] for row in rows]) for name in rows[0]}


def _column(values: list[Any]) -> NDArray[Any]:
    return np.asarray(values, dtype=str if isinstance(values[0], str) else np.float64)


def is_number(column: NDArray[Any]) -> bool:
    return column.dtype.kind == "f"


def shape_errors(real: ColumnArrays, drawn: ColumnArrays) -> dict[str, float]:
    """By column: the Kolmogorov-Smirnov statistic of numbers, the total variation distance of categories."""
    return {name: _ks(real[name], drawn[name]) if is_number(real[name]) else _tv(real[name], drawn[name]) for name in real}


def trend_errors(real: ColumnArrays, drawn: ColumnArrays) -> dict[tuple[str, str], float]:
    """By pair of columns: half the difference of the correlations of numbers, else the total variation of the contingency."""
    errors = {}
    for first, second in combinations(real, 2):
        if is_number(real[first]) and is_number(real[second]):
            correlations = [_correlation(table[first], table[second]) for table in (real, drawn)]
            errors[first, second] = abs(correlations[0] - correlations[1]) / 2
        else:
            categories = [_categories(real[name], drawn[name]) for name in (first, second)]
            pairs = [np.char.add(np.char.add(categories[0][side], "\x1f"), categories[1][side]) for side in range(2)]
            errors[first, second] = _tv(*pairs)
    return errors


def _ks(real: NDArray[Any], drawn: NDArray[Any]) -> float:
    points = np.concatenate([real, drawn])
    shares = [np.searchsorted(np.sort(side), points, side="right") / len(side) for side in (real, drawn)]
    return float(np.abs(shares[0] - shares[1]).max())


def _tv(real: NDArray[Any], drawn: NDArray[Any]) -> float:
    names = np.unique(np.concatenate([real, drawn]))
    shares = []
    for side in (real, drawn):
        present, counts = np.unique(side, return_counts=True)
        share = np.zeros(len(names))
        share[np.searchsorted(names, present)] = counts / len(side)
        shares.append(share)
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


def _correlation(first: NDArray[Any], second: NDArray[Any]) -> float:
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def _categories(real: NDArray[Any], drawn: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Categories as they are; numbers by bin, of equal width over the real range; the end bins take those beyond it."""
    if not is_number(real):
        return real, drawn
    inner = np.linspace(real.min(), real.max(), BINS + 1)[1:-1]
    return np.digitize(real, inner).astype(str), np.digitize(drawn, inner).astype(str)


@dataclass(frozen=True)
class TableReport:
    """Error rates of a drawn table, and of held-out real rows, which no model can be expected to beat (the floor)."""

    shape: dict[str, float]
    trend: dict[tuple[str, str], float]
    floor_shape: dict[str, float]
    floor_trend: dict[tuple[str, str], float]

    def metrics(self, depends: Mapping[str, Any]) -> list[Metric]:
        """The mean errors; `depends` says of which network and data."""
        return [
            Metric("mean shape error", _mean(self.shape), depends=depends),
            Metric("mean trend error", _mean(self.trend), depends=depends),
        ]

    def __str__(self) -> str:
        width = max(len(name) for name in (*self.shape, "mean shape error"))
        lines = [f"{'error rate, %'.ljust(width)}  drawn  held out"]
        rows = [(name, self.shape[name], self.floor_shape[name]) for name in self.shape]
        rows.append(("mean shape error", _mean(self.shape), _mean(self.floor_shape)))
        rows.append(("mean trend error", _mean(self.trend), _mean(self.floor_trend)))
        lines += [f"{name.ljust(width)}  {100 * drawn:5.2f}  {100 * floor:8.2f}" for name, drawn, floor in rows]
        return "\n".join(lines)


def _mean(errors: Mapping[Any, float]) -> float:
    return float(np.mean(list(errors.values()))) if errors else 0.0


def compare(real: ColumnArrays, drawn: ColumnArrays, held_out: ColumnArrays) -> TableReport:
    """The error rates of drawn rows against real ones, beside those of held-out rows."""
    return TableReport(
        shape_errors(real, drawn), trend_errors(real, drawn), shape_errors(real, held_out), trend_errors(real, held_out)
    )


def picture(real: ColumnArrays, drawn: ColumnArrays) -> Image.Image:
    """Every column's distribution in both tables, and the error of every pair."""
    # Without pyplot, which would change the backend of a notebook that calls this.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(real)
    columns = 4
    rows = -(-(len(names) + 1) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    shape, trend = shape_errors(real, drawn), trend_errors(real, drawn)
    for axis, name in zip(panels, names, strict=False):
        _panel(axis, real[name], drawn[name])
        axis.set_title(f"{name}: {100 * shape[name]:.2f} %", fontsize=10)
        axis.set_yticks([])
        axis.tick_params(labelsize=8)
    panels[0].legend(fontsize=8, frameon=False)
    matrix = np.zeros((len(names), len(names)))
    for (first, second), error in trend.items():
        matrix[names.index(first), names.index(second)] = matrix[names.index(second), names.index(first)] = 100 * error
    axis = panels[-1]  # in the last column, where the colour bar takes no other panel's room
    image = axis.imshow(matrix, cmap="magma_r", vmin=0)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_title(f"error of pairs, %: mean {100 * _mean(trend):.2f}", fontsize=10)
    figure.colorbar(image, ax=axis)
    for axis in panels[len(names) : -1]:
        axis.axis("off")
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")


def _panel(axis: Any, real: NDArray[Any], drawn: NDArray[Any]) -> None:
    colours = {"real": "#9ca3af", "drawn": "#dc2626"}
    if is_number(real):
        low, high = np.quantile(real, [0.001, 0.999])
        if low == high:
            low, high = (real.min(), real.max()) if real.min() < real.max() else (low - 0.5, low + 0.5)
        bins = np.linspace(low, high, 41)
        # The end bins take the values beyond them, as in the errors.
        sides = [(side.clip(low, high), np.full(len(side), 1 / len(side))) for side in (real, drawn)]
        axis.hist(sides[0][0], bins, weights=sides[0][1], color=colours["real"], label="real")
        style = {"histtype": "step", "color": colours["drawn"], "linewidth": 1.4, "label": "drawn"}
        axis.hist(sides[1][0], bins, weights=sides[1][1], **style)
        return
    names, counts = np.unique(np.concatenate([real, drawn]), return_counts=True)
    if len(names) > _MOST_BARS:
        names = names[np.sort(np.argsort(-counts, kind="stable")[:_MOST_BARS])]
        axis.set_xlabel(f"the {_MOST_BARS} most frequent of {len(counts)}", fontsize=8)
    places = np.arange(len(names))
    for offset, (label, side) in zip((-0.2, 0.2), (("real", real), ("drawn", drawn)), strict=True):
        axis.bar(places + offset, [np.mean(side == name) for name in names], 0.4, color=colours[label], label=label)
    axis.set_xticks(places, names, rotation=30, ha="right")
