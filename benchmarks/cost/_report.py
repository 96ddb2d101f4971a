"""What the measurements of steps say, as numbers and as a text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.cost._measure import WANTED
from benchmarks.lab._jobs import Models, Outcome, pick
from benchmarks.lab._steps import ADAM
from benchmarks.lab._timing import median_interval, paired_ratios

NOTES = """\
ms a step: the median over rounds in which all took turns, whole intervals of steps. over Adam: the
median of the rounds' ratios to optax.adam's step, and its 95 % interval. compile: tracing and
compilation. MiB: what the compiled step needs beside its arguments, its results among it."""
STARTS = {"trained": "from trained parameters on", "initial": "from the start of training"}


def summarize(outcomes: Sequence[Outcome], models: Models) -> dict[str, Any]:
    """Of each model: steps by contender, bytes of an estimate, standard errors by start."""
    result = {}
    for name, task in models.tasks.items():
        ((_, programs),) = pick(outcomes, section="program", model=name)
        blocks = [block for _, block in pick(outcomes, section="steps", model=name)]
        errors = pick(outcomes, section="error", model=name)
        result[name] = {
            "title": task.title,
            "steps": _over_adam(blocks, programs),
            "estimate_over_gradient": programs["fisher"]["bytes"] / programs["gradient"]["bytes"],
            "errors": {u["start"]: {"steps": u["steps"]} | _share(e) for u, e in errors},
        }
    return {"models": result}


def _over_adam(
    blocks: Sequence[dict[str, list[float]]], programs: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    seconds = {label: [s for block in blocks for s in block[label]] for label in blocks[0]}
    result = {}
    for label, times in seconds.items():
        ratios = paired_ratios(seconds, label, ADAM)
        result[label] = programs[label] | {
            "seconds": float(np.median(times)),
            "over_adam": float(np.median(ratios)),
            "interval": median_interval(ratios),
            "rounds": len(times),
        }
    return result


def _share(errors: dict[str, float | None]) -> dict[str, Any]:
    """The share of layers whose relative standard error is as wanted; unknown ones are not."""
    values = np.asarray([np.inf if e is None else e for e in errors.values()])
    return {
        "share": float(np.mean(values < WANTED)),
        "median": float(np.median(values)),
        "worst": float(np.max(values)),
        "by_layer": errors,
    }


def report(summary: dict[str, Any]) -> str:
    """The tables, model by model, and of all models."""
    models = summary["models"]
    return "\n\n".join([*map(_steps, models.values()), NOTES, _memory(models), _errors(models)])


def _steps(model: dict[str, Any]) -> str:
    adam = model["steps"][ADAM]
    lines = {}
    for label, found in model["steps"].items():
        low, high = found["interval"] or (np.nan, np.nan)
        lines[label] = {
            "ms a step": f"{1e3 * found['seconds']:.3g}",
            "over Adam": f"{found['over_adam']:.3f} [{low:.3f}, {high:.3f}]",
            "compile, s": f"{found['compile']:.1f}",
            "compile over Adam's": f"{found['compile'] / adam['compile']:.2f}",
            "MiB": f"{found['bytes'] / 2**20:.1f}",
            "MiB over Adam's": f"{found['bytes'] / adam['bytes']:.2f}",
        }
    table = pd.DataFrame(lines).T.to_string()
    return f"Training steps: {model['title']}; {adam['rounds']} rounds\n{table}"


def _memory(models: dict[str, Any]) -> str:
    lines = {n: {"ratio": f"{m['estimate_over_gradient']:.2f}"} for n, m in models.items()}
    title = "Memory of an estimate by fisher over that of a gradient\n"
    return title + pd.DataFrame(lines).T.to_string()


def _errors(models: dict[str, Any]) -> str:
    lines = {
        f"{name}, {found['steps']} steps {STARTS[start]}": {
            f"layers below {100 * WANTED:.0f} %": f"{100 * found['share']:.0f} %",
            "median layer": _percent(found["median"]),
            "worst layer": _percent(found["worst"]),
        }
        for name, model in models.items()
        for start, found in model["errors"].items()
    }
    return (
        "The tracker's standard error over the curvature: fisher(), every 10 steps, decay 0.9\n"
        + pd.DataFrame(lines).T.to_string()
        + "\nFresh batches at every step. While parameters move, the error holds their movement"
        " too."
    )


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %" if np.isfinite(part) else "not known"
