"""The pictures: accuracy against time, and errors along a training against their cost."""

import functools
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks.lab._style import COLORS, MARKERS, logarithmic, save_all
from benchmarks.traces._summary import is_peer


def draw_all(folder: Path, summary: dict[str, Any]) -> None:
    """Draws every picture into ``folder``."""
    models = summary["models"]
    figures = {"work.png": functools.partial(_work, models)}
    along = {name: model for name, model in models.items() if "along" in model}
    if along:
        figures["along.png"] = functools.partial(_along, along)
    save_all(folder, figures)


def draw_work(folder: Path, name: str, summary: dict[str, Any]) -> None:
    """Draws accuracy against time alone."""
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


def _along(models: dict[str, Any]) -> Figure:
    """One point a setting: what it adds to Adam's step, and the state's error."""
    figure, panels = _axes(len(models), 5.4, 4.2)
    for axes, model in zip(panels, models.values(), strict=True):
        rows = model["along"]["rows"]
        families: dict[tuple[str, str], list[Any]] = {}
        for label, row in rows.items():
            family, _, decay = label.split(", ")
            families.setdefault((family, decay), []).append(row)
        for i, ((family, decay), points) in enumerate(sorted(families.items())):
            x = [max(1e-3, row["over_adam"] - 1) for row in points]
            y = [row["median"] for row in points]
            look = {"color": COLORS[i // 3 % len(COLORS)], "marker": MARKERS[i % 3]}
            style = ("-", "--", ":")[i % 3]
            axes.plot(x, y, label=f"{family}, {decay}", linestyle=style, **look)
        axes.axhline(
            model["along"]["batch"]["median"], color="gray", linewidth=1, label="exact, one batch"
        )
        logarithmic(axes, "xy")
        axes.set_title(model["title"].split(",")[0])
        axes.set(xlabel="time added to Adam's step, Adam's steps", ylabel="relative error")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(
        "Error of state.curvature along a training, median layer; points: every 100, 10, 1 steps",
        fontsize=11,
    )
    return figure
