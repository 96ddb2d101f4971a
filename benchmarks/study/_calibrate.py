"""Where the boxes come from: a coarse search at one seed, outside of all studies."""

from collections.abc import Iterable

import pandas as pd
from tqdm import tqdm

from benchmarks.lab._store import Store
from benchmarks.study._arms import ARMS, Hyper
from benchmarks.study._plan import settings
from benchmarks.study._train import run
from benchmarks.study._workload import Workload

STUDY = 1000
#: Where the search starts, and what it looks at; 0 is Adam.
START = {"lr": 3e-3, "1-b1": 0.1, "lambda": 0.0}
VALUES = {
    "decay": (0.001, 0.01, 0.1, 1.0),
    "1-b1": (0.03, 0.1, 0.3, 1.0),
    "lambda": (-1000.0, -100.0, -10.0, -1.0, 0.0, 1.0, 10.0, 100.0),
}
RATE_STEP = 10**0.5


def calibrate(store: Store, chosen: Iterable[Workload]) -> str:
    """The table of each arm's best: the second axis first, then the rate, until it lies inside."""
    lines = []
    for workload in chosen:
        found: dict[str, Hyper] = {}
        for name in (name for name in workload.arms if name != "A'"):
            # A came first: the others start at its rate.
            best, tried = _search(store, workload, name, found.get("A", {}).get("lr", START["lr"]))
            found[name] = best
            lines.append({"workload": workload.name, "arm": name, "runs": tried, "best": best})
    return pd.DataFrame(lines).to_string(index=False, max_colwidth=80)


def _search(store: Store, workload: Workload, name: str, rate: float) -> tuple[Hyper, int]:
    losses: dict[tuple[float, float], float] = {}
    second = ARMS[name].axes[1]

    def loss(lr: float, value: float) -> float:
        hyper = {"lr": float(f"{lr:.3g}"), second: value}
        unit = settings(workload) | {"section": name, "study": STUDY, "hyper": hyper}
        result = store.run(unit, lambda: run(workload, name, hyper, STUDY, 0))
        key = (hyper["lr"], value)
        if key not in losses:
            tqdm.write(f"{workload.name} {name} {hyper} {result['validation']:.4f}")
        return losses.setdefault(key, result["validation"])

    value = min(VALUES[second], key=lambda value: loss(rate, value))
    rates = [rate / RATE_STEP, rate, rate * RATE_STEP]
    while True:
        ordered = sorted(rates, key=lambda lr: loss(lr, value))
        if ordered[0] == rates[0]:
            rates.insert(0, rates[0] / RATE_STEP)
        elif ordered[0] == rates[-1]:
            rates.append(rates[-1] * RATE_STEP)
        else:
            return {"lr": float(f"{ordered[0]:.3g}"), second: value}, len(losses)
