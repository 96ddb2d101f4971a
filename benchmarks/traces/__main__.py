"""Measures, prints the tables, writes the pictures: the door of `python -m benchmarks.traces`."""

import sys
from collections.abc import Sequence

from benchmarks.lab._jobs import Settings, common_settings, finish, parser


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Reads the command line; a wrong option ends the program with a message that names it."""
    command_line = parser(
        "benchmarks.traces",
        "Measures time and variance of every way to estimate the traces of a model's layers, this"
        " library's and its peers', on the same parameters.",
        "results/traces",
    )
    return common_settings(command_line, command_line.parse_args(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not measured yet and reports on all; returns the exit status."""
    settings = parse(argv)
    return finish(lambda: _run(settings))


def _run(settings: Settings) -> None:
    import jax

    from benchmarks.lab._environment import context
    from benchmarks.lab._jobs import Models, run_jobs
    from benchmarks.lab._store import Store, save_results
    from benchmarks.traces._figures import draw_all
    from benchmarks.traces._measure import jobs
    from benchmarks.traces._report import report
    from benchmarks.traces._summary import summarize

    # Compile times are of compilations.
    jax.config.update("jax_enable_compilation_cache", False)
    models = Models(settings)
    store = Store(settings.results / "measurements.jsonl", context())

    outcomes = []
    for matrix in ("hessian", "gauss-newton"):
        todo = list(jobs(settings, models, matrix))
        outcomes += run_jobs(store, todo, f"benchmarks.traces, {matrix}")
    summary = summarize(outcomes, models)
    save_results(settings.results, store.context, "results", summary, report(summary))
    draw_all(settings.results)


if __name__ == "__main__":
    sys.exit(main())
