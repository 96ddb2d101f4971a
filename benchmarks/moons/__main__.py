"""Trains, prints the tables, writes the figures: the door of `python -m benchmarks.moons`."""

import os
import sys
import time
from collections.abc import Sequence

from benchmarks.moons._settings import Settings, available_cores, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit status that ``--help`` explains."""
    settings = parse(argv)
    try:
        return _run(settings)
    except KeyboardInterrupt:
        print("\nInterrupted: nothing was written.", file=sys.stderr)
        return 130


def _run(settings: Settings) -> int:
    _use_all_cores()
    # Only now: jax reads the number of devices when it is first used.
    from tqdm import tqdm

    from benchmarks.moons._experiment import number_of_blocks, run
    from benchmarks.moons._figures import draw_all
    from benchmarks.moons._record import save_json
    from benchmarks.moons._report import diverged_by_momentum, report
    from benchmarks.moons._summary import summarize, verdict
    from benchmarks.moons._train import Trainer

    began = time.perf_counter()
    print(
        f"make_moons, {settings.seeds} seeds from {settings.base_seed}, {settings.epochs} epochs:"
        " making data, compiling, training"
    )
    trainer = Trainer(settings)
    # disable=None: a bar for terminals, none in a file.
    with tqdm(total=number_of_blocks(trainer), unit="block", disable=None) as bar:

        def progress(what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        outcome = run(trainer, progress)

    results = summarize(trainer, outcome)
    results["verdict"] = verdict(results)
    text = report(results)
    settings.results.mkdir(parents=True, exist_ok=True)
    draw_all(settings, trainer.runs, results, outcome)
    results["seconds"] = time.perf_counter() - began
    save_json(settings.results / "results.json", results)
    (settings.results / "results.txt").write_text(text + "\n")
    print(f"\n{text}\n\nFigures and tables are in {settings.results}/; {results['seconds']:.0f} s.")
    return 2 if diverged_by_momentum(results) else 0


def _use_all_cores() -> None:
    """Makes XLA show each core as a device, unless the user has said otherwise."""
    flag = "--xla_force_host_platform_device_count"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags and "jax" not in sys.modules:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={available_cores()}".strip()


if __name__ == "__main__":
    sys.exit(main())
