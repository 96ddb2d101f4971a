"""What all phases share: a workload with its trainer, its file of results and the progress."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study._axes import MAX_ROUNDS
from benchmarks.study._programs import Hypers, Program
from benchmarks.study._settings import PROTOCOL, Settings
from benchmarks.study._store import Line, Store, unit_id, versions
from benchmarks.study._train import History, Trainer
from benchmarks.study._workload import Workload

#: Seeds from these on select; the others, on data splits of their own, are reported. Protocol 1
#: had seen the seeds from 0 and from 100 000.
FIRST_TUNE_SEED = 300_000
FIRST_FINAL_SEED = 200_000


class Progress:
    """A bar of the work done, in seconds that one core is expected to need; and the time left."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._began = time.perf_counter()
        # disable=None: a bar for terminals, none in a file.
        self._bar = tqdm(
            total=0.0,
            disable=None,
            smoothing=0.05,
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}",
        )

    def expect(self, seconds: float) -> None:
        """So much work is planned; if negative, need not be done after all."""
        if not self._bar.disable:
            self._bar.total = max(self._bar.total + seconds, self._bar.n)
            self._bar.refresh()

    def advance(self, seconds: float) -> None:
        """So much work is done."""
        self._bar.update(seconds)

    def say(self, what: str) -> None:
        """What is being done."""
        self._bar.set_postfix_str(what)

    def finish(self, what: str) -> None:
        """A phase is done; said in a line where there is no bar."""
        if self._bar.disable:
            print(f"{what}: done after {time.perf_counter() - self._began:.0f} s", flush=True)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


@dataclasses.dataclass(frozen=True)
class Bench:
    """One workload at work."""

    workload: Workload
    trainer: Trainer
    store: Store
    progress: Progress
    rounds: int
    scale: float

    def work(self, program: Program, runs: int) -> float:
        """Seconds of one core that training is expected to take, compilation left out."""
        each = self.workload.steps * self.workload.step_microseconds / 1e6
        return runs * each * program.gradient_equivalents

    def skip(self, program: Program, runs: int) -> None:
        """So many planned training runs are not needed."""
        self.progress.expect(-self.work(program, runs))

    def train(
        self,
        name: str,
        program: Program,
        jobs: Sequence[tuple[Hypers, int]],
        trainer: Trainer | None = None,
    ) -> tuple[History, float]:
        """Trains (hyper-parameters, seed) after (hyper-parameters, seed); moves the bar."""

        def done(runs: int) -> None:
            self.progress.advance(self.work(program, runs))

        return (trainer or self.trainer)(name, program, jobs, done)

    def identity(self, kind: str, **settings: Any) -> str:
        """The id of a unit of this workload."""
        workload = self.workload
        return unit_id(
            kind=kind,
            workload=workload.name,
            steps=workload.steps,
            batch_size=workload.batch_size,
            protocol=PROTOCOL,
            data=workload.data_hash,
            **settings,
        )

    def header(
        self, kind: str, identity: str, arm: str, hypers: dict, seeds: Sequence[int]
    ) -> Line:
        """The fields that every line begins with."""
        workload = self.workload
        settings: dict[str, Any] = {"protocol": PROTOCOL, "batch_size": workload.batch_size}
        if workload.data_hash:
            settings["data_sha256"] = workload.data_hash[:16]
        return {
            "kind": kind,
            "id": identity,
            "workload": workload.name,
            "arm": arm,
            "hypers": hypers,
            "seeds": list(seeds),
            "steps": workload.steps,
            "settings": settings,
            "versions": versions(),
        }


def open_bench(workload: Workload, results: Path, progress: Progress, settings: Settings) -> Bench:
    """Opens a workload's results; those of other data are refused.

    Raises:
      ValueError: if the file holds results of other data.
    """
    store = Store(results, workload.name)
    for line in store.lines:
        found = line["settings"].get("data_sha256", "")
        if found != workload.data_hash[:16]:
            raise ValueError(
                f"{store.path} holds results on other data (sha256 {found}, here"
                f" {workload.data_hash[:16]}): give another directory with --results, or use the"
                f" Python of those results, {line['versions']['python']}."
            )
    return Bench(
        workload=workload,
        trainer=Trainer(workload),
        store=store,
        progress=progress,
        rounds=1 if settings.quick else MAX_ROUNDS,
        scale=settings.scale,
    )


def tune_seeds(bench: Bench) -> list[int]:
    """Seeds that select; disjoint from those reported."""
    count = max(2, round(bench.workload.tune_seeds * bench.scale))
    return [FIRST_TUNE_SEED + i for i in range(count)]


def final_seeds(bench: Bench) -> list[int]:
    """Fresh seeds, for what is reported."""
    count = max(2, round(bench.workload.final_seeds * bench.scale))
    return [FIRST_FINAL_SEED + i for i in range(count)]
