"""Runs phases over workloads, with a bar and an estimate of the time left."""

import dataclasses
from collections.abc import Sequence

from benchmarks.study._final import final, final_work
from benchmarks.study._headroom import headroom, headroom_work
from benchmarks.study._language import unknown_text_note
from benchmarks.study._plan import Bench, Progress, open_bench
from benchmarks.study._questions import QUESTION_WORKLOADS, question_work, questions
from benchmarks.study._settings import Settings, available_cores
from benchmarks.study._tune import tune, tune_work
from benchmarks.study._workload import Workload
from benchmarks.study._workloads import all_workloads, missing_packages

#: Seconds that compiling a workload's programs takes, in all.
COMPILATION = 120.0


def run_phases(settings: Settings, phases: Sequence[str]) -> None:
    """Workload after workload, each through all phases."""
    workloads = _chosen(settings)
    progress = Progress()
    try:
        benches = [open_bench(w, settings.results, progress, settings) for w in workloads]
        seconds = 0.0
        for bench in benches:
            work = sum(_work(bench, phase, settings) for phase in phases)
            progress.expect(work)
            seconds += work + COMPILATION
        print(
            f"{len(benches)} workloads: about {seconds / 60 / available_cores():.0f} minutes on"
            f" {available_cores()} cores, less what is finished already.",
            flush=True,
        )
        for bench in benches:
            for phase in phases:
                _phase(bench, phase, settings)
                progress.finish(f"{bench.workload.name} {phase}")
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


def _work(bench: Bench, phase: str, settings: Settings) -> float:
    """Seconds of one core that a phase is expected to take, at most; compilation left out."""
    if phase == "tune":
        return tune_work(bench, settings.arms)
    if phase == "final":
        return final_work(bench, settings.arms)
    if phase == "headroom":
        return headroom_work(bench)
    is_asked = bench.workload.name in QUESTION_WORKLOADS
    return question_work(bench, settings.quick) if is_asked else 0


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
