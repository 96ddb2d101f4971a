"""What the measurements say: ratios to Adam, distances to the floor, slopes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.cost._adahessian import TORCH_ADAM
from benchmarks.cost._floor import floor_seconds
from benchmarks.cost._steps import groups
from benchmarks.lab._jobs import Models, Outcome
from benchmarks.lab._steps import ADAM, Contender, default_flipout
from benchmarks.lab._timing import (
    Spread,
    median_interval,
    paired_ratio,
    paired_ratios,
    slope,
)
from benchmarks.moons._settings import Settings as MoonsSettings
from lama_optax import layer_names

MOONS_STEPS = MoonsSettings.epochs * math.ceil(
    MoonsSettings.samples * (1 - MoonsSettings.test_share) / MoonsSettings.batch_size
)


def summarize(outcomes: Sequence[Outcome], models: Models, quick: bool) -> dict[str, Any]:
    """Everything that the tables and pictures show."""
    found = _Found(outcomes)
    return {
        "models": {
            name: {
                "title": task.title,
                "flipout": default_flipout(len(layer_names(models[name].params))),
                "floor": found.one(section="floor", model=name),
                "steps": _steps(found, name, quick),
                "torch": _torch(found.one(section="torch", model=name)),
                "probes": {
                    str(unit["num_probes"]): result
                    for unit, result in found.all(section="probes", model=name)
                },
                "resident": {
                    unit["contender"]: result
                    for unit, result in found.all(section="resident", model=name)
                },
            }
            for name, task in models.tasks.items()
        },
        "growth": _growth(found),
        "moons": _moons(found),
    }


class _Found:
    """The results by what their units say."""

    def __init__(self, outcomes: Sequence[Outcome]):
        self._outcomes = outcomes

    def all(self, **wanted: Any) -> list[Outcome]:
        """The results whose units say all that is wanted."""
        return [o for o in self._outcomes if all(o.unit.get(k) == v for k, v in wanted.items())]

    def one(self, **wanted: Any) -> Any | None:
        """The first of them, or None."""
        return next((result for _, result in self.all(**wanted)), None)


def _steps(found: _Found, name: str, quick: bool) -> dict[str, dict[str, Any]]:
    """Of each group and contender: seconds, ratio to Adam, floor, memory."""
    floor = found.one(section="floor", model=name)
    result = {}
    for group, (contenders, _) in groups(quick).items():
        blocks = found.all(section="steps", model=name, group=group)
        seconds = {c: [s for _, r in blocks for s in r[c]] for c in contenders}
        temp = found.one(section="temp", model=name, group=group) or {}
        result[group] = {
            label: {
                "seconds": Spread.of(seconds[label]),
                "over_adam": paired_ratio(seconds, label, ADAM),
                "interval": median_interval(paired_ratios(seconds, label, ADAM)),
                "rounds": len(seconds[label]),
                "temp_bytes": temp[label],
                "over_floor": _over_floor(floor, contender, seconds[label]),
            }
            for label, contender in contenders.items()
        }
    return result


def _over_floor(floor: Any, contender: Contender, seconds: Sequence[float]) -> float | None:
    if contender.scope is None and not contender.gradient_only:
        return None
    least = floor_seconds(floor, contender.scope, contender.num_probes, contender.interval)
    return float(np.median(seconds)) / least


def _torch(result: dict[str, Any] | None) -> dict[str, Any] | None:
    if result is None or "missing" in result:
        return result
    return {
        label: {"seconds": Spread.of(times), "over_adam": paired_ratio(result, label, TORCH_ADAM)}
        for label, times in result.items()
    }


def _growth(found: _Found) -> dict[str, dict[str, Any]]:
    """Of each axis and contender: sizes, median seconds, and the slope of the larger half."""
    axes: dict[str, dict[str, Any]] = {}
    for unit, result in found.all(section="growth"):
        lines = axes.setdefault(unit["axis"], {})
        for label, times in result.items():
            line = lines.setdefault(label, {"sizes": [], "seconds": []})
            line["sizes"].append(unit["size"])
            line["seconds"].append(float(np.median(times)))
    for lines in axes.values():
        for line in lines.values():
            larger = slice(-max(2, (len(line["sizes"]) + 1) // 2), None)
            sizes, seconds = line["sizes"][larger], line["seconds"][larger]
            line["slope"] = slope(sizes, seconds) if len(sizes) > 1 else None
    return axes


def _moons(found: _Found) -> dict[str, Any]:
    """Seeds per second of each way to train the paper's experiment."""
    ours, torch = (found.one(section="moons", what=what) for what in ("jax", "torch"))
    result: dict[str, Any] = {"torch": torch}
    for arm, times in (ours or {}).items():
        result[arm] = {"seeds_per_second": 1 / (float(np.median(times)) * MOONS_STEPS)}
    if torch is not None and "seconds" in torch:
        per_second = 1 / (torch["seconds"] * MOONS_STEPS)
        result["torch"] = torch | {"seeds_per_second": per_second}
        for arm in ours or {}:
            result[arm]["times_torch"] = result[arm]["seeds_per_second"] / per_second
    return result
