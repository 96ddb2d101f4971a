"""Measures, prints the tables, writes the picture: the door of `python -m benchmarks.cost`."""

import sys
from collections.abc import Sequence

from benchmarks.lab._jobs import Models, Settings, common_settings, finish, parser


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Reads the command line; a wrong option ends the program with a message that names it."""
    command_line = parser(
        "benchmarks.cost",
        "Times training steps with curvature against Adam's, their compilation and memory.",
        "results/cost",
    )
    return common_settings(command_line, command_line.parse_args(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not measured yet and reports on all; returns the exit status."""
    settings = parse(argv)
    return finish(lambda: _run(settings))


def _run(settings: Settings) -> None:
    import jax

    from benchmarks.cost._figures import draw_all
    from benchmarks.cost._measure import jobs
    from benchmarks.cost._report import report, summarize
    from benchmarks.lab._environment import context
    from benchmarks.lab._jobs import run_jobs
    from benchmarks.lab._store import Store, save_results

    # Compile times are of compilations.
    jax.config.update("jax_enable_compilation_cache", False)
    models = Models(settings)
    store = Store(settings.results / "measurements.jsonl", context())
    outcomes = run_jobs(store, list(jobs(settings, models)), "benchmarks.cost")
    summary = summarize(outcomes, models)
    save_results(settings.results, store.context, "results", summary, report(summary))
    draw_all(settings.results)


if __name__ == "__main__":
    sys.exit(main())
