"""The tables that a person reads: tracked against true, prediction against steps, cost."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from benchmarks.lab._jobs import Outcome
from benchmarks.lab._timing import median_interval, paired_ratios
from benchmarks.noise_scale._cost import ALONE, INTERVALS
from benchmarks.noise_scale._workloads import workloads

#: Within this factor of the truth.
FACTOR = 1.3
WAYS = {"signs": "signs, every 10", "groups": "four groups", "raw": "plain averages"}


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything that the tables and pictures show, by workload."""
    runs = [outcome for outcome in outcomes if outcome.unit["section"] == "train"]
    models: dict[str, Any] = {}
    for name in dict.fromkeys(outcome.unit["model"] for outcome in runs):
        own = [outcome for outcome in runs if outcome.unit["model"] == name]
        models[name] = {
            "seeds": sorted({outcome.unit["seed"] for outcome in own}),
            "tracked": _tracked(own),
            "targets": _targets(own),
        }
    costs = [outcome.result for outcome in outcomes if outcome.unit["section"] == "cost"]
    return {"models": models, "cost": costs[0] if costs else None}


def _tracked(runs: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each time at which the truth was measured, after the first fifth of a run."""
    rows = []
    for unit, result in runs:
        last = result["rows"][-1]["step"]
        for row in result["rows"]:
            if row.get("true") is None or row["step"] < last / 5:
                continue
            found = {key: row["true"] if key == "true" else row[key] for key in ("true", "raw")}
            for way in ("signs", "groups"):
                report = row[way]
                # Where the interval has no end, the report says that the ratio is not known.
                found[way], error = report["noise_scale"], report["std_error"]
                found[f"{way} error"] = None if error is None else error / found[way]
                found[f"{way} covers"] = (
                    (report["at_least"] or 0) <= row["true"] <= (report["at_most"] or np.inf)
                )
            rows.append({"batch": unit["batch"], "loss": row["loss"], **found})
    return rows


def _targets(runs: Sequence[Outcome]) -> dict[str, Any]:
    """For each loss: steps by batch at the best rate, the fit, and what was tracked there."""
    found = {}
    seeds = sorted({unit["seed"] for unit, _ in runs})
    for target in dict.fromkeys(t for _, result in runs for t in result["reached"]):
        by_seed = {seed: _best(runs, target, [seed]) for seed in seeds}
        best = _best(runs, target, seeds)
        if len(best) < 4:
            continue
        fits = [fit(steps) for steps in by_seed.values() if len(steps) == len(best)]
        tracked = {way: _at(runs, target, best, way) for way in WAYS}
        steps, critical, error = fit(best)
        found[target] = {
            "steps": {batch: value for batch, (value, _) in best.items()},
            "range": {
                batch: _range(runs, target, batch, rate) for batch, (_, rate) in best.items()
            },
            "least_steps": steps,
            "critical": critical,
            "error": error,
            "by_seed": [critical for _, critical, _ in fits],
            "tracked": {way: values for way, values in tracked.items() if values},
        }
    return found


def _best(
    runs: Sequence[Outcome], target: str, seeds: Sequence[int]
) -> dict[int, tuple[float, float]]:
    """Batch -> the fewest steps, as a geometric mean over the seeds, and the rate that had them."""
    best: dict[int, tuple[float, float]] = {}
    for batch in sorted({unit["batch"] for unit, _ in runs}):
        options = []
        for rate in sorted({unit["rate"] for unit, _ in runs}):
            steps = [
                result["reached"].get(target, np.inf)  # not reached: this rate is not the best
                for unit, result in runs
                if (unit["batch"], unit["rate"]) == (batch, rate) and unit["seed"] in seeds
            ]
            if steps:
                options.append((float(np.exp(np.mean(np.log(steps)))), rate))
        if options and np.isfinite(min(options)[0]):
            best[batch] = min(options)
    return best


def _range(runs: Sequence[Outcome], target: str, batch: int, rate: float) -> tuple[float, float]:
    """The fewest and the most steps of a seed."""
    steps = [
        result["reached"][target]
        for unit, result in runs
        if (unit["batch"], unit["rate"]) == (batch, rate)
    ]
    return min(steps), max(steps)


def fit(best: dict[int, tuple[float, float]]) -> tuple[float, float, float]:
    """S_min, B_c and the relative error of S_min (1 + B_c / B), fitted to logarithms of steps."""
    batches = np.asarray(list(best), float)
    logs = np.log([steps for steps, _ in best.values()])

    def residual(x: np.ndarray) -> np.ndarray:
        return np.log(np.exp(x[0]) + np.exp(x[1]) / batches) - logs

    x = least_squares(residual, [logs.min(), logs.max() + np.log(batches.min())]).x
    freedom = max(1, len(batches) - 2)
    error = float(np.sqrt(np.sum(residual(x) ** 2) / freedom))
    return float(np.exp(x[0])), float(np.exp(x[1] - x[0])), error


def predict(steps: dict[Any, float], scale: float, batches: np.ndarray) -> np.ndarray:
    """Steps at ``batches`` for a noise scale, which gives the shape; the height is fitted."""
    known = np.asarray([int(batch) for batch in steps])
    height = np.exp(np.mean(np.log(np.asarray(list(steps.values())) / (1 + scale / known))))
    return height * (1 + scale / batches)


def tracked(found: dict[str, Any]) -> list[float]:
    """The noise scales at a target: by groups, or where they know none, by signs."""
    ways = found["tracked"]
    return ways.get("groups") or ways.get("signs") or []


def _at(
    runs: Sequence[Outcome], target: str, best: dict[int, tuple[float, float]], way: str
) -> list[float]:
    """What was tracked where the best rate's runs reached the target, where it was known."""
    values = []
    for unit, result in runs:
        if unit["batch"] not in best or unit["rate"] != best[unit["batch"]][1]:
            continue
        for row in result["rows"]:
            if float(target) in row["targets"]:
                value = row["raw"] if way == "raw" else row[way]["noise_scale"]
                if value is not None:
                    values.append(value)
    return values


def report(summary: dict[str, Any]) -> str:
    """All tables, in the order in which their questions arise."""
    titles = {name: w.title for quick in (True, False) for name, w in workloads(quick).items()}
    sections = []
    for name, model in summary["models"].items():
        seeds = len(model["seeds"])
        sections.append(f"{titles[name]}; {seeds} seed{'s' * (seeds > 1)}")
        sections += [_tracked_table(model["tracked"]), _targets_table(model["targets"])]
    if summary["cost"]:
        sections.append(_cost_table(summary["cost"]))
    return "\n\n".join(section for section in sections if section)


def _tracked_table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    frame = pd.DataFrame(rows)
    lines = []
    for batch, part in frame.groupby("batch"):
        line = {"batch": batch, "true": f"{part.true.median():.0f}"}
        for way, title in WAYS.items():
            ratio = (part[way].astype(float) / part.true).dropna()
            known = len(ratio)
            within = int(((ratio <= FACTOR) & (ratio >= 1 / FACTOR)).sum())
            line[title] = f"{ratio.median():.2f}" if known else "not known"
            line[f"{title}, within"] = f"{within} of {known}"
            if way != "raw":
                error = part[f"{way} error"].astype(float).median()
                line[f"{title}, error"] = f"{error:.2f}" if known else "-"
        lines.append(line)
    text = pd.DataFrame(lines).to_string(index=False)
    covered = [f"{100 * frame[f'{way} covers'].mean():.0f} %" for way in ("signs", "groups")]
    return (
        "Tracked over true noise scale, after the first fifth of training\n"
        f"within: a factor of {FACTOR}, of those that are known; error: the standard error that is"
        f" reported, over the noise scale; medians\n{text}\n"
        f"The 95 % interval holds the truth in {covered[0]} (signs) and {covered[1]} (groups) of"
        f" {len(frame)}."
    )


def _targets_table(targets: dict[str, Any]) -> str:
    lines = []
    for target, found in targets.items():
        low, high = (min(found["by_seed"]), max(found["by_seed"])) if found["by_seed"] else (0, 0)
        line = {
            "loss": target,
            "least steps": f"{found['least_steps']:.0f}",
            "critical batch": f"{found['critical']:.0f}",
            "by seed": f"{low:.0f} to {high:.0f}",
            "fit's error": f"{100 * found['error']:.1f} %",
        }
        for way, values in found["tracked"].items():
            line[WAYS[way]] = f"{np.median(values):.0f}"
        if scales := tracked(found):
            steps = np.asarray(list(found["steps"].values()))
            predicted = predict(
                found["steps"], float(np.median(scales)), np.asarray(list(found["steps"]))
            )
            ratios = predicted / steps
            line["predicted over measured"] = f"{ratios.min():.2f} to {ratios.max():.2f}"
        lines.append(line)
    if not lines:
        return ""
    return (
        "Critical batch B_c fitted to the steps to a loss, S_min (1 + B_c / B), at each batch's"
        " best rate,\nand the noise scale tracked there (median over batches and seeds). predicted"
        " over measured: steps by\nthat of four groups, the height fitted, at the batches where it"
        " is smallest and largest\n" + pd.DataFrame(lines).to_string(index=False)
    )


def _cost_table(cost: dict[str, Any]) -> str:
    lines = []
    for name in INTERVALS:
        ratios = paired_ratios(cost["seconds"], name, ALONE)
        interval = median_interval(ratios)
        bounds = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
        lines.append(
            {
                "": name,
                "time": f"{np.median(ratios):.2f}{bounds}",
                "memory": f"{cost['memory'][name] / cost['memory'][ALONE]:.2f}",
            }
        )
    return (
        f"A step over optax.adam's: median over {len(cost['seconds'][ALONE])} rounds in which all"
        " took turns, [95 % interval of it]\n" + pd.DataFrame(lines).to_string(index=False)
    )
