"""Trains, prints the tables, writes the figures: the door of `python -m benchmarks.moons`."""

import os
import sys
import time
from collections.abc import Sequence

from benchmarks.lab._environment import available_cores
from benchmarks.moons._settings import Settings, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit status that ``--help`` explains."""
    settings = parse(argv)
    # Each core a device; jax reads it when it is first imported.
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(available_cores()))
    try:
        return _run(settings)
    except KeyboardInterrupt:
        print("\nInterrupted: nothing was written.", file=sys.stderr)
        return 130


def _run(settings: Settings) -> int:
    from benchmarks.lab._store import save_json
    from benchmarks.moons._experiment import run
    from benchmarks.moons._figures import draw_all
    from benchmarks.moons._report import diverged_by_momentum, report
    from benchmarks.moons._summary import summarize
    from benchmarks.moons._train import Trainer

    began = time.perf_counter()
    print(
        f"make_moons, {settings.seeds} seeds from {settings.base_seed}, {settings.epochs} epochs:"
        " making data, compiling, training"
    )
    trainer = Trainer(settings)
    outcome = run(trainer)
    results = summarize(trainer, outcome)
    text = report(results)
    settings.results.mkdir(parents=True, exist_ok=True)
    draw_all(settings, trainer.runs, results, outcome)
    results["seconds"] = time.perf_counter() - began
    save_json(settings.results / "results.json", results)
    (settings.results / "results.txt").write_text(text + "\n")
    print(f"\n{text}\n\nFigures and tables are in {settings.results}/; {results['seconds']:.0f} s.")
    return 2 if diverged_by_momentum(results) else 0


if __name__ == "__main__":
    sys.exit(main())
