"""Measures, prints the tables, draws: the door of `python -m benchmarks.noise_scale`."""

import functools
import sys
from collections.abc import Iterator, Sequence

from benchmarks.lab._jobs import Job, Settings, common_settings, finish, parser

PROTOCOL = 1


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Reads the command line; a wrong option ends the program with a message that names it."""
    from benchmarks.noise_scale._workloads import workloads

    command_line = parser(
        "benchmarks.noise_scale",
        "Trains at many batch sizes: is the tracked noise scale the true one, and does it predict"
        " the steps to a loss? And what does it cost?",
        "results/noise_scale",
    )
    options = command_line.parse_args(argv)
    return common_settings(command_line, options, tuple(workloads(options.quick)))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not measured yet and reports on all; returns the exit status."""
    settings = parse(argv)
    return finish(lambda: _run(settings))


def _jobs(settings: Settings) -> Iterator[Job]:
    """Seed by seed, so that what an interruption leaves is a whole table of fewer seeds."""
    from benchmarks.noise_scale._train import run
    from benchmarks.noise_scale._workloads import workloads

    chosen = [w for name, w in workloads(settings.quick).items() if name in settings.models]
    for seed in range(max(w.seeds for w in chosen)):
        for workload in (w for w in chosen if seed < w.seeds):
            for batch in workload.batches:
                for rate in workload.rates:
                    # The truth is dear, and one rate's is enough.
                    true = rate == workload.rates[len(workload.rates) // 2]
                    own = settings.seed + seed
                    unit = {"section": "train", "protocol": PROTOCOL, "model": workload.name}
                    unit |= {"batch": batch, "rate": rate, "seed": own}
                    work = functools.partial(run, workload, batch, rate, own, true)
                    yield Job(unit, work)


def _run(settings: Settings) -> None:
    from benchmarks.lab._corpus import warning
    from benchmarks.lab._environment import context
    from benchmarks.lab._jobs import run_jobs
    from benchmarks.lab._store import Store, save_results
    from benchmarks.noise_scale import _cost
    from benchmarks.noise_scale._figures import draw_all
    from benchmarks.noise_scale._report import report, summarize

    if (text := warning()) is not None:
        print(text, file=sys.stderr)
    # Seconds depend on the machine, training does not: what one has run, another goes on with.
    here = context()
    store = Store(settings.results / "measurements.jsonl", {"versions": here["versions"]})
    outcomes = run_jobs(store, list(_jobs(settings)), "benchmarks.noise_scale")
    outcomes += run_jobs(
        store, list(_cost.jobs(settings, here["machine"])), "benchmarks.noise_scale, cost"
    )
    summary = summarize(outcomes)
    save_results(settings.results, store.context, "results", summary, report(summary))
    draw_all(settings.results)


if __name__ == "__main__":
    sys.exit(main())
