"""One picture: what the batch size buys, as predicted and as measured."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks.lab._style import BLUE, VERMILLION, logarithmic, save_all


def draw_all(folder: Path, summary: dict[str, Any]) -> None:
    """Draws the pictures of what was measured."""
    models = {name: model for name, model in summary["models"].items() if model["targets"]}
    if models:
        save_all(folder, {"steps.png": lambda: _steps(models)})


def _steps(models: dict[str, Any]) -> Figure:
    """Steps to the last loss against the batch, beside the prediction from the noise scale."""
    figure, panels = plt.subplots(
        1, len(models), figsize=(3.3 * len(models), 3.2), squeeze=False, layout="constrained"
    )
    for axes, (name, model) in zip(panels[0], models.items(), strict=True):
        target, found = list(model["targets"].items())[-1]
        batches = np.asarray([int(batch) for batch in found["steps"]])
        steps = np.asarray(list(found["steps"].values()))
        line = np.geomspace(batches.min(), batches.max(), 100)
        axes.plot(batches, steps, "o", color=BLUE, label="measured, best rate")
        tracked = found["tracked"].get("groups") or found["tracked"].get("signs")
        if tracked:
            scales = np.quantile(tracked, [0.25, 0.5, 0.75])
            # The noise scale gives the shape; the height is fitted.
            curves = []
            for scale in scales:
                height = np.exp(np.mean(np.log(steps / (1 + scale / batches))))
                curves.append(height * (1 + scale / line))
            label = f"predicted, noise scale {scales[1]:.0f}"
            axes.plot(line, curves[1], color=VERMILLION, label=label)
            low, high = np.min(curves, axis=0), np.max(curves, axis=0)
            axes.fill_between(line, low, high, color=VERMILLION, alpha=0.2, linewidth=0)
        logarithmic(axes, "xy")
        axes.set(title=f"{name}: steps to a loss of {target}", xlabel="batch (examples)")
        axes.legend()
    panels[0][0].set_ylabel("steps")
    return figure
