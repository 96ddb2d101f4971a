"""Pictures of the open choices and of the layers' traces."""

import numpy as np
from matplotlib.figure import Figure

from benchmarks.study._figures import (
    COLORS,
    DASHES,
    GREY,
    LOSS_LABEL,
    MARKERS,
    columns_of,
    legend_below,
    look,
    name_axes,
    small_multiples,
    spaced,
    stretch,
)
from benchmarks.study._report_data import Study
from benchmarks.study._report_questions import QUESTIONS, judge_question, questions, reference
from benchmarks.study._report_traces import WHEN, layer_traces


def open_choices(study: Study) -> Figure | None:
    """Every choice of question 5: held-out loss relative to the usual value's."""
    asked = questions(study)
    if not asked:
        return None
    figure, axes = small_multiples(len(asked), height=2.9)
    for ax, (question, by_workload) in zip(axes, asked.items(), strict=False):
        judged = judge_question(study, question, by_workload)
        values = list(dict.fromkeys(v for found in by_workload.values() for v in found))
        ax.axhspan(-1, 1, color=GREY, alpha=0.15, linewidth=0)
        for i, (workload, found) in enumerate(by_workload.items()):
            shift = 0.3 * ((i + 0.5) / len(by_workload) - 0.5)
            ax.plot([], [], markersize=4, linestyle="", label=spaced(workload), **look(i))
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
        stretch(ax, "y", *ax.get_ylim())
        ax.set_title(QUESTIONS.get(question, (question,))[0], fontsize=10)
    for ax in axes[:: columns_of(len(asked))]:
        ax.set_ylabel("relative difference, %")
    legend_below(figure, axes)
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
    figure, axes = small_multiples(len(shown), height=2.7)
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
        ax.set_title(f"{spaced(workload)}: {names[0]} to {names[-1]}", fontsize=9)
    name_axes(axes, len(shown), "layer", "trace, loss / parameter$^2$")
    legend_below(figure, axes)
    figure.suptitle("Trace of the Hessian by layer (Section 4.4), mean of the seeds", fontsize=11)
    return figure
