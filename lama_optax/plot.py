"""A picture of every layer's curvature over training. Needs matplotlib (``lama-optax[plot]``)."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

# Up to so many layers share one panel, each with its name at the end of its line.
_FEW = 8
# Okabe and Ito's colours, which colour-blind readers can tell apart, without yellow.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777")
_DEPTH = ListedColormap(plt.get_cmap("viridis")(np.linspace(0, 0.88, 256)))  # no pale yellow
_LABELS = {
    "curvature": "curvature $H_l$ (loss per parameter squared)",
    "noise_scale": "gradient noise scale (examples)",
}
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e0e0e0",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


class _Series:
    """One layer: its values and their standard errors, NaN where there is none, at every step."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], quantity: str, name: str) -> None:
        self.name = name
        self.steps = np.asarray([row["step"] for row in rows])
        self.values, errors = (
            np.asarray([row.get(f"{column}/{name}", np.nan) for row in rows], float)
            for column in (quantity, f"{quantity}_std_error")
        )
        self.low, self.high = self.values - 1.96 * errors, self.values + 1.96 * errors

    @property
    def place(self) -> list[int]:
        """The numbers in the name: block_2 stands before block_10."""
        return [int(number) for number in re.findall(r"\d+", self.name)]

    def draw(self, axes: Axes, color: Any, strength: float = 1.0) -> None:
        axes.plot(self.steps, self.values, color=color, linewidth=0.8 + 0.5 * strength)
        alpha = 0.2 * strength
        axes.fill_between(self.steps, self.low, self.high, color=color, alpha=alpha, linewidth=0)


def plot_report(
    history: Iterable[Mapping[str, Any]],
    path: str | Path | None = None,
    *,
    quantity: str = "curvature",
) -> Figure:
    """Draws a quantity of every layer over training, with its 95 % interval.

    Up to eight layers are lines in one panel, with their names at the end. More are grouped by
    name into panels, with numbers left out: ``block_0/query`` and ``block_1/query`` share one, and
    a line's colour tells its place there. All panels have the same axes. The band is +-1.96
    standard errors. The axis is logarithmic; if a value is not above 0, it is linear around 0,
    between two ticks of equal size and opposite sign, and logarithmic beyond (`symlog`). A band
    that reaches 0 on a logarithmic axis runs out of the picture.

    Args:
      history: one mapping for each logged step, as the scripts in ``examples/`` write them in JSON
        lines: ``{"step": 10, **layer_report(state, params, flat=True)}``; other keys are ignored.
      path: file to write, whose ending names the format; the figure is then closed.
      quantity: what to draw: the part of the keys before ``/``, such as ``"curvature"``,
        ``"momentum"`` or ``"alpha"``.

    Returns:
      The figure.

    Raises:
      ValueError: if ``history`` holds no step, or nothing of that quantity.

    Examples:
      >>> from lama_optax.plot import plot_report
      >>> history = [
      ...     {"step": 0, "curvature/hidden": 0.5, "curvature/out": 0.3},
      ...     {"step": 10, "curvature/hidden": 0.2, "curvature_std_error/hidden": 0.01,
      ...      "curvature/out": 0.3, "curvature_std_error/out": 0.02},
      ... ]
      >>> plot_report(history, "curvature.png")  # doctest: +SKIP

      From a log: ``history = [json.loads(line) for line in open("runs/plain/log.jsonl")]``.
    """
    rows = [row for row in history if "step" in row]
    keys = dict.fromkeys(key for row in rows for key in row if "/" in key)
    names = [key.removeprefix(f"{quantity}/") for key in keys if key.startswith(f"{quantity}/")]
    series = [_Series(rows, quantity, name) for name in names]
    series = [one for one in series if np.isfinite(one.values).any()]
    if not series:
        found = sorted({key.split("/")[0] for key in keys})
        raise ValueError(
            f"history must hold rows with 'step' and finite '{quantity}/NAME', as layer_report("
            f"state, params, flat=True) gives them; got {len(rows)} rows with the quantities"
            f" {found}."
        )
    with plt.rc_context(_STYLE):
        figure = _one_panel(series) if len(series) <= _FEW else _panels(series)
        _set_scale(figure.axes[0], series)
        if len(series) <= _FEW:
            _label_ends(figure.axes[0], series)
        title = textwrap.fill(_message(series, quantity), int(12 * figure.get_figwidth()))
        figure.suptitle(title, fontsize=10, fontweight="bold")
        figure.supylabel(_LABELS.get(quantity, quantity.replace("_", " ")), fontsize=9)
        figure.supxlabel("step", fontsize=9)
        if path is not None:
            figure.savefig(path, dpi=110)
            plt.close(figure)
    return figure


