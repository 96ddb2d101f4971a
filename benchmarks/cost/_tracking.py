"""What `track_curvature` costs beside an optimizer, and how well it knows the curvature."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import optax

from benchmarks.lab._jobs import Job, Models, Settings
from benchmarks.lab._models import Batch, Model, Params
from benchmarks.lab._steps import (
    LEARNING_RATE,
    Step,
    compiled_estimate,
    peak_bytes,
    with_tracker,
)
from benchmarks.lab._timing import interleave
from benchmarks.lab._training import describe
from lama_optax import fisher, layer_report, track_curvature

#: Steps after which the standard error is looked at, and the part of the curvature asked for.
STEPS, WANTED = 200, 0.1
#: Blocks of rounds, rounds of each and seconds of a visit; the transformer's visits are whole
#: intervals of seconds, so that fewer have to do.
BLOCKS, ROUNDS, ROUNDS_TRANSFORMER, WINDOW = 4, 30, 6, 0.1


@dataclasses.dataclass(frozen=True)
class _How:
    blocks: int
    rounds: int
    window: float
    steps: int


def jobs(settings: Settings, models: Models) -> Iterator[Job]:
    """Units of the sections ``"tracking"``, ``"tracking program"`` and ``"tracking error"``."""
    for name, task in models.tasks.items():
        rounds = ROUNDS_TRANSFORMER if name == "transformer" else ROUNDS
        how = _How(1, 2, 0, 4) if settings.quick else _How(BLOCKS, rounds, WINDOW, STEPS)
        contenders = _Contenders(models, name)
        unit: dict[str, Any] = {"model": name, "task": describe(task)}
        unit["contenders"] = list(with_tracker())
        yield Job({"section": "tracking program", **unit}, contenders.programs)
        for block in range(how.blocks):
            unit |= {"block": block, "rounds": how.rounds, "window": how.window}
            unit |= {"seed": settings.seed}
            measure = functools.partial(contenders.times, how, [settings.seed, block])
            yield Job({"section": "tracking", **unit}, measure)
        for start in ("trained", "initial"):
            unit = {"section": "tracking error", "model": name, "task": describe(task)}
            unit |= {"start": start, "steps": how.steps}
            measure = functools.partial(_errors, models, name, start, how.steps)
            yield Job(unit, measure)


class _Contenders:
    """The compiled steps on one model."""

    def __init__(self, models: Models, name: str):
        self._models, self._name = models, name

    @functools.cached_property
    def _steps(self) -> dict[str, Step]:
        model = self._models[self._name]
        return {label: Step(model, contender) for label, contender in with_tracker().items()}

    def programs(self) -> dict[str, Any]:
        """Seconds of compilation and bytes of each step; bytes of a gradient and an estimate."""
        model = self._models[self._name]
        loss_fn = model.task.loss_fn
        gradient = jax.jit(jax.grad(loss_fn)).lower(model.params, model.batch).compile()
        steps = {
            label: {"compile": step.compile_seconds, "bytes": peak_bytes(step.compiled)}
            for label, step in self._steps.items()
        }
        estimate = compiled_estimate(model, fisher())
        return steps | {
            "gradient": {"bytes": peak_bytes(gradient)},
            "fisher": {"bytes": peak_bytes(estimate)},
        }

    def times(self, how: _How, seed: list[int]) -> dict[str, list[float]]:
        """Seconds a step, of each contender and round."""
        for step in self._steps.values():
            step.run(1)  # compiled, and its code and arrays in the caches
        visits = {label: step.visit() for label, step in self._steps.items()}
        return interleave(visits, how.rounds, how.window, seed)


def _errors(models: Models, name: str, start: str, steps: int) -> dict[str, Any]:
    """Each layer's standard error over its curvature, after a training with fresh batches."""
    model: Model = models[name]
    task = model.task
    tx = optax.chain(track_curvature(fisher(), update_interval=10), optax.adam(LEARNING_RATE))

    @jax.jit
    def step(params: Params, state: Any, batch: Batch) -> tuple[Params, Any]:
        arguments = task.supervised(batch)
        grads = jax.grad(arguments["value_fn"])(params)
        updates, state = tx.update(grads, state, params, **arguments)
        return optax.apply_updates(params, updates), state

    params = model.params if start == "trained" else task.init()
    first = task.training_steps + 1 if start == "trained" else 0
    state = tx.init(params)
    for number in range(first, first + steps):
        params, state = step(params, state, task.minibatch(number))
    report = layer_report(state, params)
    return {
        layer: row["std_error"] / row["curvature"] if row["std_error"] is not None else None
        for layer, row in report.items()
    }
