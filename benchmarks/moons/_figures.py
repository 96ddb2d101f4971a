"""The figures: colours from Okabe and Ito's palette, which colour-blind readers can tell apart."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.lab._style import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    save_all,
)
from benchmarks.moons._data import Classifier, Runs
from benchmarks.moons._experiment import Outcome
from benchmarks.moons._settings import Settings
from benchmarks.moons._statistics import mean_interval
from benchmarks.moons._train import ARMS

#: Colour and line of each optimizer.
LINES: dict[str, dict[str, Any]] = {
    "adam": {"color": BLUE, "linewidth": 4, "alpha": 0.45},
    "lama": {"color": VERMILLION, "linestyle": "--"},
    "lama_fd": {"color": "black", "linestyle": ":"},
    "lam_weight": {"color": PURPLE, "linestyle": "-."},
    "lam_layer": {"color": GREEN},
}


def draw_all(settings: Settings, runs: Runs, results: dict[str, Any], outcome: Outcome) -> None:
    """Draws every figure into the directory ``settings.results``."""
    figures = {
        "loss_curves.png": lambda: _loss_curves(settings, outcome),
        "decision_boundaries.png": lambda: _decision_boundaries(settings, runs, outcome),
        "curvature.png": lambda: _curvature(settings, results, outcome),
    }
    if results["grid"] is not None:
        figures["learning_rates.png"] = lambda: _learning_rates(settings, results)
    save_all(settings.results, figures)


def _loss_curves(settings: Settings, outcome: Outcome) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    epochs = np.arange(1, settings.epochs + 1)
    for arm, history in outcome.histories.items():
        left.plot(epochs, history.loss.mean(axis=0), label=ARMS[arm], **LINES[arm])
    low, high = np.percentile(outcome.histories["adam"].loss, [10, 90], axis=0)
    left.fill_between(
        epochs, low, high, color=BLUE, alpha=0.12, linewidth=0, label="Adam, 80 % of the seeds"
    )
    left.set(
        title=f"Training loss, mean of {settings.seeds} seeds",
        xlabel="epoch",
        ylabel="binary cross-entropy",
    )
    left.legend()

    for arm in ("lama", "lama_fd"):
        difference = outcome.histories[arm].loss - outcome.histories["adam"].loss
        bands = [mean_interval(column) for column in difference.T]
        mean, low, high = np.asarray(bands).T
        right.plot(epochs, mean, label=ARMS[arm], **LINES[arm])
        right.fill_between(epochs, low, high, color=LINES[arm]["color"], alpha=0.15, linewidth=0)
    right.axhline(0, **LINES["adam"], label="Adam")
    right.set(title="Minus Adam's (band: 95 % of the mean)", xlabel="epoch")
    _label_in_powers(right, "difference in loss, paired by seed")
    right.legend(loc="lower right")
    apart = max(
        abs(float((outcome.histories["lama"].loss - outcome.histories["adam"].loss).mean(0)[i]))
        for i in range(settings.epochs)
    )
    figure.suptitle(f"LAMA-Adam's mean loss is Adam's within {apart:.1g}", fontsize=12)
    return figure


def _label_in_powers(axes: Axes, label: str) -> None:
    """Writes a small quantity's power of ten into its label, not above the axis."""
    largest = float(np.abs(axes.get_ylim()).max())
    power = math.floor(math.log10(largest)) if 0 < largest < math.inf else 0
    power = 0 if -2 <= power <= 2 else power
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 10.0**power:g}")
    axes.set_ylabel(label + (f", units of $10^{{{power}}}$" if power else ""))


