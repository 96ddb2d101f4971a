"""Measures, prints the tables, writes the pictures: the door of `python -m benchmarks.traces`."""

import dataclasses
import functools
import sys
from collections.abc import Sequence

from benchmarks.lab._jobs import Settings, common_settings, finish, parser

MATRICES = ("hessian", "gauss-newton")


@dataclasses.dataclass(frozen=True)
class TracesSettings:
    """The common settings, and the matrices whose traces are estimated."""

    common: Settings
    matrices: tuple[str, ...]


def parse(argv: Sequence[str] | None = None) -> TracesSettings:
    """Reads the command line; a wrong option ends the program with a message that names it."""
    command_line = parser(
        "benchmarks.traces",
        "Measures time and variance of every way to estimate the traces of a model's layers, this"
        " library's and its peers', on the same parameters.",
        "results/traces",
    )
    command_line.add_argument(
        "--matrix", choices=MATRICES, default=None, help="whose traces (default: both)"
    )
    options = command_line.parse_args(argv)
    matrices = MATRICES if options.matrix is None else (options.matrix,)
    return TracesSettings(common_settings(command_line, options), matrices)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not measured yet and reports on all; returns the exit status."""
    settings = parse(argv)
    return finish(lambda: _run(settings))


def _run(settings: TracesSettings) -> None:
    import jax

    from benchmarks.lab._environment import context
    from benchmarks.lab._jobs import Models, run_jobs
    from benchmarks.lab._store import Store, save_results
    from benchmarks.traces import _along, _gauss_newton, _gauss_newton_report, _measure
    from benchmarks.traces._figures import draw_all
    from benchmarks.traces._report import report
    from benchmarks.traces._summary import summarize

    # Compile times are of compilations.
    jax.config.update("jax_enable_compilation_cache", False)
    common = settings.common
    models = Models(common)
    store = Store(common.results / "measurements.jsonl", context())

    save = functools.partial(save_results, common.results, store.context)
    if "hessian" in settings.matrices:
        jobs = [*_measure.jobs(common, models), *_along.jobs(common, models)]
        summary = summarize(run_jobs(store, jobs, "benchmarks.traces"), models)
        save("results", summary, report(summary))
    if "gauss-newton" in settings.matrices:
        jobs = list(_gauss_newton.jobs(common, models))
        outcomes = run_jobs(store, jobs, "benchmarks.traces, Gauss-Newton")
        summary = _gauss_newton_report.summarize(outcomes, models)
        save("gauss_newton", summary, _gauss_newton_report.report(summary))
    draw_all(common.results)


if __name__ == "__main__":
    sys.exit(main())
