"""A picture of every layer's curvature over training. Needs matplotlib (``.[plot]``)."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart, without yellow. More layers
# than colours are drawn in panels, from dark to light by their number.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777")
_DEPTH = ListedColormap(plt.get_cmap("viridis")(np.linspace(0, 0.88, 256)))  # no pale yellow
_LABELS = {
    "curvature": "curvature $H_l$ (loss per parameter squared)",
    "noise_scale": "gradient noise scale (examples)",
}


def plot_report(
    history: Iterable[Mapping[str, Any]],
    path: str | Path | None = None,
    *,
    quantity: str = "curvature",
) -> Figure:
    """Draws a quantity of every layer over training, with its 95 % interval.

    Up to eight layers are lines in one panel. More are grouped by name into panels of equal axes,
    with numbers left out: ``block_0/query`` and ``block_1/query`` share one. The band is from
    ``at_least`` to ``at_most`` of a noise report, +-1.96 standard errors elsewhere. The axis is
    logarithmic; if a value is not above 0, it is linear around 0 (`symlog`).

    Args:
      history: one mapping for each logged step, as the scripts in ``examples/`` write them in JSON
        lines: ``{"step": 10, **layer_report(state, params, flat=True)}``, or `noise_report`'s;
        other keys are ignored.
      path: file to write, whose ending names the format; the figure is then closed.
      quantity: what to draw: the part of the keys before ``/``, such as ``"curvature"``,
        ``"noise_scale"``, ``"momentum"`` or ``"alpha"``.

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

    def column(kind: str, name: str) -> np.ndarray:
        return np.asarray([row.get(f"{kind}/{name}", np.nan) for row in rows], float)

    names = [key.removeprefix(f"{quantity}/") for key in keys if key.startswith(f"{quantity}/")]
    values = {name: column(quantity, name) for name in names}
    values = {name: v for name, v in values.items() if np.isfinite(v).any()}
    if not values:
        found = sorted({key.split("/")[0] for key in keys})
        raise ValueError(
            f"history must hold rows with 'step' and finite '{quantity}/NAME', as layer_report("
            f"state, params, flat=True) gives them; got {len(rows)} rows with the quantities"
            f" {found}."
        )
    kinds: dict[str, list[str]] = {}
    for name in values:
        kind = re.sub(r"\d+", "*", name) if len(values) > len(_COLORS) else ""
        kinds.setdefault(kind, []).append(name)
    columns = min(len(kinds), 4 if len(kinds) <= 24 else 8)
    lines = -(-len(kinds) // columns)
    size = max(2.2 * columns, 7), max(1.5 * lines + 1, 4)
    options: dict[str, Any] = {"sharex": True, "sharey": True, "squeeze": False}
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", **options)
    steps = [row["step"] for row in rows]
    for axes, (kind, members) in zip(grid.flat, kinds.items(), strict=False):
        members.sort(key=lambda name: [int(n) for n in re.findall(r"\d+", name) if kind])
        shades: Any = _COLORS
        if kind:  # a layer alone has no place in an order
            shades = _DEPTH(np.linspace(0, 1, len(members))) if len(members) > 1 else ["black"]
        for name, color in zip(members, shades, strict=False):
            error = 1.96 * column(f"{quantity}_std_error", name)
            low, high = column(f"{quantity}_at_least", name), column(f"{quantity}_at_most", name)
            low = np.where(np.isfinite(low), low, values[name] - error)
            high = np.where(np.isfinite(high), high, values[name] + error)
            axes.plot(steps, values[name], color=color, linewidth=1.2, label=name)
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_title(kind if len(members) > 1 else members[0], loc="left", fontsize=8)
        axes.grid(color="#e0e0e0", linewidth=0.6)
    for axes in grid.flat[len(kinds) :]:
        axes.set_visible(False)
    _set_scale(grid.flat[0], np.concatenate(list(values.values())))
    if "" in kinds:
        figure.legend(loc="outside right center", fontsize=9, frameon=False)
    elif len(kinds) < len(values):
        bar = figure.colorbar(plt.cm.ScalarMappable(cmap=_DEPTH), ax=grid, shrink=0.5, aspect=30)
        bar.set_ticks([0, 1], labels=["first *", "last *"])
    figure.supylabel(_LABELS.get(quantity, quantity.replace("_", " ")), fontsize=9)
    figure.supxlabel("step", fontsize=9)
    if path is not None:
        figure.savefig(path, dpi=110)
        plt.close(figure)
    return figure


def _set_scale(axes: Axes, values: np.ndarray) -> None:
    """Logarithmic, from the values; with 0 and what is below it, linear around 0."""
    values = values[np.isfinite(values)]
    sizes = np.abs(values[values != 0])
    if np.all(values > 0):  # a band that reaches 0 runs out of the picture
        axes.set_yscale("log")
        axes.set_ylim(sizes.min() / 2, sizes.max() * 2)
    elif len(sizes):
        axes.set_yscale("symlog", linthresh=10 ** np.ceil(np.log10(np.quantile(sizes, 0.1))))
