"""Measures, prints the tables, writes the pictures: the door of `python -m benchmarks.cost`."""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence

from benchmarks.lab._jobs import Models, Settings, common_settings, finish, parser


@dataclasses.dataclass(frozen=True)
class CostSettings:
    """The common settings, and what to measure."""

    common: Settings
    only: str | None


def parse(argv: Sequence[str] | None = None) -> CostSettings:
    """Reads the command line; a wrong option ends the program with a message that names it."""
    command_line = parser(
        "benchmarks.cost",
        "Times training steps with curvature against Adam's, their memory, how both grow, and"
        " how far they are from the least that is possible.",
        "results/cost",
    )
    command_line.add_argument(
        "--only",
        choices=("steps", "tracking"),
        default=None,
        help="measure only LAMA's and others' steps, or only track_curvature's (default: both)",
    )
    options: argparse.Namespace = command_line.parse_args(argv)
    return CostSettings(common_settings(command_line, options), options.only)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not measured yet and reports on all; returns the exit status."""
    settings = parse(argv)
    return finish(lambda: _run(settings))


def _run(settings: CostSettings) -> None:
    import jax

    from benchmarks.cost import _adahessian, _floor, _growth, _memory, _moons, _steps, _tracking
    from benchmarks.cost import _tracking_report as tracking
    from benchmarks.cost._figures import draw_all
    from benchmarks.cost._report import report
    from benchmarks.cost._summary import summarize
    from benchmarks.lab._environment import context
    from benchmarks.lab._jobs import run_jobs
    from benchmarks.lab._store import Store, save_results

    # Compile times are of compilations.
    jax.config.update("jax_enable_compilation_cache", False)
    common = settings.common
    models = Models(common)
    store = Store(common.results / "measurements.jsonl", context())

    save = functools.partial(save_results, common.results, store.context)
    if settings.only != "tracking":
        jobs = [
            *_steps.jobs(common, models),
            *_floor.jobs(common, models),
            *_adahessian.jobs(common, models),
            *_memory.jobs(common, models),
            *_growth.jobs(common),
            *_moons.jobs(common),
        ]
        outcomes = run_jobs(store, jobs, "benchmarks.cost")
        summary = summarize(outcomes, models, common.quick)
        save("results", summary, report(summary))
        draw_all(common.results)
    if settings.only != "steps":
        jobs = list(_tracking.jobs(common, models))
        outcomes = run_jobs(store, jobs, "benchmarks.cost, track_curvature")
        summary = tracking.summarize(outcomes, models)
        save("tracking", summary, tracking.report(summary))


if __name__ == "__main__":
    sys.exit(main())
