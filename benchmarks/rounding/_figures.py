"""Two pictures: rises predicted and measured, and what each way to choose bits costs."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.lab._style import BLUE, GREEN, ORANGE, PURPLE, logarithmic, save_all

#: What is drawn, with marker and color; the tables have the rest.
WAYS = {
    "fisher, verified": ("o", BLUE),
    "greedy measurement": ("D", GREEN),
    "Adam's second moment": ("s", ORANGE),
    "weight error alone": ("^", PURPLE),
}
LEAST, MOST = 0.1, 10.0


def draw_all(folder: Path) -> None:
    """Draws both from ``results.json`` in the folder, into the folder."""
    models = json.loads((folder / "results.json").read_text())["models"]
    figures = {"prediction.png": lambda: _prediction(models), "rises.png": lambda: _rises(models)}
    save_all(folder, figures)


def _prediction(models: dict[str, Any]) -> Figure:
    """A panel a network, a point a random configuration; a color a training."""
    columns = min(3, len(models))
    rows = -(-len(models) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(max(6.0, 3.3 * columns), 3 * rows + 0.6), squeeze=False
    )
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, max(map(len, models.values()))))
    below = False
    for axes, (name, trainings) in zip(panels.flat, models.items(), strict=False):
        predicted = np.asarray([training["pairs"]["predicted"] for training in trainings], float)
        measured = np.asarray([training["pairs"]["measured"] for training in trainings], float)
        least = predicted.min() / 2
        for shade, x, y in zip(shades, predicted, measured, strict=False):
            seen = y > least
            axes.plot(x[seen], y[seen], "o", color=shade, markersize=3, alpha=0.6)
            axes.plot(x[~seen], np.full(np.sum(~seen), least), "v", color=shade, markersize=4)
            below |= bool(np.any(~seen))
        axes.plot(*[[predicted.min(), predicted.max()]] * 2, color="black", linewidth=1)
        logarithmic(axes, "xy")
        ranks = [training["prediction"]["fisher"]["rank"] for training in trainings]
        axes.set_title(f"{name}: rank correlation {np.median(ranks):.2f}", fontsize=10)
    for axes in list(panels.flat)[len(models) :]:
        axes.axis("off")
    figure.supxlabel(
        "rise in held-out loss, predicted from curvature; a color is a training"
        + ("; arrows: measured below the picture" if below else ""),
        fontsize=10,
    )
    figure.supylabel("measured", fontsize=10)
    figure.suptitle("Curvature predicts what rounding costs (line: predicted = measured)")
    return figure


def _rises(models: dict[str, Any]) -> Figure:
    """A row a network, a panel a budget: each training faint, their median strong."""
    budgets = list(next(iter(models.values()))[0]["choices"])
    figure, panels = plt.subplots(
        1,
        len(budgets),
        figsize=(4.6 * len(budgets), 0.75 * len(models) + 1.9),
        sharey=True,
        sharex=True,
        squeeze=False,
    )
    ours = []
    for axes, budget in zip(panels.flat, budgets, strict=True):
        medians = []
        for row, trainings in enumerate(models.values()):
            for i, way in enumerate(WAYS):
                over = _over_uniform(trainings, budget, way)
                if not over:  # the budget is below what it is offered
                    continue
                y = row + 0.18 * (i - (len(WAYS) - 1) / 2)
                for value in over:
                    _mark(axes, value, y, way, markersize=4, alpha=0.35)
                _mark(axes, float(np.median(over)), y, way, markersize=8)
                if way == "fisher, verified":
                    medians.append(float(np.median(over)))
        ours.append(f"{np.median(medians):.2f} at {budget} bits")
        axes.axvline(1, color="black", linewidth=1)
        logarithmic(axes, "x")
        axes.set(xlim=(LEAST / 1.3, MOST * 1.3), title=f"a mean of {budget} bits")
        axes.grid(visible=False, axis="y")
    panels.flat[0].set_yticks(range(len(models)), list(models))
    panels.flat[0].invert_yaxis()
    figure.supxlabel("rise in held-out loss over that of one width for all (line)", fontsize=10)
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="none", label=way)
        for way, (marker, color) in WAYS.items()
    ]
    figure.legend(handles=handles, loc="outside right center")
    figure.suptitle(
        f"Bits chosen by curvature leave {', '.join(ours)} of uniform bits' rise (median network)",
        fontsize=11,
    )
    return figure


def _over_uniform(trainings: list[Any], budget: str, way: str) -> list[float]:
    rises = [training["choices"][budget]["rises"] for training in trainings]
    return [float(found[way] / found["uniform"]) for found in rises if way in found]


def _mark(axes: Axes, value: float, y: float, way: str, **look: Any) -> None:
    """What lies outside, or is not finite, is an arrow at that edge."""
    marker, color = WAYS[way]
    if not LEAST <= value <= MOST:
        marker = "<" if value < LEAST else ">"
        value = LEAST if value < LEAST else MOST
    axes.plot(value, y, marker, color=color, markeredgewidth=0, **look)