def _one_panel(series: Sequence[_Series]) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for one, color in zip(series, _COLORS, strict=False):
        one.draw(axes, color)
    return figure


def _panels(series: Sequence[_Series]) -> Figure:
    kinds: dict[str, list[_Series]] = {}
    for one in series:
        kinds.setdefault(re.sub(r"\d+", "*", one.name), []).append(one)
    columns = min(len(kinds), 4 if len(kinds) <= 24 else 8)
    lines = -(-len(kinds) // columns)
    figure, grid = plt.subplots(
        *(lines, columns),
        figsize=(max(2.2 * columns, 7), max(1.5 * lines + 1, 4)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (kind, members) in zip(grid.flat, kinds.items(), strict=False):
        axes.set_title(kind if len(members) > 1 else members[0].name, loc="left", fontsize=8)
        members.sort(key=lambda one: one.place)
        colors = _DEPTH(np.linspace(0, 1, len(members))) if len(members) > 1 else ["black"]
        for one, color in zip(members, colors, strict=True):
            one.draw(axes, color, strength=min(1, 8 / len(members)))
    for axes in grid.flat[len(kinds) :]:
        axes.set_visible(False)
    if len(kinds) < len(series):
        bar = figure.colorbar(ScalarMappable(cmap=_DEPTH), ax=grid, shrink=0.5, aspect=30)
        bar.set_ticks([0, 1], labels=["first *", "last *"])
        bar.outline.set_visible(False)
    return figure


def _set_scale(axes: Axes, series: Sequence[_Series]) -> None:
    """Logarithmic, from the values; with 0 and what is below it, linear around 0."""
    values = np.concatenate([one.values for one in series])
    values = values[np.isfinite(values)]
    sizes = np.abs(values[values != 0])
    if len(sizes) == 0:
        return
    if np.all(values > 0):
        axes.set_yscale("log")
        axes.set_ylim(sizes.min() / 2, sizes.max() * 2)
    else:
        axes.set_yscale("symlog", linthresh=10 ** np.ceil(np.log10(np.quantile(sizes, 0.1))))
        for panel in axes.figure.axes:
            if panel.get_yscale() == "symlog":  # not the bar of colours
                panel.axhline(0, color="black", linewidth=0.6)


def _label_ends(axes: Axes, series: Sequence[_Series]) -> None:
    """Writes each name at the end of its line, moved up or down where two would collide."""
    known = [np.flatnonzero(np.isfinite(one.values)) for one in series]
    ends = [(one.steps[k[-1]], one.values[k[-1]]) for one, k in zip(series, known, strict=True)]
    to_fraction = axes.transData + axes.transAxes.inverted()
    heights = to_fraction.transform(ends)[:, 1]
    order, gap = np.argsort(heights), 0.055  # the height of a name
    places = np.clip(heights[order], 0, 1)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], 1 - gap * (len(places) - 1 - i))
    for place, i in zip(places, order, strict=True):
        axes.annotate(
            series[i].name,
            xy=ends[i],
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=_COLORS[i],
            verticalalignment="center",
            arrowprops={
                "arrowstyle": "-",
                "color": _COLORS[i],
                "linewidth": 0.5,
                "relpos": (0, 0.5),  # to the left edge of the name
                "shrinkB": 0,
            },
        )


def _message(series: Sequence[_Series], quantity: str) -> str:
    """What the last step shows, where the intervals are known."""
    word = quantity.replace("_", " ")
    last = [one for one in series if np.isfinite(one.values[-1])]
    if len(last) < 2:
        return word
    top = max(last, key=lambda one: float(one.values[-1]))
    bottom = min(last, key=lambda one: float(one.values[-1]))
    high, low = float(top.values[-1]), float(bottom.values[-1])
    step = f"At step {top.steps[-1]}"
    if np.isnan(top.low[-1] - bottom.high[-1]):
        return word
    if top.low[-1] <= bottom.high[-1]:
        return f"{step}, the layers' largest and smallest {word} cannot be told apart"
    ratio = "above"
    if low > 0:
        ratio = f"{high / low:,.0f} times" if high > 10 * low else f"{high / low:.1f} times"
    return f"{step}, the {word} of {top.name} is {ratio} that of {bottom.name}"
