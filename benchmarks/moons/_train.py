"""Training: one jitted `lax.scan` over epochs and steps, vmapped over the seeds of a block.

The axis of the seeds is sharded over the devices, one for each core.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.moons._data import (
    Classifier,
    Params,
    Runs,
    batch_weights,
    cross_entropy,
    make_runs,
)
from benchmarks.moons._settings import Settings
from lama_optax import hutchinson, lam, lama_adam

#: Seeds trained at once.
MAX_BLOCK = 40

#: The optimizers compared: name in results.json -> name in tables and figures.
ARMS = {
    "adam": "Adam",
    "lama": "LAMA-Adam, exact HVP",
    "lama_fd": "LAMA-Adam, finite diff.",
    "lam_weight": "LAM per weight",
    "lam_layer": "LAM per layer",
}


class LayerTrace(NamedTuple):
    """What LAMA-Adam did to each of the L layers, per epoch."""

    curvature: Any  # shape=(S, epochs, L); mean over the epoch's steps of H, Eq. 8
    alpha: Any  # shape=(S, epochs, L); mean of alpha, Eq. 9
    momentum: Any  # shape=(S, epochs, L); largest alpha b1 used
    gain: Any  # shape=(S, epochs, L); mean of the sum of the gradients' weights, over Adam's


class History(NamedTuple):
    """What training leaves; the leading axis of every array is the seed."""

    loss: Any  # shape=(S, epochs); mean of the epoch's batch losses, each taken before its step
    initial_loss: Any  # shape=(S,); of all training points, before training
    final_loss: Any  # shape=(S,); of all training points, after training
    accuracy: Any  # shape=(S,); percent of the test points, after training
    params: Params  # trained
    layers: LayerTrace | None  # None where the optimizer is not LAMA-Adam


def make_optimizer(
    arm: str,
    settings: Settings,
    learning_rate: float | jax.Array,
    sensitivity: float | jax.Array,
    probe_key: jax.Array,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer called ``arm``: one of `ARMS`, or ``"lama_ema"``, gain 1."""
    if arm == "adam":
        adam = optax.adam(learning_rate, settings.b1, settings.b2, settings.eps)
        return optax.with_extra_args_support(adam)
    if arm in ("lam_weight", "lam_layer"):
        return lam(learning_rate, granularity=arm.removeprefix("lam_"))
    return lama_adam(
        learning_rate,
        settings.b1,
        settings.b2,
        settings.eps,
        alpha_min=settings.alpha_min,
        alpha_max=settings.alpha_max,
        sensitivity=sensitivity,
        estimator=hutchinson(
            settings.probes,
            hvp="finite_difference" if arm == "lama_fd" else "exact",
            fd_step=settings.fd_step,
        ),
        update_interval=1,
        momentum="ema" if arm == "lama_ema" else settings.momentum,
        max_momentum=settings.max_momentum,
        key=probe_key,
    )


def train_one(
    run: Runs, learning_rate: jax.Array, sensitivity: jax.Array, *, arm: str, settings: Settings
) -> History:
    """Trains one seed; ``run`` and what is returned are without the seeds' axis."""
    model = Classifier(settings.hidden)
    weights = jnp.asarray(batch_weights(run.x_train.shape[0], settings.batch_size))
    tx = make_optimizer(arm, settings, learning_rate, sensitivity, run.probe_key)

    def step(carry: tuple[Params, Any], batch: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        params, opt_state = carry
        indices, weight = batch
        x, y = run.x_train[indices], run.y_train[indices]

        def scaled_loss(p: Params) -> jax.Array:
            return settings.loss_scale * cross_entropy(model, p, x, y, weight)

        value, grads = jax.value_and_grad(scaled_loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params, value_fn=scaled_loss)
        record = value / settings.loss_scale, _layer_record(arm, settings, opt_state)
        return (optax.apply_updates(params, updates), opt_state), record

    def epoch(carry: tuple[Params, Any], batches: jax.Array) -> tuple[Any, Any]:
        carry, (losses, layers) = jax.lax.scan(step, carry, (batches, weights))
        means = jax.tree.map(lambda record: jnp.mean(record, axis=0), layers)
        if layers is not None:
            means = means._replace(momentum=jnp.max(layers.momentum, axis=0))
        return carry, (jnp.mean(losses), means)

    def full_loss(params: Params) -> jax.Array:
        return cross_entropy(model, params, run.x_train, run.y_train, jnp.ones_like(run.y_train))

    start = run.params, tx.init(run.params)
    (params, _), (loss, layers) = jax.lax.scan(epoch, start, run.batches)
    right = (model.logits(params, run.x_test) > 0) == (run.y_test > 0.5)
    accuracy = 100 * jnp.mean(right)
    return History(loss, full_loss(run.params), full_loss(params), accuracy, params, layers)


def _layer_record(arm: str, settings: Settings, opt_state: Any) -> LayerTrace | None:
    """The layers' numbers after one step; the LAMA state is the first of the chain."""
    if not arm.startswith("lama"):
        return None
    state = opt_state[0]
    if arm == "lama_ema" or settings.momentum == "ema":
        gain = jnp.ones_like(state.weight_sum)
    else:  # Eq. 3 divides by Adam's sum of weights, whatever alpha is
        gain = state.weight_sum / (1 - settings.b1**state.count)
    return LayerTrace(state.curvature, state.alpha, state.momentum, gain)


class Trainer:
    """Trains block after block of seeds; each block is sharded over the devices.

    All blocks have one shape, so that each optimizer is compiled once whatever the number of
    seeds, and the progress bar moves; a short last block is filled up with its first seed, and
    what that gives is dropped.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.runs = make_runs(settings)
        self.devices = jax.devices()[: min(8, settings.seeds)]
        block = min(MAX_BLOCK, settings.seeds)
        self.block_size = math.ceil(block / len(self.devices)) * len(self.devices)
        self._compiled: dict[str, Callable[..., History]] = {}

    def blocks(self, seeds: int) -> list[slice]:
        """The blocks that the first ``seeds`` seeds fill."""
        starts = range(0, seeds, self.block_size)
        return [slice(start, min(start + self.block_size, seeds)) for start in starts]

    def train_block(
        self, arm: str, block: slice, learning_rate: float, sensitivity: float
    ) -> tuple[History, float]:
        """Trains one block; returns its history and the seconds per step and seed."""
        sharding = NamedSharding(Mesh(np.asarray(self.devices), ("seeds",)), PartitionSpec("seeds"))
        count = block.stop - block.start
        members = block.start + np.arange(self.block_size) * (np.arange(self.block_size) < count)
        runs = jax.device_put(jax.tree.map(lambda a: a[members], self.runs), sharding)
        arguments = runs, jnp.float32(learning_rate), jnp.float32(sensitivity)
        if arm not in self._compiled:
            one = functools.partial(train_one, arm=arm, settings=self.settings)
            many = jax.jit(jax.vmap(one, in_axes=(0, None, None)), out_shardings=sharding)
            self._compiled[arm] = many.lower(*arguments).compile()
        began = time.perf_counter()
        history = jax.block_until_ready(self._compiled[arm](*arguments))
        seconds = time.perf_counter() - began
        steps = self.block_size * math.prod(self.runs.batches.shape[1:3])
        return jax.tree.map(lambda a: np.asarray(a)[:count], history), seconds / steps


def join(histories: Sequence[History]) -> History:
    """The histories of several blocks as one."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *histories)
