"""The pictures: work for the same error, and errors along a training against their cost."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.lab._style import BLUE, COLORS, VERMILLION, logarithmic, save_all
from benchmarks.traces._summary import is_peer

#: Decay of the average -> line.
DECAYS: dict[str, Any] = {"decay 0": ":", "decay 0.9": "-", "decay 0.99": "--"}
#: The shares of a step between which the axis of `along` ends; what is less sits at its edge.
LEAST_ADDED = 5e-3


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
        along = {name: model for name, model in models.items() if "along" in model}
        if along:
            figures["along.png"] = functools.partial(_along, along, version)
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


def _along(models: dict[str, Any], version: str) -> Figure:
    """One point a setting: what it adds to Adam's step, and the state's error."""
    columns = len(models)
    figure, panels = plt.subplots(
        1, columns, figsize=(max(6.0, 4.8 * columns), 4.6), sharey=True, squeeze=False
    )
    colors: dict[str, str] = {}
    for axes, (name, model) in zip(panels.flat, models.items(), strict=True):
        families: dict[tuple[str, str], list[Any]] = {}
        for label, row in model["along"]["rows"].items():
            family, _, decay = label.split(", ")
            families.setdefault((family, decay), []).append(row)
        for (family, decay), points in families.items():
            color = colors.setdefault(family, COLORS[len(colors)])
            _line(axes, points, color, DECAYS[decay])
        exact = model["along"]["batch"]["median"]
        axes.axhline(exact, color="gray", linewidth=1)
        right = max(row["over_adam"] - 1 for row in model["along"]["rows"].values())
        axes.set(title=name, xlim=(LEAST_ADDED / 1.4, 2 * right))
        logarithmic(axes, "x")
        axes.annotate(
            "exact, of one batch",
            (LEAST_ADDED, exact),
            xytext=(0, 3),
            textcoords="offset points",
            color="gray",
            fontsize=8,
        )
    logarithmic(panels.flat[0], "y")
    panels.flat[0].set_ylabel("relative error of the state's curvature")
    figure.supxlabel(
        "time added to Adam's step, in Adam's steps; arrow: not above what timing can tell\n"
        "points from left to right: an estimate at every 100th, 10th and every step",
        fontsize=10,
    )
    handles = [Line2D([], [], color=color, label=family) for family, color in colors.items()]
    handles += [
        Line2D([], [], color="black", linestyle=style, label=f"average, {decay}")
        for decay, style in DECAYS.items()
    ]
    figure.legend(handles=handles, loc="outside right center")
    figure.suptitle(
        f"Averaging pays where estimates are frequent (lama_optax {version}, median layer)"
    )
    return figure


def _line(axes: Axes, points: list[Any], color: str, style: str) -> None:
    """A setting at its intervals; what adds no time that could be told is an arrow at the edge."""
    points = sorted(points, key=lambda row: row["over_adam"])
    added = [max(LEAST_ADDED, row["over_adam"] - 1) for row in points]
    errors = [row["median"] for row in points]
    axes.plot(added, errors, color=color, linestyle=style, linewidth=1.4)
    for x, y in zip(added, errors, strict=True):
        clipped = math.isclose(x, LEAST_ADDED)
        axes.plot(x, y, "<" if clipped else "o", color=color, markersize=6 if clipped else 4)
