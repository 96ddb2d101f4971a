"""What `track_curvature` costs beside an optimizer, and how well it knows the curvature."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import optax

from benchmarks.lab._jobs import Job, Models, Settings
from benchmarks.lab._models import Batch, Model, Params
from benchmarks.lab._steps import (
    LEARNING_RATE,
    Steps,
    compiled_estimate,
    compiled_gradient,
    peak_bytes,
    with_tracker,
)
from benchmarks.lab._training import describe
from lama_optax import fisher, layer_report, track_curvature

#: Steps after which the standard error is looked at, and the part of the curvature asked for.
STEPS, WANTED = 200, 0.1
#: Blocks of rounds, rounds of each and seconds of a visit; the transformer's visits are whole
#: intervals of seconds, so that fewer have to do.
BLOCKS, ROUNDS, ROUNDS_TRANSFORMER, WINDOW = 4, 30, 6, 0.1


def jobs(settings: Settings, models: Models) -> Iterator[Job]:
    """Units of the sections ``"tracking"``, ``"tracking program"`` and ``"tracking error"``."""
    for name, task in models.tasks.items():
        rounds = ROUNDS_TRANSFORMER if name == "transformer" else ROUNDS
        blocks, window, count = BLOCKS, WINDOW, STEPS
        if settings.quick:
            blocks, rounds, window, count = 1, 2, 0, 4
        steps = Steps(models, name, with_tracker())
        shared: dict[str, Any] = {"model": name, "task": describe(task)}
        unit = shared | {"contenders": list(with_tracker())}
        programs = functools.partial(_programs, models, name, steps)
        yield Job({"section": "tracking program", **unit}, programs)
        for block in range(blocks):
            own: dict[str, Any] = {
                "block": block,
                "rounds": rounds,
                "window": window,
                "seed": settings.seed,
            }
            measure = functools.partial(steps.times, rounds, window, [settings.seed, block])
            yield Job({"section": "tracking", **unit, **own}, measure)
        for start in ("trained", "initial"):
            own = {"start": start, "steps": count}
            errors = functools.partial(_errors, models, name, start, count)
            yield Job({"section": "tracking error", **shared, **own}, errors)


def _programs(models: Models, name: str, steps: Steps) -> dict[str, Any]:
    """Seconds of compilation and bytes of each step; bytes of a gradient and an estimate."""
    model = models[name]
    found: dict[str, Any] = {
        label: {"compile": step.compile_seconds, "bytes": peak_bytes(step.compiled)}
        for label, step in steps.built.items()
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
