"""Measures, prints the tables, writes the pictures: the door of `python -m benchmarks.traces`."""

import sys
from collections.abc import Sequence

from benchmarks.workbench._jobs import Settings, common_settings, finish, parser


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
    from benchmarks.traces import _along, _measure
    from benchmarks.traces._figures import draw_all
    from benchmarks.traces._report import report
    from benchmarks.traces._summary import summarize
    from benchmarks.workbench._environment import context
    from benchmarks.workbench._jobs import Models, run_jobs
    from benchmarks.workbench._store import Store, save_json

    models = Models(settings)
    store = Store(settings.results / "measurements.jsonl", context())
    jobs = [*_measure.jobs(settings, models), *_along.jobs(settings, models)]
    summary = summarize(run_jobs(store, jobs, "benchmarks.traces"), models)
    text = report(summary)
    save_json(settings.results / "results.json", {"context": store.context, **summary})
    (settings.results / "results.txt").write_text(text + "\n")
    draw_all(settings.results, summary)
    print(f"\n{text}\n\nTables and pictures are in {settings.results}/.")


if __name__ == "__main__":
    sys.exit(main())
