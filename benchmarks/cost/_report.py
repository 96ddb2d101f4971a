"""What the measurements of steps say, as numbers and as a text."""

from collections.abc import Sequence
from typing import Any

from benchmarks.cost._steps import groups
from benchmarks.lab._jobs import Models, Outcome, pick
from benchmarks.lab._steps import over_adam
from benchmarks.lab._tables import table
from benchmarks.lab._timing import Spread

NOTES = """\
Medians over rounds in which all contenders took turns; [least, most] in brackets. over Adam: the
median of the rounds' ratios to optax.adam's step. temp: memory that the compiled step needs beside
its arguments and results."""


def summarize(outcomes: Sequence[Outcome], models: Models, quick: bool) -> dict[str, Any]:
    """Everything that the tables and pictures show."""
    result = {}
    for name, task in models.tasks.items():
        probes = pick(outcomes, section="probes", model=name)
        result[name] = {
            "title": task.title,
            "steps": {group: _group(outcomes, name, group) for group in groups(quick)},
            "probes": {str(unit["num_probes"]): found for unit, found in probes},
        }
    return {"models": result}


def _group(outcomes: Sequence[Outcome], name: str, group: str) -> dict[str, dict[str, Any]]:
    """Of each contender: seconds, ratio to Adam, memory."""
    blocks = pick(outcomes, section="steps", model=name, group=group)
    ((_, temp),) = pick(outcomes, section="temp", model=name, group=group)
    found = over_adam([block for _, block in blocks])
    return {label: found[label] | {"temp_bytes": temp[label]} for label in temp}


def report(summary: dict[str, Any]) -> str:
    """All tables, in the order in which their questions arise."""
    models = summary["models"]
    return "\n\n".join([*map(_steps, models.values()), NOTES, _probes(models)])


def _times(spread: Spread) -> str:
    low, high = 1e3 * spread.low, 1e3 * spread.high
    return f"{1e3 * spread.median:.3g} [{low:.3g}, {high:.3g}]"


def _ratios(spread: Spread) -> str:
    return f"{spread.median:.3f} [{spread.low:.2f}, {spread.high:.2f}]"


def _steps(model: dict[str, Any]) -> str:
    rows: list[Sequence[str]] = []
    for group, contenders in model["steps"].items():
        rounds = next(iter(contenders.values()))["rounds"]
        rows.append([f"{group}, {rounds} rounds", *[""] * 3])
        for label, found in contenders.items():
            temp = f"{found['temp_bytes'] / 2**20:.1f}"
            rows.append([f"  {label}", _times(found["seconds"]), _ratios(found["over_adam"]), temp])
    header = ["", "ms a step", "over Adam", "temp, MiB"]
    return f"Training steps: {model['title']}\n{table(header, rows)}"


def _probes(models: dict[str, Any]) -> str:
    rows = []
    for name, model in models.items():
        few, many = model["probes"].values()
        for estimator in few:
            ratio = many[estimator] / few[estimator] if few[estimator] else 1.0
            mib = [f"{found[estimator] / 2**20:.2f}" for found in (few, many)]
            rows.append([f"{name}: {estimator}", *mib, f"{ratio:.2f}"])
    low, high = (f"K={k}, MiB" for k in next(iter(models.values()))["probes"])
    header = ["", low, high, "ratio"]
    return f"Memory of the compiled estimate at the default chunk\n{table(header, rows)}"
