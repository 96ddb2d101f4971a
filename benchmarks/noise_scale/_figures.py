"""One picture: what the batch size buys, as predicted and as measured."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks.lab._style import BLUE, VERMILLION, logarithmic, save_all
from benchmarks.noise_scale._report import predict, tracked


def draw_all(folder: Path) -> None:
    """Draws the picture from ``results.json`` in the folder, into the folder."""
    results = json.loads((folder / "results.json").read_text())
    models = {name: model for name, model in results["models"].items() if model["targets"]}
    if models:
        save_all(folder, {"steps.png": lambda: _steps(models)})


def _steps(models: dict[str, Any]) -> Figure:
    """Steps to the last loss against the batch, beside the prediction from the noise scale."""
    columns = min(2, len(models))
    rows = -(-len(models) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(max(6.0, 4.4 * columns), 3.1 * rows + 0.7), squeeze=False
    )
    for axes, (name, model) in zip(panels.flat, models.items(), strict=False):
        target, found = list(model["targets"].items())[-1]
        batches = np.asarray([int(batch) for batch in found["steps"]])
        steps = np.asarray(list(found["steps"].values()), float)
        title = f"{name}, to a loss of {target}"
        if values := tracked(found):
            line = np.geomspace(batches.min(), batches.max(), 100)
            scales = np.quantile(values, [0.25, 0.5, 0.75])
            curves = [predict(found["steps"], scale, line) for scale in scales]
            axes.plot(line, curves[1], color=VERMILLION, label="predicted from the noise scale")
            low, high = np.min(curves, axis=0), np.max(curves, axis=0)
            band = "by the middle half of what was tracked"
            axes.fill_between(line, low, high, color=VERMILLION, alpha=0.2, linewidth=0, label=band)
            title += f": noise scale {scales[1]:.0f}"
        ends = np.abs(np.asarray(list(found["range"].values())).T - steps)
        label = "measured, each batch at its best rate; bar: all seeds"
        axes.errorbar(batches, steps, ends, fmt="o", color=BLUE, label=label)
        logarithmic(axes, "xy")
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_title(title)
    for axes in list(panels.flat)[len(models) :]:
        axes.axis("off")
    for axes in panels[-1]:
        axes.set_xlabel("batch (examples)")
    for axes in panels[:, 0]:
        axes.set_ylabel("steps")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("The noise scale tells where a larger batch stops paying", fontsize=12)
    return figure
