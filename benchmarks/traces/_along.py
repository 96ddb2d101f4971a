"""How far `state.curvature` is from the truth along a training: what a default should be.

One training by `optax.adam`. At every step, ten one-probe estimates on the step's batch; from them
follow what `lama_scale` would hold for each number of probes K, interval and decay of the average.
At some steps the truth, from many probes over the training data: the error is that of the number
in the state, so it holds the probes' noise, the batch's noise and what the average lags behind.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.lab._jobs import Job, Models, Settings
from benchmarks.lab._models import Batch, Model, Params, Task
from benchmarks.lab._steps import LEARNING_RATE, compiled_estimate
from benchmarks.lab._training import describe
from lama_optax import flipout, hutchinson

PROBES = 10
#: What is compared: K, interval and decay.
NUM_PROBES, INTERVALS, DECAYS = (1, 10), (1, 10, 100), (0.0, 0.9, 0.99)


class Length(NamedTuple):
    """How long the training is and where the truth is found."""

    steps: int
    chunk: int  # steps of one unit of work
    truth_every: int
    first_truth: int
    truth_batches: int
    truth_probes: int


def length(quick: bool) -> Length:
    """Intervals of the truth share no divisor with those of the estimates: every lag occurs."""
    if quick:
        return Length(4, 2, 2, 1, 1, 1)
    return Length(300, 25, 19, 47, 7, 6)


def jobs(settings: Settings, models: Models) -> Iterator[Job]:
    """Units of the section ``"along"``: one for each chunk of each model's training."""
    for name, task in models.tasks.items():
        # The paper's own benchmark follows the curvature of moons; the transformer's ten estimates
        # at every step take half an hour.
        if name in ("moons", "transformer"):
            continue
        how = length(settings.quick)
        training = _Training(task, how, settings.seed)
        for start in range(0, how.steps, how.chunk):
            unit = {"section": "along", "model": name, "task": describe(task), "start": start}
            unit |= how._asdict() | {"seed": settings.seed, "probes": PROBES}
            del unit["steps"]  # a longer training begins with the same chunks
            yield Job(unit, functools.partial(training.chunk, start))


class _Training:
    """Adam's training, replayed up to the first chunk that is asked for."""

    def __init__(self, task: Task, how: Length, seed: int):
        self._task, self._how, self._seed = task, how, seed
        self._at = 0

    @functools.cached_property
    def _compiled(self) -> tuple[Any, Any, Any, Any]:
        task, params = self._task, self._params
        model = Model(task, params, task.minibatch(0))
        tx = self._tx

        def step(params: Params, state: Any, batch: Batch) -> tuple[Params, Any]:
            updates, state = tx.update(jax.grad(task.loss_fn)(params, batch), state)
            return optax.apply_updates(params, updates), state

        adam = jax.jit(step).lower(params, self._state, model.batch).compile()
        single = compiled_estimate(model, hutchinson(1))
        per_example = compiled_estimate(model, flipout(1))
        truth_probes = self._how.truth_probes
        precise = (
            compiled_estimate(model, flipout(truth_probes)) if truth_probes > 1 else per_example
        )
        return adam, single, per_example, precise

    @functools.cached_property
    def _tx(self) -> optax.GradientTransformation:
        return optax.adam(LEARNING_RATE)

    @functools.cached_property
    def _data(self) -> list[Batch]:
        """The data cut into batches: all of the digits, a part of the text."""
        rows = np.random.default_rng(self._seed).permutation(len(self._task.examples[0]))
        size = self._task.batch_size
        starts = range(0, len(rows) - size + 1, size)[: self._how.truth_batches]
        return [
            tuple(jnp.asarray(array[rows[start : start + size]]) for array in self._task.examples)
            for start in starts
        ]

    def _advance(self, step: int) -> None:
        if self._at > step or self._at == 0:
            self._params = self._task.init()
            self._state = self._tx.init(self._params)
            self._at = 0
        while self._at < step:
            self._next()

    def _next(self) -> None:
        adam = self._compiled[0]
        batch = self._task.minibatch(self._at)
        self._params, self._state = adam(self._params, self._state, batch)
        self._at += 1

    def chunk(self, start: int) -> dict[str, Any]:
        """Estimates at every step, and the truth at some; traces, in the order of the layers."""
        how = self._how
        self._advance(start)
        _, single, per_example, precise = self._compiled
        samples, flipped, truth, batch_truth = [], [], {}, {}
        for step in range(start, min(start + how.chunk, how.steps)):
            batch = self._task.minibatch(step)
            rng = np.random.default_rng([self._seed, step])
            seeds = rng.integers(2**32, size=PROBES + 2, dtype=np.uint32)
            estimates = [single(self._params, batch, seed) for seed in seeds[:PROBES]]
            samples.append(np.asarray(estimates))
            flipped.append(np.asarray(per_example(self._params, batch, seeds[PROBES])))
            if step >= how.first_truth and (step - how.first_truth) % how.truth_every == 0:
                seed = int(seeds[-1])
                truth[step] = _mean(precise, self._params, self._data, seed)
                batch_truth[step] = _mean(precise, self._params, [batch] * 4, seed)
            self._next()
        return {
            "samples": np.stack(samples),
            "flipout": np.stack(flipped),
            "truth": truth,
            "batch_truth": batch_truth,
        }


def _mean(estimate: Any, params: Params, batches: Sequence[Batch], seed: int) -> dict[str, Any]:
    """Mean over batches and its standard error; a batch that is given again gets new probes."""
    found = np.asarray(
        [estimate(params, batch, jnp.uint32((seed + i) % 2**32)) for i, batch in enumerate(batches)]
    )
    count = len(found)
    error = found.std(axis=0, ddof=1) / count**0.5 if count > 1 else np.full(found.shape[1], np.nan)
    return {"mean": found.mean(axis=0), "std_error": error}


def held(estimates: np.ndarray, interval: int, decay: float) -> np.ndarray:
    """What the state holds after each step, from estimates at every step, shape (steps, ...).

    The bias-corrected average of `lama_scale`: an estimate at every ``interval``-th step.
    """
    result = np.empty_like(estimates)
    average, weight = np.zeros_like(estimates[0]), 0.0
    for step, estimate in enumerate(estimates):
        if step % interval == 0:
            new_weight = decay * weight + (1 - decay)
            average = (decay * weight * average + (1 - decay) * estimate) / new_weight
            weight = new_weight
        result[step] = average
    return result
