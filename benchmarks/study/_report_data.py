"""The JSON lines of a results folder as arrays, and the comparisons that the report makes of them.

A line is one unit of work: one arm with one setting, over all its seeds. Whatever was not run is
simply absent, and every reader copes with that.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.study._statistics import (
    LEVEL,
    Aggregate,
    Array,
    Comparison,
    aggregate,
    compare,
    holm,
)

Line = dict[str, Any]

#: What every arm is compared with: tuned Adam, its momentum tuned too.
BASE = "adam_b1"
#: The same, or Adam with b1 = 0.9 where that has the lower validation loss: b1 costs an axis of the
#: grid, so that on a coarse one Adam(lr) may be the better tuned.
BETTER_ADAM = "better_adam"
#: An arm that diverges on this share of the runs more than the base is worse, whatever its mean.
EXCESS_DIVERGED = 0.01


class Runs(NamedTuple):
    """One arm's runs on one workload, all seeds: one line."""

    arm: str
    seeds: np.ndarray
    test: Array  # held-out loss, infinite where the run diverged
    line: Line

    @property
    def id(self) -> str:
        """Id of the line."""
        return str(self.line["id"])

    @property
    def finite_mean(self) -> float:
        """Mean held-out loss of the runs that did not diverge."""
        finite = self.test[np.isfinite(self.test)]
        return float(finite.mean()) if finite.size else math.nan

    def values(self, key: str, missing: float = math.inf) -> Array:
        """A list that the line carries per seed, ``missing`` where it is null."""
        return _numbers(self.line[key], missing)

    def number(self, key: str) -> float:
        """A number that the line carries once; NaN if it does not."""
        value = self.line.get(key)
        return math.nan if value is None else float(value)


class Trial(NamedTuple):
    """One setting that was tried in tuning."""

    rate: float
    hypers: dict[str, float]
    losses: Array  # (seeds,) validation loss, infinite where the run diverged
    id: str


class Judged(NamedTuple):
    """A comparison on one workload, its p-values adjusted for the number of workloads."""

    comparison: Comparison
    p: float
    p_equivalent: float

    @property
    def word(self) -> str:
        """``worse (diverges)``, ``equivalent``, ``better``, ``worse`` or ``undecided``.

        Equivalence comes before better and worse: what differs by less than the margin is the same
        to a user, however sure its sign.
        """
        found = self.comparison
        if found.diverged > found.base_diverged + EXCESS_DIVERGED:
            return "worse (diverges)"
        if self.p_equivalent < LEVEL:
            return "equivalent"
        if self.p < LEVEL and found.relative.below_zero:
            return "better"
        if self.p < LEVEL and found.relative.above_zero:
            return "worse"
        return "undecided"


