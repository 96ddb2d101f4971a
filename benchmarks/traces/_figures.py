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
from benchmarks.traces._summary import is_peer


def draw_all(folder: Path) -> None:
    """Draws every picture from the results in the folder, into the folder."""
    figures: dict[str, Any] = {}
    for stem, picture, reference in (
        ("results", "work.png", "hutchinson joint"),
        ("gauss_newton", "gauss_newton.png", "fisher"),
    ):
        if not (folder / f"{stem}.json").exists():
            continue
        results = json.loads((folder / f"{stem}.json").read_text())
        models = results["models"]
        version = results["context"]["versions"]["lama_optax"]
        figures[picture] = functools.partial(_work, models, reference, version)
    save_all(folder, figures)


def _work(models: dict[str, Any], reference: str, version: str) -> Figure:
    """Time x variance of each contender over the reference's: a row each, a panel a model."""
    of_model = {name: _relative_work(model, reference) for name, model in models.items()}
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
        Line2D([], [], color=BLUE, marker="o", linestyle="none", label=f"lama_optax {version}"),
        Line2D([], [], color=BLUE, marker="<", linestyle="none", label="exact: no error"),
        Line2D(
            [], [], color=VERMILLION, marker="o", markerfacecolor="white", linestyle="none",
            label="another library",
        ),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.suptitle(
        f"{labels[0]} needs least work for the same error\n"
        f"work: time x variance of the median layer, over that of {reference}",
        fontsize=11,
    )
    return figure


def _relative_work(model: dict[str, Any], reference: str) -> dict[str, float]:
    """In gradients of each framework, so that their own speed is no part of it."""

    def work(found: dict[str, Any]) -> np.ndarray:
        return found["gradients"]["median"] * np.square(np.asarray(found["sd"], float))

    contenders = {k: v for k, v in model["contenders"].items() if v.get("sd") is not None}
    base = work(contenders[reference])
    return {label: float(np.median(work(found) / base)) for label, found in contenders.items()}
