"""Tuning: every arm gets the same trials, round after round, until no optimum is at an edge."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.study._arms import Arm, make_arm
from benchmarks.study._axes import FLAT, MIN_ROUNDS, edges, first_round, next_round
from benchmarks.study._plan import Bench, tune_seeds
from benchmarks.study._programs import PROGRAMS
from benchmarks.study._store import Line

Hypers = dict[str, Any]


def tune(bench: Bench, arms: Sequence[str]) -> None:
    """Runs all rounds of all arms; if one arm needs another round, every arm gets it."""
    built = [make_arm(name, bench.workload.trials) for name in arms]
    for number in range(bench.rounds):
        grids = {}
        for arm in built:
            tried = trials(bench, arm.name)
            earlier = [line for line in tried if line["round"] < number]
            grids[arm.name] = _grid(arm, earlier, number)
        for arm in built:
            _run_round(bench, arm, grids[arm.name], number)
        if number + 1 < min(MIN_ROUNDS, bench.rounds):
            continue
        if not any(at_edge(bench, arm) or _has_later(bench, arm, number) for arm in built):
            left = (bench.rounds - number - 1) / bench.rounds
            bench.progress.expect(-left * tune_work(bench, arms))
            break


def _has_later(bench: Bench, arm: Arm, number: int) -> bool:
    """Whether an arm had rounds after this one already: an arm that came later gets them too."""
    return any(line["round"] > number for line in trials(bench, arm.name))


def _grid(arm: Arm, earlier: Sequence[Line], number: int) -> list[Hypers]:
    if number == 0:
        return first_round(arm.axes)
    inside = 0
    for last in range(number):
        known = [line for line in earlier if line["round"] <= last]
        inside += not _edges(arm, known, best_trial(arm, known))
    tried = [line["hypers"] for line in earlier]
    return next_round(arm.axes, tried, best_trial(arm, earlier)["hypers"], inside)


def _run_round(bench: Bench, arm: Arm, grid: Sequence[Hypers], number: int) -> None:
    """Runs the trials that are missing, as many at once as the trainer takes."""
    workload, seeds = bench.workload, tune_seeds(bench)
    missing: list[tuple[str, Hypers]] = []
    for hypers in grid:
        identity = bench.identity(
            "tune", arm=arm.name, hypers=hypers | arm.fixed, seeds=seeds, round=number
        )
        if bench.store.get(identity) is None and identity not in (i for i, _ in missing):
            missing.append((identity, hypers))
        else:
            bench.skip(PROGRAMS[arm.program], len(seeds))
    together = max(1, bench.trainer.chunk // len(seeds))
    for start in range(0, len(missing), together):
        part = missing[start : start + together]
        jobs = [(hypers | arm.fixed, seed) for _, hypers in part for seed in seeds]
        bench.progress.say(f"{workload.name} tune {arm.name}")
        history, seconds = bench.train(arm.program, PROGRAMS[arm.program], jobs)
        shape = len(part), len(seeds)
        loss = np.reshape(history.validation_loss, shape)
        diverged = np.reshape(history.diverged, shape)
        for i, (identity, hypers) in enumerate(part):
            bench.store.add(
                bench.header("tune", identity, arm.name, hypers | arm.fixed, seeds)
                | {
                    "round": number,
                    "seconds": seconds / len(part),
                    "validation_loss": loss[i],
                    "diverged": diverged[i],
                }
            )


def tune_work(bench: Bench, arms: Sequence[str]) -> float:
    """Seconds of all rounds, as `Bench.work` has them."""
    runs = bench.rounds * bench.workload.trials * len(tune_seeds(bench))
    programs = [PROGRAMS[make_arm(arm, bench.workload.trials).program] for arm in arms]
    return sum(bench.work(program, runs) for program in programs)


def trials(bench: Bench, arm: str) -> list[Line]:
    """The trials of an arm on this protocol's seeds and steps."""
    return [
        line
        for line in bench.store.find(kind="tune", arm=arm)
        if line["seeds"] == tune_seeds(bench) and line["steps"] == bench.workload.steps
    ]


def score(line: Line) -> float:
    """What is selected by: mean validation loss; infinite if a seed diverged."""
    if any(line["diverged"]):
        return float("inf")
    return float(np.mean(line["validation_loss"]))


def best_trial(arm: Arm, lines: Sequence[Line]) -> Line:
    """The trial of the lowest score, of equals the first; one inside the grid if nearly as low."""
    best = min(lines, key=score)
    inside = [line for line in lines if not _edges(arm, lines, line)]
    nearly = min(inside, key=score, default=best)
    return nearly if score(nearly) <= (1 + FLAT) * score(best) else best


def at_edge(bench: Bench, arm: Arm) -> list[str]:
    """The hyper-parameters whose selected value is the outermost one tried."""
    tried = trials(bench, arm.name)
    return _edges(arm, tried, best_trial(arm, tried))


def _edges(arm: Arm, tried: Sequence[Line], line: Line) -> list[str]:
    return edges(arm.axes, [other["hypers"] for other in tried], line["hypers"])


def selected(bench: Bench, arm: str) -> Line:
    """The selected trial of an arm.

    Raises:
      LookupError: if the arm has not been tuned.
    """
    tried = trials(bench, arm)
    if not tried:
        raise LookupError(
            f"{bench.workload.name}: {arm} is not tuned yet: run the phase tune first, with the"
            " same --scale and --quick."
        )
    return best_trial(make_arm(arm, bench.workload.trials), tried)
