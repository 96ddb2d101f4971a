"""Times, compilation and memory of training steps, and how well a tracker knows the curvature."""

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
    compiled_gradient,
    contenders,
    peak_bytes,
)
from benchmarks.lab._timing import interleave
from benchmarks.lab._training import describe
from lama_optax import fisher, layer_report, track_curvature

#: Of a model: blocks of rounds, rounds of each, and seconds of a visit at least. A visit is a whole
#: number of intervals from one estimate to the next, so that each estimate is paid by its steps.
ROUNDS = {"transformer": (4, 6, 1.0)}
MORE_ROUNDS = (4, 30, 0.1)
#: Steps after which the standard error is looked at, and the part of the curvature asked for.
STEPS, WANTED = 200, 0.1


def jobs(settings: Settings, models: Models) -> Iterator[Job]:
    """Units of the sections ``"program"``, ``"steps"`` and ``"error"``."""
    for name, task in models.tasks.items():
        blocks, rounds, window = ROUNDS.get(name, MORE_ROUNDS)
        count = STEPS
        if settings.quick:
            blocks, rounds, window, count = 1, 2, 0, 4
        steps = _Steps(models, name)
        shared: dict[str, Any] = {"model": name, "task": describe(task)}
        unit = shared | {"contenders": list(contenders())}
        yield Job({"section": "program", **unit}, steps.programs)
        for block in range(blocks):
            own = {"block": block, "rounds": rounds, "window": window, "seed": settings.seed}
            measure = functools.partial(steps.times, rounds, window, [settings.seed, block])
            yield Job({"section": "steps", **unit, **own}, measure)
        for start in ("trained", "initial"):
            errors = functools.partial(_errors, models, name, start, count)
            yield Job({"section": "error", **shared, "start": start, "steps": count}, errors)


class _Steps:
    """All contenders on one model, compiled when they are first needed."""

    def __init__(self, models: Models, name: str):
        self._models, self._name = models, name

    @functools.cached_property
    def _built(self) -> dict[str, Step]:
        model = self._models[self._name]
        return {label: Step(model, contender) for label, contender in contenders().items()}

    def times(self, rounds: int, window: float, seed: list[int]) -> dict[str, list[float]]:
        """Seconds a step, of each contender and round."""
        for step in self._built.values():
            step.run(1)  # compiled, and its code and arrays in the caches
        visits = {label: step.visit() for label, step in self._built.items()}
        return interleave(visits, rounds, window, seed)

    def programs(self) -> dict[str, Any]:
        """Of each step seconds of compilation and bytes; bytes of a gradient and an estimate."""
        model = self._models[self._name]
        found: dict[str, Any] = {
            label: {"compile": step.compile_seconds, "bytes": peak_bytes(step.compiled)}
            for label, step in self._built.items()
        }
        found["gradient"] = {"bytes": peak_bytes(compiled_gradient(model))}
        found["fisher"] = {"bytes": peak_bytes(compiled_estimate(model, fisher()))}
        return found


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
