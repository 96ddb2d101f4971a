"""Runs phases over workloads, with a bar and an estimate of the time left."""

import dataclasses
from collections.abc import Sequence

from benchmarks.study._final import final
from benchmarks.study._headroom import headroom, headroom_runs
from benchmarks.study._language import unknown_text_note
from benchmarks.study._plan import Bench, Progress, final_seeds, open_bench, tune_seeds
from benchmarks.study._questions import QUESTION_WORKLOADS, question_runs, questions
from benchmarks.study._settings import CONTROLS, Settings
from benchmarks.study._tune import tune
from benchmarks.study._workload import Workload
from benchmarks.study._workloads import all_workloads, missing_packages


def run_phases(settings: Settings, phases: Sequence[str]) -> None:
    """Workload after workload, each through all phases."""
    workloads = _chosen(settings)
    progress = Progress(0)
    try:
        benches = [open_bench(w, settings.results, progress, settings) for w in workloads]
        for bench in benches:
            progress.expect(sum(_runs(bench, phase, settings) for phase in phases))
        for bench in benches:
            for phase in phases:
                _phase(bench, phase, settings)
    finally:
        progress.close()


def _phase(bench: Bench, phase: str, settings: Settings) -> None:
    if phase == "tune":
        tune(bench, settings.arms)
    elif phase == "final":
        final(bench, settings.arms)
    elif phase == "headroom":
        headroom(bench)
    elif phase == "questions" and bench.workload.name in QUESTION_WORKLOADS:
        questions(bench, settings.quick)


def _runs(bench: Bench, phase: str, settings: Settings) -> int:
    """Training runs of a phase, at most."""
    if phase == "tune":
        trials = bench.workload.trials * bench.rounds
        return len(settings.arms) * trials * len(tune_seeds(bench))
    if phase == "final":
        controls = sum(of in settings.arms for of in CONTROLS.values())
        return (len(settings.arms) + controls) * len(final_seeds(bench))
    if phase == "headroom":
        return headroom_runs(bench)
    is_asked = bench.workload.name in QUESTION_WORKLOADS
    return question_runs(bench, settings.quick) if is_asked else 0


def _chosen(settings: Settings) -> list[Workload]:
    chosen = []
    for name in settings.workloads:
        workload = all_workloads()[name]
        missing = missing_packages(workload)
        if missing:
            note = f"{name} needs {' and '.join(missing)}: pip install {' '.join(missing)}"
            if settings.all_named:
                raise ValueError(note)
            print(f"{note}; left out.")
            continue
        if settings.quick:
            workload = _quick(workload)
        chosen.append(workload)
    if any(w.name == "char_lm" for w in chosen) and (note_ := unknown_text_note()):
        print(note_)
    return chosen


def _quick(workload: Workload) -> Workload:
    """A small version of a workload, for a look and for the tests."""
    return dataclasses.replace(
        workload, steps=60, trials=12, tune_seeds=3, final_seeds=20, chunk=36
    )
