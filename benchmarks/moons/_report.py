"""The tables that a person reads: printed, and kept in results.txt."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from benchmarks.lab._statistics import Interval
from benchmarks.lab._tables import table
from benchmarks.moons._summary import settings_epoch

#: What the table of traces shows of each layer -> its words.
TRACE_COLUMNS = {
    "exact_trace": "true H",
    "exact_hvp": "exact",
    "finite_difference": "finite d.",
    "exact_hvp_rms_error": "error, exact",
    "finite_difference_rms_error": "error, finite d.",
    "rms_between_the_two": "apart",
}


def report(results: dict[str, Any]) -> str:
    """All tables, in the order in which their questions arise."""
    sections = [
        _paper(results),
        _optimizers(results),
        _layers(results),
        _traces(results),
    ]
    if results["grid"] is not None:
        sections += [_grid(results), _controls(results)]
    notes = divergence_notes(results)
    if notes:
        sections.append("\n".join(textwrap.fill(note, 100) for note in notes))
    return "\n\n".join(sections)


def divergence_notes(results: dict[str, Any]) -> list[str]:
    """What is to be said of each optimizer that diverged on some seeds."""
    notes, total = [], results["settings"]["seeds"]
    for arm, found in results["divergence"].items():
        if not found["seeds"]:
            continue
        label = results["optimizers"][arm]["label"]
        note = (
            f"DIVERGED: {label}, {found['seeds']} of {total} seeds: the loss is not finite or ends"
            f" above where it began (median: {found['median_loss_ratio']:.3g} times)."
        )
        if found["seeds_with_both"]:
            passed = [
                f"{name} (alpha b1 = {reached:.3f})"
                for name, reached in found["largest_momentum"].items()
                if reached >= 1
            ]
            note += (
                f" alpha b1 reached 1 or more in {', '.join(passed)}, so the momentum of Eq. 6"
                " grew geometrically; --max-momentum 0.999, the default, prevents it."
            )
        else:
            note += " alpha b1 stayed below 1: the learning rate, not Eq. 6, is to be suspected."
        notes.append(note)
    return notes


def diverged_by_momentum(results: dict[str, Any]) -> bool:
    """Whether alpha b1 >= 1 made a seed diverge: exit status 2."""
    return any(found["seeds_with_both"] for found in results["divergence"].values())


def _paper(results: dict[str, Any]) -> str:
    settings, arms, paper = results["settings"], results["optimizers"], results["paper"]
    seeds, epoch = settings["seeds"], settings_epoch(settings)
    adam, lama = arms["adam"], arms["lama"]
    of_paper = "  the paper, one seed"
    if epoch != settings["loss_epoch"]:
        of_paper += f", epoch {settings['loss_epoch']}"
    rows: list[Sequence[str]] = []
    for title, key, digits in (
        ("test accuracy, %", "accuracy", 2),
        (f"training loss, epoch {epoch}", "loss", 4),
    ):

        def row(label: str, one: float, other: float, digits: int) -> list[str]:
            return [label, *(f"{x:.{digits}f}" for x in (one, other)), f"{other - one:+.{digits}f}"]

        one, other = (arm[f"{key}_of_base_seed"] for arm in (adam, lama))
        means = row(f"  here, mean of {seeds} seeds", adam[key].mean, lama[key].mean, digits)
        rows += [
            [title, "", "", ""],
            row(of_paper, paper["adam"][key], paper["lama"][key], 2),
            row(f"  here, seed {settings['base_seed']}", one, other, digits),
            [*means[:3], _minus_adam(results, "lama", key, digits + 1)],
        ]
    header = ("", "Adam", "LAMA-Adam", "difference [95 % interval, paired]")
    return (
        "Table 1 and the loss of Figure 1, three ways\n"
        + table(header, rows)
        + "\nThe loss is the mean of the epoch's batch losses, each before its step. From seed to"
        f"\nseed Adam's accuracy has a standard deviation of {adam['accuracy_std']:.1f} points."
    )


def _minus_adam(results: dict[str, Any], name: str, key: str, digits: int) -> str:
    if results["divergence"][name]["seeds"]:
        return "diverged"
    return _signed(results["optimizers"][name][f"{key}_minus_adam"], digits)


def _optimizers(results: dict[str, Any]) -> str:
    rows = [
        (
            arm["label"],
            f"{arm['accuracy'].mean:.2f}",
            "" if name == "adam" else _minus_adam(results, name, "accuracy", 2),
            f"{arm['loss'].mean:.4f}",
            "" if name == "adam" else _minus_adam(results, name, "loss", 4),
            f"{arm['microseconds_per_step']:.1f}",
        )
        for name, arm in results["optimizers"].items()
    ]
    epoch = settings_epoch(results["settings"])
    header = ("", "accuracy, %", "minus Adam", f"loss, ep. {epoch}", "minus Adam", "us/step")
    return (
        f"All optimizers at learning rate {results['settings']['learning_rate']:g}, mean of"
        f" {results['settings']['seeds']} seeds\n"
        + table(header, rows)
        + "\nus/step: microseconds per step and seed, all cores busy; median over blocks of seeds"
        "\nin which the optimizers took turns."
    )


def _layers(results: dict[str, Any]) -> str:
    settings, arm = results["settings"], results["optimizers"]["lama"]
    rows = [
        (
            name,
            f"{layer['curvature'].mean:.4f}",
            f"{layer['alpha'].mean:.6f}",
            f"{layer['largest_momentum']:.4f}",
            f"{layer['gain'].mean:.4f}",
        )
        for name, layer in arm["by_layer"].items()
    ]
    share = 100 * results["curvature_order"]
    return (
        f"Layers under {arm['label']}, lambda {settings['sensitivity']:g}, mean over training"
        " and seeds (Section 4.4)\n"
        + table(("", "curvature H", "alpha", "largest alpha b1", "gain"), rows)
        + "\ngain: sum of the gradients' weights in Eq. 6 over Adam's; at a steady alpha it is"
        "\n(1 - b1)/(1 - alpha b1), and it multiplies the step size."
        f"\nThe output layer has the larger curvature per parameter on {share:.0f} % of the seeds."
    )


def _traces(results: dict[str, Any]) -> str:
    rows = [
        (f"{name}, {when} parameters", *(f"{errors[key]:.5f}" for key in TRACE_COLUMNS))
        for when, by_layer in results["traces"].items()
        for name, errors in by_layer.items()
    ]
    settings = results["settings"]
    header = ("", *TRACE_COLUMNS.values())
    return (
        f"Exact Hessian-vector products and finite differences (delta {settings['fd_step']:g}),"
        f" K = {settings['probes']}, float32\n"
        + table(header, rows)
        + "\nOf the loss of all training points; true H by exact_trace. Means over seeds, and root"
        "\nmean square errors; apart: root mean square of exact minus finite d. Both use the same"
        "\nprobes: what sets them apart is the differencing, not chance. A step of delta crosses"
        "\nkinks of ReLU, where the gradient jumps; the second derivative does not see the jump."
    )


def _grid(results: dict[str, Any]) -> str:
    grid = results["grid"]
    methods = grid["methods"]
    labels = list(methods)
    names = results["layers"]
    columns = ["learning rate", "Adam, %"]
    for label in labels[1:]:
        columns += [label.removeprefix("LAMA-Adam, "), "gain by layer"]
    rows = []
    for i, rate in enumerate(grid["rates"]):
        row = [f"{rate:.2e}", f"{methods['Adam']['accuracy'][i].mean:.2f}"]
        for label in labels[1:]:
            gains = " ".join(f"{methods[label]['gain'][name][i]:.2f}" for name in names)
            row += [_signed(methods[label]["accuracy_minus_adam"][i], 2), gains]
        rows.append(row)
    tuned = [
        (
            label,
            f"{method['best_rate']:.2e}",
            f"{method['tuned_accuracy'].mean:.2f}",
            "" if label == "Adam" else _signed(method["tuned_minus_tuned_adam"], 2),
        )
        for label, method in methods.items()
    ]
    return (
        f"Learning rates, {grid['seeds']} seeds: test accuracy of Adam, and LAMA-Adam minus Adam,"
        " points\n"
        + table(columns, rows)
        + f"\nIntervals of 95 %: by chance, one in twenty misses. Layers: {', '.join(names)}.\n\n"
        + "Tuned against tuned: rate chosen on every other seed, accuracy on the"
        + f" other {max(1, grid['seeds'] // 2)}\n"
        + table(("", "best rate", "accuracy, %", "minus tuned Adam"), tuned)
    )


def _controls(results: dict[str, Any]) -> str:
    rows = [
        (
            label,
            f"{control['accuracy'].mean:.2f}",
            "" if label == "Adam" else _signed(control["minus_adam"], 2),
        )
        for label, control in results["grid"]["controls"].items()
    ]
    return (
        f"Where a gain at learning rate {results['settings']['learning_rate']:g} comes from,"
        f" {results['grid']['seeds']} seeds\n"
        + table(("", "accuracy, %", "minus Adam"), rows)
        + "\nWith gain 1 only the momentum changes; Adam's rows change only the step size, by the"
        "\nsmallest and the largest gain that LAMA-Adam's layers had."
    )


def _signed(interval: Interval, digits: int) -> str:
    text = f"{interval.mean:+.{digits}f}"
    if math.isnan(interval.low):
        return text
    return f"{text} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
