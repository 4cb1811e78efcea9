"""Charts of numbers over training, as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from megadiff.report.records import Series

SIZE_INCHES = (4.6, 2.9)
MARKED = 30
"""Points of a line that are few enough to show each."""
_BEGINNING = "<svg"


@dataclass(frozen=True)
class Line:
    """A line of a chart; lines of one `color` belong together.

    Attributes:
        smoothed: its own points are faint behind means of neighbours.
        label: in the legend; empty: not there.
    """

    series: Series
    color: int
    label: str = ""
    dashed: bool = False
    smoothed: bool = False


def chart(title: str, lines: Sequence[Line], *, salt: str) -> str:
    """An SVG element. The scale is logarithmic where all numbers are above 0 and spread over a factor of 20.

    Args:
        salt: of the element's ids, which differ from those of other charts in a page.
    """
    # Imported here: it takes a second.
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 8}):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for line in lines:
            color, style = f"C{line.color % 10}", "--" if line.dashed else "-"
            shown = line.series.smoothed() if line.smoothed else line.series
            if line.smoothed and len(shown.steps) < len(line.series.steps):
                faint = line.series.smoothed(1000)
                axes.plot(faint.steps, faint.values, color=color, linewidth=0.5, alpha=0.3)
            marker = "." if len(shown.steps) <= MARKED else ""
            axes.plot(
                shown.steps, shown.values, color=color, linestyle=style, marker=marker, linewidth=1.2, label=line.label or "_"
            )
        values = [value for line in lines for value in line.series.values]
        if values and min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if any(line.label for line in lines):
            axes.legend(fontsize=7)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index(_BEGINNING) :]
