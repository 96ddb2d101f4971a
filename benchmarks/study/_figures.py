"""The pictures' common style, and the forest plot: arms against a base, by workload."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only, no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.scale import SymmetricalLogScale
from matplotlib.ticker import NullLocator

from benchmarks.study._statistics import MARGIN, Interval

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers differ as well.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#777777"
COLORS = (VERMILLION, BLUE, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "p", "h")
DASHES: Any = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), "-")

STYLE: Any = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}
ALL = "all workloads"
#: An axis longer than this, in per cent, is stretched around 0.
LONG = 20.0
LOSS_LABEL = "relative difference in held-out loss, %\n(left: lower; band: equivalent)"


class Series(NamedTuple):
    """Intervals of one arm, as fractions, by row of the plot."""

    label: str
    points: Mapping[str, Interval]
    look: int | None = None  # number of its colour and marker; by default, its place


def save(path: Path, draw: Callable[[], Figure | None]) -> bool:
    """Draws in the common style and saves; False if there was nothing to draw."""
    with plt.rc_context(STYLE):
        figure = draw()
        if figure is None:
            path.unlink(missing_ok=True)  # one of earlier results would mislead
            return False
        figure.savefig(path)
        plt.close(figure)
    return True


def look(index: int) -> dict[str, Any]:
    """Colour and marker of one series."""
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}


def forest(
    axes: Axes, rows: Sequence[str], series: Sequence[Series], *, spread: float = 0.76
) -> None:
    """Points with intervals, in per cent; what lies beyond the axis is an arrow at its edge."""
    low, high = _limits(series)
    axes.axvspan(-100 * MARGIN, 100 * MARGIN, color=GREY, alpha=0.15, linewidth=0)
    axes.axvline(0, color=GREY, linewidth=1)
    for i, one in enumerate(series):
        style = look(i if one.look is None else one.look)
        offset = spread * ((i + 0.5) / len(series) - 0.5)
        for y, row in enumerate(rows):
            point = one.points.get(row)
            if point is None or math.isnan(point.estimate):
                continue
            x, left, right = (100 * np.array(point)).clip(low, high)
            marker = ">" if 100 * point.estimate > high else style["marker"]
            marker = "<" if 100 * point.estimate < low else marker
            if not math.isnan(left + right):
                axes.plot([left, right], [y + offset] * 2, color=style["color"], linewidth=1.5)
            axes.plot(x, y + offset, marker, color=style["color"], markersize=5, clip_on=False)
        axes.plot([], [], style["marker"], color=style["color"], markersize=5, label=one.label)
    for y in range(1, len(rows)):
        axes.axhline(y - 0.5, color=GREY, linewidth=0.4, alpha=0.5)
    axes.set_yticks(range(len(rows)), [row.replace("_", " ") for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(low, high)
    stretch(axes, "x", low, high)
    axes.set_xlabel(LOSS_LABEL)
    axes.grid(visible=False, axis="y")


def stretch(axes: Axes, which: str, low: float, high: float) -> None:
    """Draws an axis of per cent, "x" or "y", if it is long, linear to 5, logarithmic beyond."""
    if high - low <= LONG:
        return
    axes.set(**{f"{which}scale": SymmetricalLogScale(None, linthresh=5, linscale=1.5)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    sizes = (2, 5, 10, 20, 50, 100, 200, 500, 1000)
    ticks = [t for t in (*(-s for s in reversed(sizes)), 0, *sizes) if low <= t <= high]
    axis.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
    axis.set_minor_locator(NullLocator())


def _limits(series: Sequence[Series], most: float = 250) -> tuple[float, float]:
    """Ends of the axis, per cent: all but the farthest ends of intervals, 2 to ``most`` apart."""
    ends = [100 * x for one in series for p in one.points.values() for x in p if math.isfinite(x)]
    if not ends:
        return -2, 2
    low, high = np.percentile(ends, [4, 96])
    return float(np.clip(1.1 * low, -most, -2)), float(np.clip(1.1 * high, 2, most))


def panels(
    by_title: Mapping[str, Sequence[Series]],
    workloads: Sequence[str],
    title: str,
    *,
    row_height: float = 0.5,
    columns: int = 1,
) -> Figure | None:
    """Forest plots side by side, one a title, with a legend under each."""
    by_title = {name: series for name, series in by_title.items() if any(s.points for s in series)}
    if not by_title:
        return None
    present = {row for series in by_title.values() for one in series for row in one.points}
    rows = [row for row in (ALL, *workloads) if row in present]
    lines = max(-(-len(series) // columns) for series in by_title.values())
    height = 1.6 + 0.22 * lines + row_height * max(len(rows), 2)
    figure, axes = plt.subplots(
        1, len(by_title), figsize=(max(5.3 * len(by_title), 7), height), sharey=True, squeeze=False
    )
    for ax, (name, series) in zip(axes[0], by_title.items(), strict=True):
        forest(ax, rows, series)
        ax.set_title(name)
        # Below the axis label, whose height the padding is, in units of the font size.
        ax.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            borderaxespad=5.5,
            ncols=columns,
            fontsize=9,
        )
    figure.suptitle(f"{title} (arrow: beyond the axis)", fontsize=11)
    return figure


def small_multiples(count: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    """A figure of ``count`` panels, three a row, each ``height`` inches high."""
    columns = columns_of(count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(4.2 * columns, 6), height * rows + 0.9), squeeze=False
    )
    flat = axes.ravel()
    for ax in flat[count:]:
        ax.set_axis_off()
    return figure, list(flat)


def columns_of(count: int) -> int:
    """Panels a row."""
    return min(count, 3)


def spaced(workload: str) -> str:
    """A workload's name for a reader."""
    return workload.replace("_", " ")


def name_axes(axes: Sequence[Axes], count: int, x: str, y: str) -> None:
    """Labels at the left and below the lowest panels only."""
    columns = columns_of(count)
    for i, ax in enumerate(axes[:count]):
        if i + columns >= count:
            ax.set_xlabel(x)
        if i % columns == 0:
            ax.set_ylabel(y)


def legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels."""
    handles: dict[str, Any] = {}
    for ax in axes:
        handles |= {name: h for h, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=6, fontsize=9
    )
