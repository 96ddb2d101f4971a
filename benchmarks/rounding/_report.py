"""The tables that a person reads: predicted against measured, and choice against choice."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.lab._jobs import Outcome
from benchmarks.rounding._networks import networks

#: The way whose curvature is of data that training did not see.
VALIDATION = "fisher, validation data"


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Each network's trainings; what was measured on validation data is one more way."""
    found: dict[str, list[Any]] = {}
    for unit, result in outcomes:
        if unit["section"] == "rounding":
            found.setdefault(unit["model"], []).append(result)
            continue
        training = found[unit["model"]][-1]
        training["prediction"][VALIDATION] = result["prediction"]
        for budget, choice in result["choices"].items():
            training["choices"][budget]["rises"][VALIDATION] = choice["rise"]
            training["choices"][budget]["accuracy"][VALIDATION] = choice["accuracy"]
    return {"models": found}


def report(summary: dict[str, Any]) -> str:
    """For each network a table of predictions and one of choices."""
    titles = {name: n.title for quick in (True, False) for name, n in networks(quick).items()}
    sections = []
    for name, trainings in summary["models"].items():
        loss = _show([t["loss"] for t in trainings], "{:.3f}")
        sections.append(
            f"{titles[name]}; trainings: {len(trainings)}, held-out loss {loss}, arrays that are"
            f" rounded: {trainings[0]['layers']}"
        )
        sections += [_predictions(trainings), _choices(trainings), _times(trainings)]
    sections.append(
        "Medians over the trainings, [least, most] in brackets. Rises are of the held-out loss,"
        " from data\nthat neither training, curvature nor verification saw."
    )
    return "\n\n".join(sections)


def _show(values: Sequence[float], form: str) -> str:
    """The median and the range."""
    array = np.asarray(values, float)
    if len(array) == 1:
        return form.format(array[0])
    return f"{form} [{form}, {form}]".format(np.median(array), array.min(), array.max())


def _predictions(trainings: Sequence[Any]) -> str:
    lines = []
    for way in trainings[0]["prediction"]:
        rank = [t["prediction"][way]["rank"] for t in trainings]
        line = {"": way, "rank correlation": _show(rank, "{:.3f}")}
        scaled = way != "weight error alone" and not way.startswith("Adam")
        ratio = [t["prediction"][way]["ratio"] for t in trainings]
        line["predicted over measured"] = _show(ratio, "{:.2f}") if scaled else "no scale"
        lines.append(line)
    return "Random configurations of 3 to 8 bits\n" + pd.DataFrame(lines).to_string(index=False)


def _choices(trainings: Sequence[Any]) -> str:
    parts = []
    for budget in trainings[0]["choices"]:
        lines = []
        for way in dict.fromkeys(w for t in trainings for w in t["choices"][budget]["rises"]):
            found = [t["choices"][budget] for t in trainings]
            found = [f for f in found if way in f["rises"]]
            over = [f["rises"][way] / f["rises"]["uniform"] for f in found]
            line = {"": way, "rise": _show([f["rises"][way] for f in found], "{:+.4f}")}
            line["over uniform's"] = _show(over, "{:.2f}")
            if len(found) < len(trainings):
                line["over uniform's"] += f", {len(found)} of {len(trainings)}"
            if way in found[0]["accuracy"]:
                line["accuracy"] = _show([f["accuracy"][way] for f in found], "{:.3f}")
            lines.append(line)
        table = pd.DataFrame(lines).to_string(index=False, na_rep="")
        parts.append(f"A mean of {budget} bits\n{table}")
    return "\n\n".join(parts)


def _times(trainings: Sequence[Any]) -> str:
    rows = {
        "fisher and the choice at 4": ("fisher", "choice at 4"),
        "the same, verified": ("fisher", "verified choice at 4"),
        "greedy measurement at 4": ("greedy at 4",),
    }
    lines = []
    for title, names in rows.items():
        seconds = [sum(t["seconds"][name] for name in names) for t in trainings]
        gradients = [s / t["gradient"] for s, t in zip(seconds, trainings, strict=True)]
        line = {"": title, "seconds": _show(seconds, "{:.1f}")}
        lines.append(line | {"gradients of a training batch": _show(gradients, "{:.0f}")})
    return "Time\n" + pd.DataFrame(lines).to_string(index=False)
