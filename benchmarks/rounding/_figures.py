"""One picture: the rise in loss of each way to choose bits, over that of one width for all."""

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
LEAST, MOST = 0.05, 20.0


def draw_all(folder: Path) -> None:
    """Draws the picture from ``results.json`` in the folder, into the folder."""
    models = json.loads((folder / "results.json").read_text())["models"]
    save_all(folder, {"rises.png": lambda: _rises(models)})


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
                over = [_over_uniform(training, budget, way) for training in trainings]
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
        f"Bits chosen by curvature cost {', '.join(ours)} of uniform bits' rise (median network)",
        fontsize=11,
    )
    return figure


def _over_uniform(training: dict[str, Any], budget: str, way: str) -> float:
    rises = training["choices"][budget]["rises"]
    return float(rises[way] / rises["uniform"])


def _mark(axes: Axes, value: float, y: float, way: str, **look: Any) -> None:
    """What lies outside, or is not finite, is an arrow at that edge."""
    marker, color = WAYS[way]
    if not LEAST <= value <= MOST:
        marker = "<" if value < LEAST else ">"
        value = LEAST if value < LEAST else MOST
    axes.plot(value, y, marker, color=color, markeredgewidth=0, **look)
