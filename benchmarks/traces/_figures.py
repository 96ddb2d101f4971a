"""The pictures: work for the same error."""

import functools
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.lab._style import BLUE, VERMILLION, logarithmic, save_all
from benchmarks.traces._jax import GAUSS_NEWTON
from benchmarks.traces._measure import is_peer
from benchmarks.traces._report import TITLES


def draw_all(folder: Path) -> None:
    """Draws a picture a matrix from ``results.json`` in the folder, into the folder."""
    results = json.loads((folder / "results.json").read_text())
    save_all(
        folder,
        {
            f"{matrix}.png": functools.partial(_work, matrix, models)
            for matrix, models in results["matrices"].items()
        },
    )


def _work(matrix: str, models: dict[str, Any]) -> Figure:
    """Time x variance of each contender over the default's: a row each, a panel a model."""
    # In gradients of each framework, so that their own speed is no part of it.
    of_model = {
        name: {
            label: found["work"]["gradients"]
            for label, found in model["contenders"].items()
            if "work" in found
        }
        for name, model in models.items()
    }
    found = dict.fromkeys(label for works in of_model.values() for label in works)
    # From little work to much, in the median over the models that have it.
    labels = sorted(
        found, key=lambda k: float(np.median([w[k] for w in of_model.values() if k in w]))
    )
    figure, panels = plt.subplots(
        1,
        len(models),
        figsize=(3.0 + 1.9 * len(models), 0.26 * len(labels) + 1.5),
        sharey=True,
        squeeze=False,
    )
    for axes, (name, works) in zip(panels.flat, of_model.items(), strict=True):
        known = [work for work in works.values() if work > 0]
        edge = min(known) / 2
        for label, work in works.items():
            color = VERMILLION if is_peer(label) else BLUE
            look = {"color": color, "markerfacecolor": "white" if is_peer(label) else color}
            # Without variance: an arrow at the edge.
            marker = "o" if work > 0 else "<"
            axes.plot(max(work, edge), labels.index(label), marker, markersize=6, **look)
        axes.axvline(1, color="gray", linewidth=1)
        axes.set_xlim(edge / 1.5, max(known) * 2)
        logarithmic(axes, "x")
        axes.set(title=name)
    panels.flat[0].set_yticks(range(len(labels)), labels)
    panels.flat[0].invert_yaxis()
    handles = [
        Line2D([], [], color=BLUE, marker="o", linestyle="none", label="lama_optax"),
        Line2D([], [], color=BLUE, marker="<", linestyle="none", label="exact: no error"),
        Line2D(
            [], [], color=VERMILLION, marker="o", markerfacecolor="white", linestyle="none",
            label="another library",
        ),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.suptitle(
        f"{TITLES[matrix]}: {labels[0]} needs least work for the same error, where it runs\n"
        "work: time x variance of the median layer, over that of"
        f" {'fisher()' if matrix == GAUSS_NEWTON else 'flipout()'}",
        fontsize=11,
    )
    return figure
