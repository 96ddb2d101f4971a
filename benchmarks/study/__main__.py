"""Trains what is not trained yet and reports: the door of `python -m benchmarks.study`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lab._jobs import Settings, common_settings, finish, parser
from benchmarks.study._workload import Workload


def parse(argv: Sequence[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    """Reads the command line; a wrong option ends the program with a message that names it."""
    from benchmarks.study._train import LOOKS
    from benchmarks.study._workload import workloads

    command_line = parser(
        "benchmarks.study",
        "Does LAMA help? Optimizers tuned against each other over independent studies.",
        "results/study",
    )
    add = command_line.add_argument
    add("--studies", type=int, help="how many; the first has the number --seed (default: 8, 10)")
    add("--steps", type=int, help=f"of a run, a multiple of {LOOKS} (default: the workload's)")
    add("--width", type=int, help="of the network (default: the workload's)")
    add("--report", type=Path, help="the page to write (default: RESULTS.md in --results)")
    add("--calibrate", action="store_true", help="the coarse search behind the boxes, alone")
    options = command_line.parse_args(argv)
    if options.steps is not None and (options.steps < LOOKS or options.steps % LOOKS):
        command_line.error(f"argument --steps: must be a multiple of {LOOKS}; got {options.steps}")
    if options.width is not None and (options.width < 4 or options.width % 4):
        command_line.error(f"argument --width: must be a multiple of 4; got {options.width}")
    if options.studies is not None and options.studies < 2:
        command_line.error(f"argument --studies: must be at least 2; got {options.studies}")
    known = tuple(workloads(options.quick, None, None))
    return common_settings(command_line, options, known), options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not measured yet and reports on all; returns the exit status."""
    settings, options = parse(argv)
    return finish(lambda: _run(settings, options))


def _run(settings: Settings, options: argparse.Namespace) -> None:
    from benchmarks.lab._corpus import warning
    from benchmarks.lab._environment import context
    from benchmarks.lab._jobs import run_jobs
    from benchmarks.lab._store import Store
    from benchmarks.study._calibrate import calibrate
    from benchmarks.study._plan import jobs
    from benchmarks.study._report import write
    from benchmarks.study._workload import workloads

    if (text := warning()) is not None:
        print(text, file=sys.stderr)
    known = workloads(options.quick, options.steps, options.width)
    chosen: list[Workload] = [known[name] for name in settings.models]
    versions = {"versions": context()["versions"]}  # seconds alone depend on the machine
    name = "calibration.jsonl" if options.calibrate else "measurements.jsonl"
    store = Store(settings.results / name, versions)
    if options.calibrate:
        print(calibrate(store, chosen))
        return
    todo = list(jobs(store, chosen, settings.seed, options.studies))
    outcomes = run_jobs(store, todo, "benchmarks.study")
    page = options.report or settings.results / "RESULTS.md"
    print(write(settings.results, page, known, outcomes))


if __name__ == "__main__":
    sys.exit(main())
