"""Times of training steps, and the memory that the compiled steps need."""

import dataclasses
import functools
from collections.abc import Iterator

from benchmarks.lab._jobs import Job, Models, Settings
from benchmarks.lab._steps import Contender, Step, first_order, with_curvature
from benchmarks.lab._timing import interleave
from benchmarks.lab._training import describe


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How long the contenders of a group take turns: ``blocks`` units of ``rounds`` rounds."""

    blocks: int
    rounds: int
    window: float  # seconds of each visit, at least


def groups(quick: bool) -> dict[str, tuple[dict[str, Contender], Rounds]]:
    """The contenders that are compared with each other; each group has Adam in it."""
    if quick:
        return {
            "first order": (first_order(), Rounds(1, 2, 0)),
            "curvature": (_some(with_curvature((2,))), Rounds(1, 2, 0)),
        }
    return {
        "first order": (first_order(), Rounds(10, 20, 0.1)),
        "curvature": (with_curvature(), Rounds(5, 2, 0.1)),
    }


def _some(contenders: dict[str, Contender]) -> dict[str, Contender]:
    return dict(list(contenders.items())[::3])


def jobs(settings: Settings, models: Models) -> Iterator[Job]:
    """Units of the sections ``"steps"`` and ``"temp"``."""
    for name, task in models.tasks.items():
        for group, (contenders, rounds) in groups(settings.quick).items():
            steps = _Steps(models, name, contenders)
            unit = {"model": name, "task": describe(task), "contenders": list(contenders)}
            for block in range(rounds.blocks):
                settled = {"group": group, "block": block, **dataclasses.asdict(rounds)}
                yield Job(
                    {"section": "steps", **unit, **settled, "seed": settings.seed},
                    functools.partial(steps.times, rounds, [settings.seed, block]),
                )
            yield Job({"section": "temp", **unit, "group": group}, steps.temp_bytes)


class _Steps:
    """The compiled steps of one group on one model."""

    def __init__(self, models: Models, name: str, contenders: dict[str, Contender]):
        self._models, self._name, self._contenders = models, name, contenders

    @functools.cached_property
    def _steps(self) -> dict[str, Step]:
        model = self._models[self._name]
        return {label: Step(model, contender) for label, contender in self._contenders.items()}

    def times(self, rounds: Rounds, seed: list[int]) -> dict[str, list[float]]:
        """Seconds a step, of each contender and round."""
        for step in self._steps.values():
            step.run(1)  # compiled, and its code and arrays in the caches
        visits = {label: step.visit() for label, step in self._steps.items()}
        return interleave(visits, rounds.rounds, rounds.window, seed)

    def temp_bytes(self) -> dict[str, int]:
        """Bytes that each compiled step needs beside its arguments and results."""
        return {label: step.temp_bytes() for label, step in self._steps.items()}
