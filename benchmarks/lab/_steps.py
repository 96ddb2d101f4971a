"""Training steps as users write them, one for each optimizer that is compared."""

import dataclasses
import functools
import inspect
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.lab._models import Batch, Model, Params
from benchmarks.lab._timing import Visit
from lama_optax import (
    Estimator,
    fisher,
    flipout,
    hutchinson,
    lama_adam,
    layer_curvature,
    layer_names,
    track_curvature,
)

LEARNING_RATE = 1e-3
ADAM = "optax.adam"


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer and what its step contains."""

    tx: optax.GradientTransformation
    interval: int = 1  # steps from one estimate to the next
    given: bool = False  # whether curvature is given to it, so that it makes no estimate


def contenders() -> dict[str, Contender]:
    """Adam alone, with curvature measured beside it, LAMA, and Sophia at its own interval."""

    def tracked(estimator: Estimator) -> Contender:
        tracker = track_curvature(estimator, update_interval=10)
        return Contender(optax.chain(tracker, optax.adam(LEARNING_RATE)), 10)

    def lama(interval: int, **options: Any) -> Contender:
        return Contender(lama_adam(LEARNING_RATE, update_interval=interval, **options), interval)

    parameters = inspect.signature(optax.contrib.sophia).parameters
    sophia: int = parameters["update_interval"].default
    return {
        ADAM: Contender(optax.adam(LEARNING_RATE)),
        f"{ADAM}, track_curvature(fisher()) every 10": tracked(fisher()),
        f"{ADAM}, track_curvature(hutchinson(1)) every 10": tracked(hutchinson(1)),
        f"{ADAM}, track_curvature(flipout(1)) every 10": tracked(flipout(1)),
        "LAMA, curvature given": Contender(lama_adam(LEARNING_RATE), given=True),
        "LAMA, fisher() every 10": lama(10, estimator=fisher()),
        "LAMA, hutchinson(1) every 10, the default": lama(10),
        "LAMA, hutchinson(10) every step, the paper's": lama(1, estimator=hutchinson(10)),
        f"optax.contrib.sophia every {sophia}": Contender(
            optax.contrib.sophia(LEARNING_RATE), sophia
        ),
    }


class Step:
    """One contender's training step on one model, compiled when it is first needed."""

    def __init__(self, model: Model, contender: Contender):
        self._model, self._contender = model, contender
        self._tx = optax.with_extra_args_support(contender.tx)

    def step(self, params: Params, state: Any, batch: Batch) -> tuple[Params, Any]:
        """The next parameters and state; each optimizer takes the arguments that it needs."""
        task = self._model.task

        def value_fn(p: Params) -> jax.Array:
            return task.loss_fn(p, batch)

        extra: dict[str, Any] = {
            "value_fn": value_fn,
            "obj_fn": value_fn,  # Sophia's word
            "example_value_fn": task.loss_fn,
            "batch": batch,
            "sampled_losses_fn": task.supervised(batch)["sampled_losses_fn"],
        }
        if self._contender.given:
            extra["curvature"] = jnp.ones(len(layer_names(params)))
        grads = jax.grad(value_fn)(params)
        updates, state = self._tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    @functools.cached_property
    def _start(self) -> tuple[Params, Any]:
        params = self._model.params
        return params, self._tx.init(params)

    @functools.cached_property
    def _program(self) -> tuple[Any, float]:
        jitted = jax.jit(self.step, donate_argnums=(0, 1))
        start, batch = self._start, self._model.batch
        began = time.perf_counter()
        program = jitted.lower(*start, batch).compile()
        return program, time.perf_counter() - began

    @property
    def compiled(self) -> Any:
        """The step for the model's batch; old parameters and state make room for the new."""
        return self._program[0]

    @property
    def compile_seconds(self) -> float:
        """What tracing and compilation took."""
        return self._program[1]

    def run(self, steps: int) -> float:
        """Seconds that ``steps`` take, from the trained parameters and a new state."""
        # Donated arrays are gone after a step, so each run starts from copies.
        params, state = jax.block_until_ready(jax.tree.map(jnp.copy, self._start))
        step, batch = self.compiled, self._model.batch
        began = time.perf_counter()
        for _ in range(steps):
            params, state = step(params, state, batch)
            jax.block_until_ready(params)
        return time.perf_counter() - began

    def visit(self) -> Visit:
        """For `interleave`: whole intervals, so that each estimate is paid by its steps."""
        interval = self._contender.interval

        def visit(window: float) -> float:
            seconds, steps = self.run(interval), interval
            if seconds < window:
                # In one go, as in training: a step after a pause takes longer.
                more = interval * math.ceil((window - seconds) / seconds)
                seconds += self.run(more)
                steps += more
            return seconds / steps

        return visit


def peak_bytes(program: Any) -> int:
    """What a compiled program needs beside its arguments, its results among it."""
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def compiled_gradient(model: Model) -> Any:
    """The gradient as a compiled function of (params, batch)."""
    return jax.jit(jax.grad(model.task.loss_fn)).lower(model.params, model.batch).compile()


def compiled_estimate(model: Model, estimator: Estimator) -> Any:
    """The layers' traces as a compiled function of (params, batch, seed)."""
    loss_fn = model.task.loss_fn

    def estimate(params: Params, batch: Batch, seed: jax.Array) -> jax.Array:
        found = layer_curvature(
            params,
            seed,
            estimator=estimator,
            value_fn=lambda p: loss_fn(p, batch),
            sampled_losses_fn=model.task.supervised(batch)["sampled_losses_fn"],
            example_value_fn=loss_fn,
            batch=batch,
        )
        return found.mean * found.size

    # The seed is an argument: probes that were constants would be drawn by the compiler.
    return jax.jit(estimate).lower(model.params, model.batch, jnp.uint32(0)).compile()
