"""Pictures of curves: learning rates, cost, training, the open choices, the layers' traces."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks.study._figures import (
    DASHES,
    GREY,
    legend_below,
    look,
    name_axes,
    small_multiples,
    spaced,
)
from benchmarks.study._report_cost import costs
from benchmarks.study._report_data import BASE, Study
from benchmarks.study._report_rates import TOLERANCE, best_by_rate
from benchmarks.study._report_text import label

#: The arms that curves show.
SHOWN = (BASE, "adam", "lama", "lama_ema", "lama_paper", "v5")

#: Of logarithmic axes of ratios, wide and narrow.
WIDE = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 50, 100)
NARROW = (0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6)


def learning_rates(study: Study) -> Figure | None:
    """The lowest validation loss at each learning rate, relative to the arm's best."""
    shown = [w for w in study.workloads if any(study.trials(w, arm) for arm in SHOWN)]
    if not shown:
        return None
    figure, axes = small_multiples(len(shown), height=2.5)
    for ax, workload in zip(axes, shown, strict=False):
        for arm, style in _styles(SHOWN):
            trials = study.trials(workload, arm)
            if not trials:
                continue
            rates, losses = best_by_rate(trials)
            if not np.isfinite(losses).any():
                continue
            excess = 100 * (losses - losses.min()) / abs(losses.min())
            keep = np.isfinite(excess)
            ax.plot(rates[keep], excess[keep], markersize=3, label=label(arm), **style)
        ax.axhline(100 * TOLERANCE, color=GREY, linewidth=1)
        ax.set(xscale="log", ylim=(-2, 60), title=spaced(workload))
    name_axes(axes, len(shown), "learning rate", "above its best, %")
    legend_below(figure, axes)
    figure.suptitle(
        "Validation loss at each learning rate above the arm's best (line: 5 %)", fontsize=11
    )
    return figure


def curves(study: Study) -> Figure | None:
    """Median validation loss during training, with the middle half of the seeds."""
    runs = {
        w: {arm: r for arm in SHOWN if (r := study.runs(w, arm)) and r.line.get("curve")}
        for w in study.workloads
    }
    shown = [w for w in study.workloads if runs[w]]
    if not shown:
        return None
    figure, axes = small_multiples(len(shown), height=2.5)
    for ax, workload in zip(axes, shown, strict=False):
        lows, highs = [], []
        for arm, style in _styles(SHOWN):
            if arm not in runs[workload]:
                continue
            curve = runs[workload][arm].line["curve"]
            rows = [[math.nan if x is None else x for x in q] for q in curve["validation_loss"]]
            low, middle, high = np.array(rows, np.float64).T
            ax.plot(curve["steps"], middle, label=label(arm), **(style | {"marker": ""}))
            ax.fill_between(
                curve["steps"], low, high, color=style["color"], alpha=0.12, linewidth=0
            )
            lows.append(np.nanmin(low))
            highs.append(middle[0])
        target = next(iter(runs[workload].values())).line.get("target")
        if target:
            ax.axhline(target, color=GREY, linewidth=1)
        positive = min(lows) > 0 and max(highs) > 0
        ax.set(yscale="log" if positive else "linear", title=spaced(workload))
        if positive:
            ax.set_ylim(0.9 * min(lows), 1.2 * max(highs))
    name_axes(axes, len(shown), "step", "validation loss")
    legend_below(figure, axes)
    figure.suptitle(
        "Validation loss: median, middle half of the seeds; grey line: the target", fontsize=11
    )
    return figure


def cost(study: Study) -> Figure | None:
    """Steps, gradient-equivalents and time to the target over Adam(lr, b1)'s."""
    found = {w: costs(study, w) for w in study.workloads}
    rows = [w for w, by_arm in found.items() if BASE in by_arm and len(by_arm) > 1]
    arms = list(dict.fromkeys(a for w in rows for a in found[w] if a != BASE))
    if not arms:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 2 + 0.5 * len(rows)), sharey=True)
    names = ("steps", "gradient-equivalents", "time")
    for part, (ax, name) in enumerate(zip(axes, names, strict=True)):
        ax.axvline(1, color=GREY, linewidth=1)
        for i, arm in enumerate(arms):
            for y, workload in enumerate(rows):
                if arm in found[workload]:
                    ratio = found[workload][arm].over(found[workload][BASE])[part]
                    offset = 0.7 * ((i + 0.5) / len(arms) - 0.5)
                    ax.plot(ratio, y + offset, markersize=5, linestyle="", **look(i))
            ax.plot([], [], markersize=5, linestyle="", label=label(arm), **look(i))
        ax.set(xscale="log", xlabel=f"{name}, over {label(BASE)}'s")
        low, high = ax.get_xlim()
        ticks = NARROW if high / low < 2 else WIDE
        ax.set_xticks([tick for tick in ticks if low <= tick <= high])
        ax.set_xticks([], minor=True)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_yticks(range(len(rows)), [spaced(w) for w in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9
    )
    figure.suptitle("Cost of the same validation loss (no point: target not reached)", fontsize=11)
    return figure


def _styles(arms: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same colour, marker and dashes for an arm in every picture of curves."""
    for i, arm in enumerate(arms):
        if arm == BASE:
            yield arm, {"color": GREY, "linewidth": 4, "alpha": 0.6}
        else:
            yield arm, {**look(i - 1), "linestyle": DASHES[i - 1]}
