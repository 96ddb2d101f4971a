"""What the measurements of `track_curvature` say, as numbers and as a text."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.cost._tracking import WANTED
from benchmarks.lab._jobs import Models, Outcome, pick
from benchmarks.lab._steps import ADAM, over_adam
from benchmarks.lab._tables import table

STARTS = {"trained": "from trained parameters on", "initial": "from the start of training"}


def summarize(outcomes: Sequence[Outcome], models: Models) -> dict[str, Any]:
    """Of each model: steps by contender, bytes of an estimate, standard errors by start."""
    result = {}
    for name, task in models.tasks.items():
        ((_, programs),) = pick(outcomes, section="tracking program", model=name)
        blocks = pick(outcomes, section="tracking", model=name)
        steps = over_adam([block for _, block in blocks])
        for label, found in steps.items():
            for key in ("compile", "bytes"):
                found[key] = programs[label][key]
                found[f"{key}_over_adam"] = programs[label][key] / programs[ADAM][key]
        errors = pick(outcomes, section="tracking error", model=name)
        result[name] = {
            "title": task.title,
            "steps": steps,
            "estimate_over_gradient": programs["fisher"]["bytes"] / programs["gradient"]["bytes"],
            "errors": {u["start"]: {"steps": u["steps"]} | _share(e) for u, e in errors},
        }
    return {"models": result}


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
    sections = [_steps(model) for model in models.values()]
    return "\n\n".join([*sections, _memory(models), _errors(models)])


def _steps(model: dict[str, Any]) -> str:
    rows, rounds = [], model["steps"][ADAM]["rounds"]
    for label, found in model["steps"].items():
        interval = found["interval"]
        rows.append(
            [
                label,
                f"{1e3 * found['seconds'].median:.3g}",
                f"{found['over_adam'].median:.3f}",
                "" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]",
                f"{found['compile']:.1f}",
                f"{found['compile_over_adam']:.2f}",
                f"{found['bytes'] / 2**20:.1f}",
                f"{found['bytes_over_adam']:.2f}",
            ]
        )
    header = ["", "ms a step", "over Adam", "95 %", "compile, s", "over Adam", "MiB", "over Adam"]
    return (
        f"Training steps: {model['title']}\n"
        + table(header, rows)
        + f"\nMedians over {rounds} rounds in which all took turns, whole intervals of"
        " steps. compile: tracing and\ncompilation. MiB: what the compiled step needs beside its"
        " arguments, its results among it."
    )


def _memory(models: dict[str, Any]) -> str:
    rows = [[name, f"{model['estimate_over_gradient']:.2f}"] for name, model in models.items()]
    return "Memory of an estimate by fisher over that of a gradient\n" + table(["", "ratio"], rows)


def _errors(models: dict[str, Any]) -> str:
    rows = []
    for name, model in models.items():
        for start, found in model["errors"].items():
            label = f"{name}, {found['steps']} steps {STARTS[start]}"
            figures = [f"{100 * found[k]:.0f} %" for k in ("share", "median", "worst")]
            rows.append([label, *figures])
    header = ["", f"layers below {100 * WANTED:.0f} %", "median layer", "worst layer"]
    return (
        "The tracker's standard error over the curvature: fisher(), every 10 steps, decay 0.9\n"
        + table(header, rows)
        + "\nFresh batches at every step. While parameters move, the error holds their movement"
        " too."
    )
