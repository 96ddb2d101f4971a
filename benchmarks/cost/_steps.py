"""Times of training steps, and the memory that compiled steps and estimates need."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from benchmarks.lab._jobs import Job, Models, Settings
from benchmarks.lab._models import Model
from benchmarks.lab._steps import Contender, Steps, compiled_estimate, first_order, with_curvature
from benchmarks.lab._training import describe
from lama_optax import Estimator, flipout, hutchinson

#: Numbers of probes between which the memory of an estimate is compared.
PROBES = (1, 64)


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How long the contenders of a group take turns: ``blocks`` units of ``rounds`` rounds."""

    blocks: int
    rounds: int
    window: float  # seconds of each visit, at least


def groups(quick: bool) -> dict[str, tuple[dict[str, Contender], Rounds]]:
    """The contenders that are compared with each other; each group has Adam in it."""
    if quick:
        some = dict(list(with_curvature((2,)).items())[::3])
        return {
            "first order": (first_order(), Rounds(1, 2, 0)),
            "curvature": (some, Rounds(1, 2, 0)),
        }
    return {
        "first order": (first_order(), Rounds(10, 20, 0.1)),
        "curvature": (with_curvature(), Rounds(5, 2, 0.1)),
    }


def jobs(settings: Settings, models: Models) -> Iterator[Job]:
    """Units of the sections ``"steps"``, ``"temp"`` and ``"probes"``."""
    for name, task in models.tasks.items():
        for group, (contenders, rounds) in groups(settings.quick).items():
            steps = Steps(models, name, contenders)
            unit: dict[str, Any] = {"model": name, "task": describe(task)}
            unit["contenders"] = list(contenders)
            for block in range(rounds.blocks):
                settled = {"group": group, "block": block, **dataclasses.asdict(rounds)}
                seed = [settings.seed, block]
                yield Job(
                    {"section": "steps", **unit, **settled, "seed": settings.seed},
                    functools.partial(steps.times, rounds.rounds, rounds.window, seed),
                )
            yield Job({"section": "temp", **unit, "group": group}, steps.temp_bytes)
        for num_probes in PROBES:
            unit = {"model": name, "task": describe(task), "num_probes": num_probes}
            measure = functools.partial(_estimates, models, name, num_probes)
            yield Job({"section": "probes", **unit}, measure)


def _estimates(models: Models, name: str, num_probes: int) -> dict[str, int]:
    """Bytes that compiled estimates need beside their arguments and results."""
    model: Model = models[name]

    def of(estimator: Estimator) -> int:
        return compiled_estimate(model, estimator).memory_analysis().temp_size_in_bytes

    return {"hutchinson": of(hutchinson(num_probes)), "flipout": of(flipout(num_probes))}
