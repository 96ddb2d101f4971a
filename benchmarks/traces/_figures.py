"""The picture: accuracy against time."""

import functools
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks.lab._style import COLORS, MARKERS, logarithmic, save_all
from benchmarks.traces._summary import is_peer


def draw_work(folder: Path, name: str, summary: dict[str, Any]) -> None:
    """Draws accuracy against time."""
    save_all(folder, {name: functools.partial(_work, summary["models"])})


def _axes(count: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    columns = min(2, count)
    rows = math.ceil(count / columns)
    size = (max(8.0, width * columns), height * rows)  # the legend needs room
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for spare in axes.flat[count:]:
        spare.axis("off")
    return figure, list(axes.flat[:count])


def _work(models: dict[str, Any]) -> Figure:
    """One point a contender: time of an estimate, its error, and lines of equal work."""
    figure, panels = _axes(len(models), 5.4, 4.4)
    labels = sorted({k for m in models.values() for k, v in m["contenders"].items() if "sd" in v})
    ours = [label for label in labels if not is_peer(label)]
    looks = {}
    for i, label in enumerate([*ours, *(k for k in labels if is_peer(k))]):
        filled = label in ours
        color = COLORS[i % len(COLORS)]
        looks[label] = {
            "marker": MARKERS[(i + i // len(COLORS)) % len(MARKERS)],
            "color": color,
            "linestyle": "none",
            "markersize": 8,
            "markerfacecolor": color if filled else "none",
        }
    for axes, model in zip(panels, models.values(), strict=True):
        for label in looks:
            found = model["contenders"].get(label, {})
            if "sd" in found:
                x, y = found["gradients"].median, float(np.median(found["sd"]))
                if y > 0:
                    axes.plot(x, y, label=label, **looks[label])
                else:
                    axes.axvline(x, label=f"{label}: exact", color=looks[label]["color"])
        logarithmic(axes, "xy")
        axes.set_title(model["title"].split(",")[0])
        axes.set(xlabel="time of an estimate, gradients", ylabel="sd / trace, median layer")
        _equal_work(axes)
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.suptitle(
        "Accuracy and time of an estimate (filled: lama_optax; dotted: equal time x variance)",
        fontsize=11,
    )
    return figure


def _equal_work(axes: Any) -> None:
    """Along a dotted line a point is as good as any other: twice the time, half the variance."""
    x_limits, y_limits = axes.get_xlim(), axes.get_ylim()
    x = np.asarray(x_limits)
    works = np.log10([x_limits[0] * y_limits[0] ** 2, x_limits[1] * y_limits[1] ** 2])
    for power in range(math.floor(works[0]), math.ceil(works[1]) + 1):
        axes.plot(x, np.sqrt(10.0**power / x), color="gray", linestyle=":", linewidth=0.8)
    axes.set(xlim=x_limits, ylim=y_limits)
