"""What is run, in which order, and how an arm's setting is chosen."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from benchmarks.lab._corpus import digest
from benchmarks.lab._jobs import Job
from benchmarks.lab._store import Store, Unit
from benchmarks.study._arms import TRIALS, Hyper, box, trials
from benchmarks.study._train import run
from benchmarks.study._workload import Language, Workload

PROTOCOL = 3
CONFIRMATIONS = 2


def settings(workload: Workload) -> Unit:
    """What a workload's outcomes depend on."""
    found = dataclasses.asdict(workload)
    for word in ("title", "studies", "arms", "margin"):
        del found[word]
    if isinstance(workload, Language):
        found["text"] = digest()[:16]
    return {"protocol": PROTOCOL, "model": found.pop("name"), "settings": found}


def _unit(workload: Workload, name: str, study: int) -> Unit:
    """What a run's outcome depends on, but for which trial it is."""
    own = {"section": name, "box": box(name, workload), "study": study}
    return settings(workload) | own


def best(store: Store, workload: Workload, name: str, study: int) -> Hyper:
    """The trial of the least validation loss: the first of equals."""
    unit = _unit(workload, name, study)
    found = [store.get(unit | {"trial": trial}) for trial in range(TRIALS)]
    results = [result for result in found if result is not None]
    if len(results) < TRIALS:
        raise ValueError(f"The trials of {workload.name}, {name}, study {study} are not finished.")
    return dict(min(results, key=lambda result: result["validation"])["hyper"])


def jobs(store: Store, chosen: list[Workload], first: int, studies: int | None) -> Iterator[Job]:
    """Study by study, so that what an interruption leaves are whole studies.

    The trials of a study, and all its arms, share initial parameters and the order of the data;
    its confirmations have fresh ones.
    """
    counts = {workload.name: studies or workload.studies for workload in chosen}
    for study in range(first, first + max(counts.values())):
        for workload in (w for w in chosen if study < first + counts[w.name]):
            for name in workload.arms:
                unit = _unit(workload, name, study)
                train = functools.partial(run, workload, name)
                for trial, hyper in enumerate(trials(name, workload, study)):
                    work: Any = functools.partial(train, hyper, study, 0)
                    yield Job(unit | {"trial": trial}, work)
                for seed in range(1, 1 + CONFIRMATIONS):
                    work = functools.partial(_confirm, store, workload, name, study, seed)
                    yield Job(unit | {"confirmation": seed}, work)


def _confirm(store: Store, workload: Workload, name: str, study: int, seed: int) -> dict[str, Any]:
    return run(workload, name, best(store, workload, name, study), study, seed)
