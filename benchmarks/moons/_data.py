"""The paper's data and network, and what a training run starts from.

Every seed has its own data, split, initial parameters and batch order, made before and apart
from any optimizer: optimizers given the same `Runs` see the same of each, so that their
difference is paired.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import make_moons
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from benchmarks.moons._settings import Settings

Params = Any


class Classifier(nn.Module):
    """The paper's network, 2-16-1 with ReLU, without its sigmoid: it returns logits.

    The loss takes the logits, which is the cross-entropy of the sigmoid without its rounding.
    """

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, shape (N,), of the points x, shape (N, 2)."""
        x = nn.relu(self._dense(x, self.hidden))
        return self._dense(x, 1)[..., 0]

    def logits(self, params: Params, x: jax.Array) -> jax.Array:
        """The network's value; `apply` could return changed variables too, this one has none."""
        return jnp.asarray(self.apply(params, x))

    def _dense(self, x: jax.Array, features: int) -> jax.Array:
        """Initialised as the paper's framework does: uniform +-1/sqrt(fan_in), biases too."""
        bound = 1 / math.sqrt(x.shape[-1])

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return nn.Dense(features, kernel_init=uniform, bias_init=uniform)(x)


def cross_entropy(
    model: Classifier, params: Params, x: jax.Array, y: jax.Array, weights: jax.Array
) -> jax.Array:
    """Binary cross-entropy, the mean over the points whose weight is 1."""
    losses = optax.sigmoid_binary_cross_entropy(model.logits(params, x), y)
    return jnp.sum(weights * losses) / jnp.sum(weights)


class Runs(NamedTuple):
    """What training starts from; the leading axis of every array is the seed."""

    x_train: Any  # shape=(S, N, 2), standardised
    y_train: Any  # shape=(S, N), 0 or 1
    x_test: Any  # shape=(S, M, 2)
    y_test: Any  # shape=(S, M)
    batches: Any  # shape=(S, epochs, B, batch), int32; indices, the last batch padded
    params: Params  # initial parameters
    probe_key: Any  # shape=(S, 2), uint32; of the estimator's probes


def make_runs(settings: Settings) -> Runs:
    """Data, split, initial parameters and batch order of each seed, as NumPy arrays."""
    model = Classifier(settings.hidden)
    seeds = range(settings.base_seed, settings.base_seed + settings.seeds)
    rows = []
    for seed in seeds:
        x, y = make_moons(settings.samples, noise=settings.noise, random_state=seed)
        train_x, test_x, train_y, test_y = train_test_split(
            x, y, test_size=settings.test_share, random_state=seed
        )
        scaler = StandardScaler().fit(train_x)
        arrays = scaler.transform(train_x), train_y, scaler.transform(test_x), test_y
        order = _batch_order(seed, settings, len(train_x))
        rows.append((*(np.asarray(array, np.float32) for array in arrays), order))
    x_train, y_train, x_test, y_test, batches = map(np.stack, zip(*rows, strict=True))

    @jax.jit
    @jax.vmap
    def start(seed: jax.Array) -> tuple[Params, jax.Array]:
        init_key, probe_key = jax.random.split(jax.random.key(seed))
        return model.init(init_key, jnp.zeros((1, 2))), jax.random.key_data(probe_key)

    params, probe_key = jax.device_get(start(jnp.asarray(seeds, jnp.uint32)))
    return Runs(x_train, y_train, x_test, y_test, batches, params, probe_key)


def batch_weights(num_train: int, batch_size: int) -> np.ndarray:
    """1 for a point and 0 for padding, shape (batches, batch): the last batch may be short."""
    num_batches = math.ceil(num_train / batch_size)
    positions = np.arange(num_batches * batch_size).reshape(num_batches, batch_size)
    return (positions < num_train).astype(np.float32)


def _batch_order(seed: int, settings: Settings, num_train: int) -> np.ndarray:
    """Every epoch is a permutation of the training points; index 0 pads the last batch."""
    rng = np.random.default_rng(seed)
    shape = batch_weights(num_train, settings.batch_size).shape
    order = np.zeros((settings.epochs, shape[0] * shape[1]), np.int32)
    for epoch in order:
        epoch[:num_train] = rng.permutation(num_train)
    return order.reshape(settings.epochs, *shape)
