"""Training steps as users write them, one for each optimizer that is compared."""

import dataclasses
import functools
import inspect
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.lab._jobs import Models
from benchmarks.lab._models import Batch, Model, Params
from benchmarks.lab._timing import (
    Spread,
    Visit,
    interleave,
    median_interval,
    paired_ratio,
    paired_ratios,
)
from lama_optax import (
    Estimator,
    fisher,
    flipout,
    hutchinson,
    lama_adam,
    lama_scale,
    layer_curvature,
    layer_names,
    track_curvature,
)

LEARNING_RATE = 1e-3
ADAM = "optax.adam"
GIVEN = "LAMA, curvature given"
CARRYING = "optax.adam, LAMA's arrays passed on"


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer and what its step contains."""

    tx: optax.GradientTransformation
    interval: int = 1  # steps from one estimate to the next; 0: never
    given: bool = False  # whether curvature is given to it, so that it makes no estimate


def first_order() -> dict[str, Contender]:
    """Optimizers that need the gradient alone, and LAMA where it makes no estimate."""
    rate = LEARNING_RATE
    return {
        ADAM: Contender(optax.adam(rate), 0),
        CARRYING: Contender(optax.chain(optax.adam(rate), _carry()), 0),
        "optax.amsgrad": Contender(optax.amsgrad(rate), 0),
        "optax.radam": Contender(optax.radam(rate), 0),
        GIVEN: Contender(lama_adam(rate), given=True),
    }


def _carry() -> optax.GradientTransformation:
    """Does nothing, with a state of what `lama_scale` keeps beside Adam's moments."""

    def init(params: Params) -> Any:
        return lama_scale().init(params)._replace(mu=(), nu=())

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


#: What LAMA is measured with: label -> estimator.
ESTIMATORS: dict[str, Estimator] = {
    "K=10 vmapped, the paper's": hutchinson(10, chunk_size=10),
    "K=10": hutchinson(10),
    "K=1": hutchinson(1),
    "flipout joint": flipout(1, scope="joint"),
    "flipout block": flipout(1, scope="block"),
}


def default_flipout(num_layers: int) -> str:
    """The label of what `flipout()` chooses as it comes: it unrolls up to 8 layers."""
    return "flipout block" if num_layers <= 8 else "flipout joint"


def with_curvature(intervals: tuple[int, ...] = (1, 10)) -> dict[str, Contender]:
    """Optimizers that estimate curvature, beside Adam; Sophia at its own interval."""
    rate = LEARNING_RATE
    sophia = Contender(optax.contrib.sophia(rate), _default_interval(optax.contrib.sophia))
    result = {
        ADAM: Contender(optax.adam(rate), 0),
        f"optax.contrib.sophia, every {sophia.interval}": sophia,
    }
    for label, estimator in ESTIMATORS.items():
        for interval in intervals:
            tx = lama_adam(rate, estimator=estimator, update_interval=interval)
            result[f"LAMA, {label}, every {interval}"] = Contender(tx, interval)
    result["lama_adam as it comes"] = Contender(lama_adam(rate), _default_interval(lama_adam))
    return result


def with_tracker() -> dict[str, Contender]:
    """`optax.adam` alone and with curvature measured beside it."""
    rate = LEARNING_RATE

    def tracked(estimator: Estimator) -> Contender:
        tracker = track_curvature(estimator, update_interval=10)
        return Contender(optax.chain(tracker, optax.adam(rate)), 10)

    return {
        ADAM: Contender(optax.adam(rate), 0),
        "optax.adam, track_curvature(fisher()) every 10": tracked(fisher()),
        "optax.adam, track_curvature(hutchinson(1)) every 10": tracked(hutchinson(1)),
    }


def _default_interval(make: Callable[..., Any]) -> int:
    return inspect.signature(make).parameters["update_interval"].default


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

    def endless(self) -> Callable[[], object]:
        """A function that makes one step and waits for it; each goes on from the last."""
        params, state = jax.tree.map(jnp.copy, self._start)

        def step() -> None:
            nonlocal params, state
            params, state = self.compiled(params, state, self._model.batch)
            jax.block_until_ready(params)

        return step

    def visit(self) -> Visit:
        """For `interleave`: whole intervals, so that each estimate is paid by its steps."""
        interval = max(1, self._contender.interval)

        def visit(window: float) -> float:
            seconds, steps = self.run(interval), interval
            if seconds < window:
                # In one go, as in training: a step after a pause takes longer.
                more = interval * math.ceil((window - seconds) / seconds)
                seconds += self.run(more)
                steps += more
            return seconds / steps

        return visit


class Steps:
    """The steps of several contenders on one model, compiled when they are first needed."""

    def __init__(self, models: Models, name: str, contenders: dict[str, Contender]):
        self._models, self._name, self._contenders = models, name, contenders

    @functools.cached_property
    def built(self) -> dict[str, Step]:
        """By label."""
        model = self._models[self._name]
        return {label: Step(model, contender) for label, contender in self._contenders.items()}

    def times(self, rounds: int, window: float, seed: list[int]) -> dict[str, list[float]]:
        """Seconds a step, of each contender and round."""
        for step in self.built.values():
            step.run(1)  # compiled, and its code and arrays in the caches
        visits = {label: step.visit() for label, step in self.built.items()}
        return interleave(visits, rounds, window, seed)

    def temp_bytes(self) -> dict[str, int]:
        """Bytes that each compiled step needs beside its arguments and results."""
        return {
            label: step.compiled.memory_analysis().temp_size_in_bytes
            for label, step in self.built.items()
        }


def over_adam(blocks: Sequence[dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Of each contender, from blocks of rounds: seconds, and their ratio to Adam's."""
    seconds = {label: [s for block in blocks for s in block[label]] for label in blocks[0]}
    return {
        label: {
            "seconds": Spread.of(times),
            "over_adam": paired_ratio(seconds, label, ADAM),
            "interval": median_interval(paired_ratios(seconds, label, ADAM)),
            "rounds": len(times),
        }
        for label, times in seconds.items()
    }


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