def _decision_boundaries(settings: Settings, runs: Runs, outcome: Outcome) -> Figure:
    figure, axes = plt.subplots(figsize=(6.4, 5.2))
    model = Classifier(settings.hidden)
    x, y = runs.x_test[0], runs.y_test[0]
    low, high = x.min(axis=0) - 0.3, x.max(axis=0) + 0.3
    first, second = np.meshgrid(*(np.linspace(*ends, 300) for ends in zip(low, high, strict=True)))
    points = jnp.asarray(np.stack([first.ravel(), second.ravel()], axis=1), jnp.float32)
    for label, marker, color in ((0, "o", SKY), (1, "^", ORANGE)):
        chosen = x[y == label]
        axes.scatter(
            chosen[:, 0],
            chosen[:, 1],
            marker=marker,
            s=26,
            c=color,
            edgecolors="white",
            linewidths=0.5,
            label=f"test point of class {label}",
        )
    handles, _ = axes.get_legend_handles_labels()
    for arm in ("adam", "lama"):
        history = outcome.histories[arm]
        params = jax.tree.map(lambda a: a[0], history.params)
        logits = np.asarray(model.logits(params, points)).reshape(first.shape)
        line = LINES[arm]
        if logits.min() < 0 < logits.max():  # else there is no boundary to draw
            axes.contour(
                first,
                second,
                logits,
                levels=[0],
                colors=line["color"],
                linewidths=line.get("linewidth", 2),
                linestyles=line.get("linestyle", "-"),
                alpha=line.get("alpha"),
            )
        name = f"{ARMS[arm]}: {history.accuracy[0]:.2f} % right"
        handles.append(Line2D([], [], label=name, **line))
    axes.set(
        title=f"Decision boundaries after {settings.epochs} epochs, seed {settings.base_seed}",
        xlabel="first feature, standardised",
        ylabel="second feature, standardised",
    )
    axes.grid(False)
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    return figure


def _curvature(settings: Settings, results: dict[str, Any], outcome: Outcome) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), sharex=True)
    epochs = np.arange(1, settings.epochs + 1)
    exact, difference = outcome.histories["lama"].layers, outcome.histories["lama_fd"].layers
    assert exact is not None
    assert difference is not None
    middle = (settings.alpha_min + settings.alpha_max) / 2

    def band(axes: Axes, values: np.ndarray, color: str, label: str) -> None:
        axes.plot(epochs, values.mean(axis=0), color=color, label=label)
        low, high = np.percentile(values, [10, 90], axis=0)
        axes.fill_between(epochs, low, high, color=color, alpha=0.18, linewidth=0)

    for i, (name, color) in enumerate(zip(results["layers"], (BLUE, ORANGE), strict=True)):
        band(left, exact.curvature[..., i], color, name)
        finite = difference.curvature[..., i].mean(axis=0)
        look: dict[str, Any] = {"color": "black", "linestyle": ":"}
        left.plot(epochs, finite, **look, label="" if i else "finite differences")
        band(right, exact.alpha[..., i] - middle, color, name)
    left.set(
        title="Average curvature (Eq. 8)",
        xlabel="epoch",
        ylabel="H = trace / parameters of the layer",
    )
    right.set(title=f"Factor on b1 (Eq. 9), lambda = {settings.sensitivity:g}", xlabel="epoch")
    _label_in_powers(right, f"alpha - {middle:g}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    means = exact.curvature.mean(axis=(0, 1))
    most = list(results["layers"])[int(np.argmax(means))]
    figure.suptitle(
        f"Per parameter {most} is curved most, {np.max(means) / np.min(means):.0f} times as much"
        f" (mean of {settings.seeds} seeds; band: 80 % of them)",
        fontsize=11,
    )
    return figure


def _learning_rates(settings: Settings, results: dict[str, Any]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True)
    grid = results["grid"]
    looks: tuple[dict[str, Any], ...] = (
        {"color": BLUE, "marker": "o", "linewidth": 4, "alpha": 0.5},
        {"color": VERMILLION, "marker": "x", "linestyle": "--"},
        {"color": GREEN, "marker": "s", "linestyle": "-."},
    )
    for (label, method), look in zip(grid["methods"].items(), looks, strict=True):
        mean, low, high = np.asarray(method["accuracy"]).T
        gains = np.asarray(list(method["gain"].values()))
        # The layers' geometric mean: one number for how much longer the steps were.
        gain = np.exp(np.log(gains).mean(axis=0)) if gains.size else np.ones_like(mean)
        gain[~np.isfinite(gain)] = np.nan  # alpha b1 was above 1
        for axes, rates in ((left, grid["rates"]), (right, grid["rates"] * gain)):
            axes.plot(rates, mean, label=label, **look)
            axes.fill_between(rates, low, high, color=look["color"], alpha=0.15, linewidth=0)
    left.set(title="Learning rate as set", xlabel="learning rate", ylabel="test accuracy, %")
    right.set(title="As it acts", xlabel="learning rate x gain of Eq. 6 (mean of the layers)")
    for axes in (left, right):
        axes.set_xscale("log")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(
        "LAMA-Adam's curve is Adam's, moved by the gain of Eq. 6\n"
        f"(test accuracy after {settings.epochs} epochs, mean of {grid['seeds']} seeds; band: 95 %"
        " of the mean)",
        fontsize=11,
    )
    return figure
