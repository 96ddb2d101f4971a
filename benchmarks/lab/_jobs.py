"""How a benchmark is started, interrupted and continued: options, jobs, progress."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.lab._models import Model, Task, tasks
from benchmarks.lab._store import Store, Unit
from benchmarks.lab._training import trained


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every benchmark is told."""

    results: Path
    models: tuple[str, ...]
    quick: bool
    seed: int


class Job(NamedTuple):
    """A unit of work that is measured once and kept."""

    unit: Unit
    measure: Callable[[], Any]


class Outcome(NamedTuple):
    """A job's unit and what was measured."""

    unit: Unit
    result: Any


class Models:
    """The models by name, each trained when it is first needed."""

    def __init__(self, settings: Settings):
        self.tasks: dict[str, Task] = {
            name: task for name, task in tasks(settings.quick).items() if name in settings.models
        }
        self.folder = settings.results / "trained"
        self._models: dict[str, Model] = {}

    def __getitem__(self, name: str) -> Model:
        """The trained model."""
        if name not in self._models:
            self._models[name] = trained(self.tasks[name], self.folder)
        return self._models[name]


def run_jobs(store: Store, jobs: Sequence[Job], title: str) -> list[Outcome]:
    """Measures what the store does not hold; a bar shows how far it is."""
    outcomes = []
    with tqdm(jobs, title, disable=None) as bar:
        for job in bar:
            what = [str(job.unit[key]) for key in ("section", "model") if key in job.unit]
            bar.set_postfix_str(" ".join(what))
            outcomes.append(Outcome(job.unit, store.run(job.unit, job.measure)))
    return outcomes


def pick(outcomes: Sequence[Outcome], **wanted: Any) -> list[Outcome]:
    """Those whose units say all that is wanted."""
    return [outcome for outcome in outcomes if wanted.items() <= outcome.unit.items()]


def parser(prog: str, description: str, results: str) -> argparse.ArgumentParser:
    """The options that the benchmarks share."""
    result = argparse.ArgumentParser(
        prog=f"python -m {prog}",
        description=description,
        epilog="Interrupt it at any time: the same command goes on where it was.",
    )
    result.add_argument(
        "--results", type=Path, default=Path(results), help=f"directory (default {results})"
    )
    result.add_argument(
        "--models", "--workloads", help="names with commas between them (default: all)"
    )
    result.add_argument(
        "--quick", action="store_true", help="tiny models, seconds: shows that all of it works"
    )
    result.add_argument("--seed", type=_seed, default=0, help="of probes and orders (default 0)")
    return result


def common_settings(
    command_line: argparse.ArgumentParser, options: Any, known: tuple[str, ...] = ()
) -> Settings:
    """The shared options' values; a wrong one ends the program with a message that names it.

    ``known`` are the models that there are: by default the four of `tasks`.
    """
    known = known or tuple(tasks(options.quick))
    models = known if options.models is None else tuple(options.models.split(","))
    for name in models:
        if name not in known:
            command_line.error(f"argument --models: must be of {', '.join(known)}; got {name!r}")
    if options.results.exists() and not options.results.is_dir():
        command_line.error(f"argument --results: must be a directory; got {str(options.results)!r}")
    return Settings(options.results, models, options.quick, options.seed)


def finish(run: Callable[[], None]) -> int:
    """Runs a benchmark; returns the exit status, 130 if it was interrupted."""
    try:
        run()
    except KeyboardInterrupt:
        print(
            "\nInterrupted: what was finished is kept, and the same command goes on.",
            file=sys.stderr,
        )
        return 130
    return 0


def _seed(text: str) -> int:
    if text.isascii() and text.isdigit():
        return int(text)
    raise argparse.ArgumentTypeError(f"must be an integer of at least 0; got {text!r}")
