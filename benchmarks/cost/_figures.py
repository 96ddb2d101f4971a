"""The pictures: steps beside Adam's, and how cost grows."""

import functools
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks.lab._style import BLUE, COLORS, MARKERS, VERMILLION, logarithmic, save_all

AXIS_NAMES = {
    "K": "number of probes K",
    "parameters": "parameters",
    "depth": "layers",
    "batch": "batch",
    "devices": "virtual devices",
}


def draw_all(folder: Path, summary: dict[str, Any]) -> None:
    """Draws every picture into ``folder``."""
    figures = {"steps.png": functools.partial(_steps, summary["models"])}
    for axis, lines in summary["growth"].items():
        figures[f"growth_{axis.lower()}.png"] = functools.partial(_growth, axis, lines)
    save_all(folder, figures)


def _steps(models: dict[str, Any]) -> Figure:
    """Each contender's step over Adam's, a dot on its range, one panel a model."""
    labels = list(
        dict.fromkeys(
            label
            for model in models.values()
            for group in model["steps"].values()
            for label in group
        )
    )
    height = 0.28 * len(labels) + 1.2
    figure, panels = plt.subplots(
        1,
        len(models),
        figsize=(max(6.0, 2.2 + 2.7 * len(models)), height),
        sharey=True,
        squeeze=False,
    )
    for axes, (name, model) in zip(panels.flat, models.items(), strict=True):
        for group in model["steps"].values():
            for label, found in group.items():
                ratio, y = found["over_adam"], -labels.index(label)
                color = VERMILLION if "LAMA" in label or "lama" in label else BLUE
                axes.plot([ratio.low, ratio.high], [y, y], color=color, alpha=0.5)
                axes.plot(ratio.median, y, "o", color=color)
        axes.axvline(1, color="gray", linewidth=1)
        logarithmic(axes, "x")
        axes.set(title=name, xlabel="step over optax.adam's")
    panels.flat[0].set_yticks([-i for i in range(len(labels))], labels)
    figure.suptitle("Training step with curvature, median and range of the rounds", fontsize=11)
    return figure


def _growth(axis: str, lines: dict[str, Any]) -> Figure:
    """Time over size in logarithms, with the slope of each line in the legend."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    for i, (label, line) in enumerate(lines.items()):
        milliseconds = 1e3 * np.asarray(line["seconds"])
        fitted = "" if line["slope"] is None else f", slope {line['slope']:.2f}"
        look: dict[str, Any] = {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
        }
        axes.plot(line["sizes"], milliseconds, label=label + fitted, **look)
    logarithmic(axes, "xy")
    axes.set(xlabel=AXIS_NAMES[axis], ylabel="milliseconds")
    axes.set_title(f"Time of an estimate against {AXIS_NAMES[axis]}")
    axes.legend(loc="upper left")
    return figure