class Study:
    """All lines of a results folder, by workload."""

    def __init__(self, lines: Mapping[str, Sequence[Line]]):
        self.workloads = list(lines)
        self._lines = lines
        self._comparisons: dict[tuple[str, str], Comparison] = {}
        self._trials: dict[tuple[str, str], list[Trial]] = {}
        self._aggregates: dict[tuple[str, str], Aggregate | None] = {}

    def lines(self, kind: str, workload: str) -> Iterator[Line]:
        """The lines of one kind: tune, final, headroom or question."""
        return (line for line in self._lines[workload] if line["kind"] == kind)

    def all_lines(self, workload: str) -> Sequence[Line]:
        """The lines of every kind."""
        return self._lines[workload]

    @cached_property
    def _final(self) -> dict[str, dict[str, Runs]]:
        return {w: _runs_by(self.lines("final", w), "arm") for w in self.workloads}

    @cached_property
    def _headroom(self) -> dict[str, dict[str, Runs]]:
        return {w: _runs_by(self.lines("headroom", w), "search") for w in self.workloads}

    def runs(self, workload: str, arm: str) -> Runs | None:
        """The final runs of one arm, or None if there are none."""
        if arm == BETTER_ADAM:
            best = {a: self.best_score(workload, a) for a in (BASE, "adam")}
            arm = min(best, key=lambda a: best[a])
        return self._final[workload].get(arm)

    def arms(self) -> list[str]:
        """All arms with final runs, in the order in which they appear."""
        return list(dict.fromkeys(arm for found in self._final.values() for arm in found))

    def headroom(self, workload: str) -> dict[str, Runs]:
        """What each search for headroom found, on held-out seeds."""
        return self._headroom[workload]

    def trials(self, workload: str, arm: str) -> list[Trial]:
        """All settings that were tried for one arm, on the same steps and the most seeds."""
        if (workload, arm) not in self._trials:
            self._trials[workload, arm] = self._find_trials(workload, arm)
        return self._trials[workload, arm]

    def _find_trials(self, workload: str, arm: str) -> list[Trial]:
        lines = [line for line in self.lines("tune", workload) if line["arm"] == arm]
        chosen = _with_most_seeds(lines)
        if chosen is None:
            return []
        found = {
            json.dumps(line["hypers"], sort_keys=True): Trial(
                float(line["hypers"]["lr"]),
                line["hypers"],
                _losses(line, "validation_loss"),
                line["id"],
            )
            for line in lines
            if (line["seeds"], line["steps"]) == (chosen["seeds"], chosen["steps"])
        }
        return list(found.values())

    def best_score(self, workload: str, arm: str) -> float:
        """The lowest mean validation loss of the arm's trials; infinite if it was not tuned."""
        return min((t.losses.mean() for t in self.trials(workload, arm)), default=math.inf)

    def compare(self, runs: Runs, base: Runs) -> Comparison:
        """Compares over the seeds that both have."""
        key = (runs.id, base.id)
        if key not in self._comparisons:
            self._comparisons[key] = compare(*paired(runs, base))
        return self._comparisons[key]

    def judge(self, arm: str, base: str = BASE) -> dict[str, Judged]:
        """One arm against another on every workload that has both; Holm over the workloads."""
        pairs = {w: (self.runs(w, arm), self.runs(w, base)) for w in self.workloads}
        return self.judge_runs(pairs)

    def judge_runs(self, pairs: Mapping[str, tuple[Runs | None, Runs | None]]) -> dict[str, Judged]:
        """The same for pairs of runs; a workload that misses one of them is left out."""
        found = {w: self.compare(a, b) for w, (a, b) in pairs.items() if a and b}
        p = holm([c.p for c in found.values()])
        p_equivalent = holm([c.p_equivalent for c in found.values()])
        return {
            w: Judged(c, float(p[i]), float(p_equivalent[i]))
            for i, (w, c) in enumerate(found.items())
        }

    def aggregate(self, arm: str, base: str = BASE) -> Aggregate | None:
        """One arm against another over all workloads that have both; None if there are none."""
        if (arm, base) not in self._aggregates:
            pairs = [(self.runs(w, arm), self.runs(w, base)) for w in self.workloads]
            both = [paired(a, b) for a, b in pairs if a and b]
            usable = [(a, b) for a, b in both if len(a) and np.isfinite(b).any()]
            self._aggregates[arm, base] = aggregate(*zip(*usable, strict=True)) if usable else None
        return self._aggregates[arm, base]


def load(results: Path) -> Study:
    """Reads ``results/*.jsonl``; a last line that an interruption cut short is left out.

    Raises:
      ValueError: if there is no such file, or a line that is not JSON stands elsewhere.
    """
    paths = sorted(results.glob("*.jsonl"))
    if not paths:
        raise ValueError(
            f"--results must be a folder with the study's .jsonl files; {results} has none."
        )
    return Study({path.stem: _read(path) for path in paths})


def _read(path: Path) -> list[Line]:
    text = path.read_text(encoding="utf-8").splitlines()
    lines: dict[str, Line] = {}
    for number, line in enumerate(text, 1):
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(text):
                break
            raise ValueError(f"{path.name}, line {number}: not JSON: {error}.") from error
        lines.setdefault(found["id"], found)
    return list(lines.values())


def paired(runs: Runs, base: Runs) -> tuple[Array, Array]:
    """The losses of both over the seeds that both have."""
    _, i, j = np.intersect1d(runs.seeds, base.seeds, return_indices=True)
    return runs.test[i], base.test[j]


def _runs_by(lines: Iterator[Line], name: str) -> dict[str, Runs]:
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(str(line[name]), []).append(line)
    return {key: runs_of(key, group) for key, group in groups.items()}


def runs_of(name: str, lines: Sequence[Line]) -> Runs:
    """The runs to report of one arm: of several lines, the last with the most seeds."""
    line = _with_most_seeds(lines)
    assert line is not None, name
    return Runs(name, np.asarray(line["seeds"]), _losses(line, "test_loss"), line)


def _with_most_seeds(lines: Sequence[Line]) -> Line | None:
    # max keeps the first of equals: from the end, that is the last.
    return max(reversed(lines), key=lambda line: len(line["seeds"]), default=None)


def _losses(line: Line, key: str) -> Array:
    return np.where(line["diverged"], math.inf, _numbers(line[key], math.inf))


def _numbers(values: Sequence[float | None], missing: float) -> Array:
    return np.array([missing if value is None else value for value in values], np.float64)
