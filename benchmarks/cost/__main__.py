"""Measures, prints the tables, writes the pictures: the door of `python -m benchmarks.cost`."""

import functools
import sys
from collections.abc import Sequence

from benchmarks.lab._jobs import Models, Settings, common_settings, finish, parser


def parse(argv: Sequence[str] | None = None) -> tuple[Settings, str | None]:
    """Reads the command line; a wrong option ends the program with a message that names it."""
    command_line = parser(
        "benchmarks.cost",
        "Times training steps with curvature against Adam's, and their memory.",
        "results/cost",
    )
    command_line.add_argument(
        "--only",
        choices=("steps", "tracking"),
        default=None,
        help="measure only LAMA's and others' steps, or only track_curvature's (default: both)",
    )
    options = command_line.parse_args(argv)
    return common_settings(command_line, options), options.only


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not measured yet and reports on all; returns the exit status."""
    settings, only = parse(argv)
    return finish(lambda: _run(settings, only))


def _run(settings: Settings, only: str | None) -> None:
    import jax

    from benchmarks.cost import _steps, _tracking
    from benchmarks.cost import _tracking_report as tracking
    from benchmarks.cost._figures import draw_all
    from benchmarks.cost._report import report, summarize
    from benchmarks.lab._environment import context
    from benchmarks.lab._jobs import run_jobs
    from benchmarks.lab._store import Store, save_results

    # Compile times are of compilations.
    jax.config.update("jax_enable_compilation_cache", False)
    models = Models(settings)
    store = Store(settings.results / "measurements.jsonl", context())

    save = functools.partial(save_results, settings.results, store.context)
    if only != "tracking":
        jobs = list(_steps.jobs(settings, models))
        outcomes = run_jobs(store, jobs, "benchmarks.cost")
        summary = summarize(outcomes, models, settings.quick)
        save("results", summary, report(summary))
        draw_all(settings.results)
    if only != "steps":
        jobs = list(_tracking.jobs(settings, models))
        outcomes = run_jobs(store, jobs, "benchmarks.cost, track_curvature")
        summary = tracking.summarize(outcomes, models)
        save("tracking", summary, tracking.report(summary))


if __name__ == "__main__":
    sys.exit(main())
