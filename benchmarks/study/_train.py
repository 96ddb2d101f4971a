"""Training many runs at once: one compiled program, a fixed number of runs, any hyper-parameters.

A run is a seed with its hyper-parameters. Seeds and hyper-parameters are data to the program, so
that tuning, final runs, controls and searches of a workload share one compilation.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.study._groups import Groups, group_layers
from benchmarks.study._programs import Program
from benchmarks.study._workload import TRAIN_LOSS_EXAMPLES, Run, Workload, make_run

PyTree = Any
Hypers = dict[str, Any]

#: The validation loss is recorded so often, at equal distances.
CHECKPOINTS = 20


class History(NamedTuple):
    """What training leaves; of many runs, the leading axis of every array is the run."""

    initial_loss: Any  # shape=(); validation, before training
    validation_curve: Any  # shape=(CHECKPOINTS,)
    test_loss: Any  # shape=()
    test_metric: Any  # shape=()
    train_loss: Any  # shape=()
    layers: dict[str, Any]  # each shape=(CHECKPOINTS, L); means over the steps between

    @property
    def validation_loss(self) -> Any:
        """After training."""
        return self.validation_curve[..., -1]

    @property
    def diverged(self) -> Any:
        """Whether the validation loss is not finite or ends above where it began."""
        end = self.validation_loss
        return ~(np.isfinite(end) & np.isfinite(self.test_loss) & (end <= self.initial_loss))


def train_one(run: Run, hypers: Hypers, *, workload: Workload, program: Program) -> History:
    """Trains one run."""
    tx = program.make(hypers, run.probe_key)

    def step(carry: tuple[PyTree, PyTree], batch: PyTree) -> tuple[Any, dict[str, jax.Array]]:
        params, opt_state = carry
        examples = workload.prepare(params, run.data, batch)

        def value_fn(p: PyTree) -> jax.Array:
            return workload.loss(p, examples)

        def example_value_fn(p: PyTree, example: PyTree) -> jax.Array:
            return workload.loss(p, jax.tree.map(lambda array: array[None], example))

        extra: dict[str, Any] = {
            "value_fn": value_fn,
            "obj_fn": value_fn,
        }  # optax's Sophia says obj_fn
        if workload.independent_examples:
            extra |= {"example_value_fn": example_value_fn, "batch": examples}
        grads = jax.grad(value_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return (optax.apply_updates(params, updates), opt_state), program.observe(opt_state)

    def stretch(carry: tuple[PyTree, PyTree], batches: PyTree) -> tuple[Any, Any]:
        carry, seen = jax.lax.scan(step, carry, batches)
        loss = workload.evaluate(carry[0], run.data["validation"])[0]
        return carry, (loss, jax.tree.map(lambda x: jnp.mean(x, axis=0), seen))

    batches = jax.tree.map(
        lambda b: b.reshape(CHECKPOINTS, workload.steps // CHECKPOINTS, *b.shape[1:]), run.batches
    )
    initial_loss = workload.evaluate(run.params, run.data["validation"])[0]
    (params, _), (curve, layers) = jax.lax.scan(stretch, (run.params, tx.init(run.params)), batches)
    test_loss, test_metric = workload.evaluate(params, run.data["test"])
    first = jax.tree.map(lambda array: array[:TRAIN_LOSS_EXAMPLES], run.data["train"])
    train_loss = workload.evaluate(params, first)[0]
    return History(initial_loss, curve, test_loss, test_metric, train_loss, layers)


class Trainer:
    """Trains runs of one workload, `Workload.chunk` at a time, shared among the devices."""

    def __init__(self, workload: Workload) -> None:
        assert workload.steps % CHECKPOINTS == 0, workload
        self.workload = workload
        self.devices = jax.devices()
        self.chunk = -(-workload.chunk // len(self.devices)) * len(self.devices)
        self.make_run = functools.cache(lambda seed: make_run(workload, seed))
        self._compiled: dict[str, Callable[..., History]] = {}

    @functools.cached_property
    def params(self) -> PyTree:
        """Parameters of one run, for shapes and names."""
        return self.make_run(0).params

    @functools.cached_property
    def groups(self) -> Groups:
        """The layers."""
        return group_layers(self.params)

    def __call__(
        self,
        name: str,
        program: Program,
        jobs: Sequence[tuple[Hypers, int]],
        done: Callable[[int], object] = lambda runs: None,
    ) -> tuple[History, float]:
        """Trains (hyper-parameters, seed) after (hyper-parameters, seed).

        Args:
          name: of the program; what it compiles to is kept under this name.
          program: what trains.
          jobs: hyper-parameters that are missing have the program's defaults.
          done: called with the number of runs finished.

        Returns:
          The histories of all jobs, stacked, and the core-seconds that they took.
        """
        histories, seconds = [], 0.0
        for start in range(0, len(jobs), self.chunk):
            part = jobs[start : start + self.chunk]
            history, taken = self._train_chunk(name, program, part)
            histories.append(history)
            seconds += taken
            done(len(part))
        return jax.tree.map(lambda *x: np.concatenate(x), *histories), seconds

    def _train_chunk(
        self, name: str, program: Program, jobs: Sequence[tuple[Hypers, int]]
    ) -> tuple[History, float]:
        # All chunks have one shape; a short one is filled up and what that gives is dropped.
        full = [*jobs, *[jobs[0]] * (self.chunk - len(jobs))]
        runs = jax.tree.map(lambda *x: np.stack(x), *(self.make_run(seed) for _, seed in full))
        hypers = {
            key: np.stack([_as_array(own.get(key, default), default) for own, _ in full])
            for key, default in program.hypers.items()
        }
        sharding = NamedSharding(Mesh(np.asarray(self.devices), ("runs",)), PartitionSpec("runs"))
        arguments = jax.device_put((runs, hypers), sharding)
        key = f"{name} {[np.shape(value) for value in hypers.values()]}"
        if key not in self._compiled:
            one = functools.partial(train_one, workload=self.workload, program=program)
            many = jax.jit(jax.vmap(one), out_shardings=sharding)
            self._compiled[key] = many.lower(*arguments).compile()
        # Of the processor: other programs, and pauses, do not count.
        began = time.process_time()
        history = jax.block_until_ready(self._compiled[key](*arguments))
        seconds = time.process_time() - began
        return jax.tree.map(lambda x: np.asarray(x)[: len(jobs)], history), seconds


def _as_array(value: Any, default: float) -> np.ndarray:
    return np.asarray(value, np.int32 if isinstance(default, int) else np.float32)
