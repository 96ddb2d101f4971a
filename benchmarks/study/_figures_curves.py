"""Pictures of curves: learning rates, cost, training, the open choices, the layers' traces."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study._figures import COLORS, DASHES, GREY, LOSS_LABEL, MARKERS, look
from benchmarks.study._report_cost import costs
from benchmarks.study._report_data import BASE, Study
from benchmarks.study._report_questions import (
    QUESTIONS,
    WHEN,
    judge_question,
    layer_traces,
    questions,
    reference,
)
from benchmarks.study._report_rates import TOLERANCE, best_by_rate
from benchmarks.study._report_text import label

#: The arms that curves show.
SHOWN = (BASE, "adam", "lama", "lama_ema", "lama_paper", "v5")

#: Of logarithmic axes of ratios, wide and narrow.
WIDE = (0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 100)
NARROW = (0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6)


def learning_rates(study: Study) -> Figure | None:
    """The lowest validation loss at each learning rate, relative to the arm's best."""
    shown = [w for w in study.workloads if any(study.trials(w, arm) for arm in SHOWN)]
    if not shown:
        return None
    figure, axes = _grid(len(shown), height=2.5)
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
        ax.set(xscale="log", ylim=(-2, 60), title=_title(workload))
    _name_axes(axes, len(shown), "learning rate", "above its best, %")
    _legend(figure, axes)
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
    figure, axes = _grid(len(shown), height=2.5)
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
        ax.set(yscale="log" if positive else "linear", title=_title(workload))
        if positive:
            ax.set_ylim(0.9 * min(lows), 1.2 * max(highs))
    _name_axes(axes, len(shown), "step", "validation loss")
    _legend(figure, axes)
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
        ax.set_yticks(range(len(rows)), [_title(w) for w in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9
    )
    figure.suptitle("Cost of the same validation loss (no point: target not reached)", fontsize=11)
    return figure


def open_choices(study: Study) -> Figure | None:
    """Every choice of question 5: held-out loss relative to the usual value's."""
    asked = questions(study)
    if not asked:
        return None
    figure, axes = _grid(len(asked), height=2.9)
    for ax, (question, by_workload) in zip(axes, asked.items(), strict=False):
        judged = judge_question(study, question, by_workload)
        values = list(dict.fromkeys(v for found in by_workload.values() for v in found))
        ax.axhspan(-1, 1, color=GREY, alpha=0.15, linewidth=0)
        for i, (workload, found) in enumerate(by_workload.items()):
            shift = 0.3 * ((i + 0.5) / len(by_workload) - 0.5)
            ax.plot([], [], markersize=4, linestyle="", label=_title(workload), **look(i))
            for value in found:
                x = values.index(value) + shift
                if value == reference(question, found):
                    ax.plot(x, 0, markersize=4, **look(i))
                elif (workload, value) in judged:
                    interval = judged[workload, value].comparison.relative
                    middle, low, high = (100 * np.array(interval)).tolist()
                    ax.plot([x, x], [low, high], color=COLORS[i], linewidth=1.5)
                    ax.plot(x, middle, markersize=4, **look(i))
        long = max(map(len, values)) > 5 or len(values) > 7
        ax.set_xticks(
            range(len(values)),
            [v.replace("finite_difference", "finite d.").replace("_", " ") for v in values],
            rotation=35 if long else 0,
            ha="right" if long else "center",
            fontsize=8,
        )
        ax.set_title(QUESTIONS.get(question, (question,))[0], fontsize=10)
    for ax in axes[:: _columns(len(asked))]:
        ax.set_ylabel("relative difference, %")
    _legend(figure, axes)
    figure.suptitle(
        f"{LOSS_LABEL.split(',')[0].capitalize()} from the usual choice (at 0); band: \u00b11 %",
        fontsize=11,
    )
    return figure


def traces(study: Study) -> Figure | None:
    """Section 4.4: each layer's trace at the start, in the middle and at the end."""
    found = {w: layer_traces(study, w) for w in study.workloads}
    shown = [w for w in study.workloads if len(found[w][0]) > 1]
    if not shown:
        return None
    figure, axes = _grid(len(shown), height=2.7)
    for ax, workload in zip(axes, shown, strict=False):
        names, seen = found[workload]
        for i, (when, values) in enumerate(seen["trace"].items()):
            ax.plot(
                range(len(names)),
                values,
                color=COLORS[i],
                marker=MARKERS[i],
                linestyle=DASHES[i],
                markersize=4,
                label=WHEN.get(when, when),
            )
        positive = min(min(values) for values in seen["trace"].values()) > 0
        ax.set_yscale("log" if positive else "symlog")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        ax.yaxis.set_minor_formatter(lambda value, _: "")
        ticks = np.arange(0, len(names), max(1, -(-len(names) // 8)))
        ax.set_xticks(ticks, [str(tick + 1) for tick in ticks])
        ax.set_title(f"{_title(workload)}: {names[0]} to {names[-1]}", fontsize=9)
    _name_axes(axes, len(shown), "layer", "trace, loss / parameter$^2$")
    _legend(figure, axes)
    figure.suptitle("Trace of the Hessian by layer (Section 4.4), mean of the seeds", fontsize=11)
    return figure


def _grid(count: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    columns = _columns(count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(4.2 * columns, 6), height * rows + 0.9), squeeze=False
    )
    flat = axes.ravel()
    for ax in flat[count:]:
        ax.set_axis_off()
    return figure, list(flat)


def _columns(count: int) -> int:
    return min(count, 3)


def _styles(arms: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same colour, marker and dashes for an arm in every picture of curves."""
    for i, arm in enumerate(arms):
        if arm == BASE:
            yield arm, {"color": GREY, "linewidth": 4, "alpha": 0.6}
        else:
            yield arm, {**look(i - 1), "linestyle": DASHES[i - 1]}


def _title(workload: str) -> str:
    return workload.replace("_", " ")


def _name_axes(axes: Sequence[Axes], count: int, x: str, y: str) -> None:
    columns = _columns(count)
    for i, ax in enumerate(axes[:count]):
        if i + columns >= count:
            ax.set_xlabel(x)
        if i % columns == 0:
            ax.set_ylabel(y)


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    handles: dict[str, Any] = {}
    for ax in axes:
        handles |= {name: h for h, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=6, fontsize=9
    )
