"""The arms of the study: a program, what is fixed and what is tuned, equally often for all."""

import dataclasses
from typing import Any

from benchmarks.study._axes import Axis

Hypers = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One optimizer of the comparison; ``axes`` are tuned, ``fixed`` replace defaults."""

    name: str
    program: str
    axes: tuple[Axis, ...]
    fixed: Hypers = dataclasses.field(default_factory=dict)


def _rate(low: float, high: float, count: int) -> Axis:
    return Axis("lr", "log", low, high, count)


def _momentum(count: int, name: str = "b1") -> Axis:
    """0.684, 0.9, 0.968: above and below the usual value; 0 is a natural bound."""
    high = 1.5 if count == 3 else 1.0
    return Axis(name, "momentum", 0.5, high, count, (0.0, 4.0))


def _axes(name: str, trials: int) -> tuple[Axis, ...]:
    """The first grid of an arm: ``trials`` points, a multiple of 12, whatever the axes."""
    third, quarter = trials // 3, trials // 4
    adam = -3.75, -0.25
    if name == "sgd":
        return _rate(-2.5, 1.0, third), _momentum(3, "momentum")
    if name == "rmsprop":
        return _rate(*adam, third), Axis("decay", "momentum", 1.0, 3.0, 3, (0.0, 4.0))
    if name == "sophia":
        return _rate(*adam, third), Axis("gamma", "log", -3.0, -1.0, 3)
    if name in ("adam_b1", "v4"):
        return _rate(*adam, third), _momentum(3)
    if name in ("lama", "lama_ema"):
        # +-9 and +-99: lambda H of order 1 where H is 0.01 to 0.1. The paper's is its own arm.
        return _rate(*adam, quarter), Axis("sensitivity", "signed", -2.0, 2.0, 4, (-5.0, 5.0))
    if name == "v1":
        sign = Axis("sensitivity", "signed", -0.3, 0.3, 2, (-5.0, 5.0))
        return _rate(*adam, quarter), _momentum(2), sign
    if name == "v4_fixed":
        nu = Axis("nu", "linear", 0.6, 0.9, 2, (0.0, 1.0))
        return _rate(*adam, quarter), _momentum(2), nu
    if name == "v5":
        return _rate(*adam, quarter), _momentum(2), Axis("c", "log", -1.0, 0.0, 2)
    if name == "v6":
        power = Axis("power", "linear", -0.25, 0.25, 2, (-1.0, 1.0))
        return _rate(*adam, quarter), _momentum(2), power
    if name in ("v3", "v3_global"):
        return (_rate(-4.0, 1.0, trials),)
    return (_rate(*adam, trials),)


def make_arm(name: str, trials: int) -> Arm:
    """The arm called ``name``, tuned by ``trials`` trials a round."""
    programs = {"adam_b1": "adam", "lama_paper": "lama", "v3_global": "v3", "v4_fixed": "v4"}
    fixed: dict[str, Hypers] = {
        # One averaged probe in place of K = 10, which makes no difference at this lambda.
        "lama_paper": {"sensitivity": 0.01},
        "v3_global": {"pool": 1.0},
    }
    return Arm(name, programs.get(name, name), _axes(name, trials), fixed.get(name, {}))
