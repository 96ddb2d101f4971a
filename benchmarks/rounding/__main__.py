"""Measures, prints the tables, draws: the door of `python -m benchmarks.rounding`."""

import functools
import sys
from collections.abc import Iterator, Sequence

from benchmarks.lab._jobs import Job, Settings, common_settings, finish, parser

PROTOCOL, TRAININGS = 1, 5


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Reads the command line; a wrong option ends the program with a message that names it."""
    from benchmarks.rounding._networks import networks

    command_line = parser(
        "benchmarks.rounding",
        "Rounds trained networks to random and to chosen bits: is the rise in loss predicted, and"
        " are the choices good?",
        "results/rounding",
    )
    options = command_line.parse_args(argv)
    return common_settings(command_line, options, tuple(networks(options.quick)))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not measured yet and reports on all; returns the exit status."""
    settings = parse(argv)
    return finish(lambda: _run(settings))


def _jobs(settings: Settings) -> Iterator[Job]:
    """Training by training, so that an interruption leaves all networks with fewer trainings."""
    from benchmarks.rounding._measure import measure, measure_on_validation
    from benchmarks.rounding._networks import networks

    sections = {"rounding": measure, "validation": measure_on_validation}
    for seed in range(1 if settings.quick else TRAININGS):
        for name, network in networks(settings.quick).items():
            if name in settings.models:
                own = settings.seed + seed
                unit = {"protocol": PROTOCOL, "model": name, "seed": own, "quick": settings.quick}
                for section, work in sections.items():
                    job = functools.partial(work, network, own, settings.quick)
                    yield Job({"section": section} | unit, job)


def _run(settings: Settings) -> None:
    from benchmarks.lab._corpus import warning
    from benchmarks.lab._environment import context
    from benchmarks.lab._jobs import run_jobs
    from benchmarks.lab._store import Store, save_results
    from benchmarks.rounding._figures import draw_all
    from benchmarks.rounding._report import report, summarize

    if (text := warning()) is not None:
        print(text, file=sys.stderr)
    # Losses do not depend on the machine: what one has run, another goes on with.
    versions = {"versions": context()["versions"]}
    store = Store(settings.results / "measurements.jsonl", versions)
    summary = summarize(run_jobs(store, list(_jobs(settings)), "benchmarks.rounding"))
    save_results(settings.results, store.context, "results", summary, report(summary))
    draw_all(settings.results)


if __name__ == "__main__":
    sys.exit(main())
