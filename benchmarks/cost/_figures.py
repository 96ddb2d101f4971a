"""The picture: steps beside Adam's."""

import functools
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.lab._style import BLUE, VERMILLION, logarithmic, save_all


def draw_all(folder: Path, summary: dict[str, Any]) -> None:
    """Draws it into ``folder``."""
    save_all(folder, {"steps.png": functools.partial(_steps, summary["models"])})


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
