"""Networks, data and training, fixed before the first run."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.lab import _corpus as corpus
from benchmarks.lab import _data as data
from benchmarks.lab._gpt import GPT, Block
from benchmarks.lab._models import MLP

CONTEXT = 64
Batch = tuple[jax.Array, jax.Array]


class BatchNormCNN(nn.Module):
    """Three 3x3 convolutions with BatchNorm, and a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits, shape (n, 10), of pictures, shape (n, 8, 8, 1)."""
        for channels, stride in ((16, 1), (32, 2), (32, 2)):
            x = nn.Conv(channels, (3, 3), strides=stride, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


class ViT(nn.Module):
    """A transformer on the 16 patches of 2x2 pixels: 3 blocks of width 48."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, shape (n, 10), of pictures, shape (n, 8, 8, 1)."""
        x = nn.Conv(48, (2, 2), strides=2, name="patches")(x).reshape(len(x), 16, 48)
        x = x + self.param("positions", nn.initializers.normal(0.02), (16, 48))
        for i in range(3):
            x = Block(48, 4, name=f"block_{i}")(x, None)
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x).mean(axis=1))


class Trained(NamedTuple):
    """What a training leaves."""

    params: Any
    statistics: Any  # of BatchNorm, or empty
    second_moment: Any  # Adam's, shaped like params


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, its data, and how it is trained."""

    name: str
    title: str
    module: nn.Module
    text: bool
    steps: int
    rate: float
    batch_size: int

    @functools.cached_property
    def _digits(self) -> dict[str, Batch]:
        pictures, labels = data.digits(8)
        order = np.random.default_rng(0).permutation(len(pictures))
        parts = {"test": order[:360], "validation": order[360:720], "train": order[720:]}
        return {
            name: (jnp.asarray(pictures[rows]), jnp.asarray(labels[rows]))
            for name, rows in parts.items()
        }

    @functools.cached_property
    def _bytes(self) -> dict[str, jax.Array]:
        return {name: jnp.asarray(part) for name, part in corpus.split().items()}

    def batch(self, rng: np.random.Generator, size: int, part: str = "train") -> Batch:
        """Examples drawn with replacement."""
        if not self.text:
            rows = rng.integers(len(self._digits[part][0]), size=size)
            inputs, targets = self._digits[part]
            return inputs[rows], targets[rows]
        starts = rng.integers(self._bytes[part].size - CONTEXT, size=(size, 1))
        windows = self._bytes[part][starts + np.arange(CONTEXT + 1)].astype(jnp.int32)
        return windows[:, :-1], windows[:, 1:]

    def judged(self, part: str) -> Batch:
        """``"test"``: what results are read from; ``"validation"``: what a user verifies by."""
        if not self.text:
            return self._digits[part]
        return self.batch(np.random.default_rng(5), 192 if part == "test" else 48, part)

    def apply(self, params: Any, statistics: Any, inputs: jax.Array) -> jax.Array:
        """Logits, with BatchNorm as it is used after training."""
        return jnp.asarray(self.module.apply({"params": params, **statistics}, inputs))

    def train(self, seed: int) -> Trained:
        """Trains by AdamW with warm-up and cosine, as users do."""
        rng = np.random.default_rng([seed, 1])
        variables = dict(jax.jit(self.module.init)(jax.random.key(seed), self.batch(rng, 2)[0]))
        params = variables.pop("params")
        schedule = optax.warmup_cosine_decay_schedule(0.0, self.rate, self.steps // 20, self.steps)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95))

        def loss(params: Any, variables: Any, batch: Batch) -> tuple[jax.Array, Any]:
            if variables:
                logits, variables = self.module.apply(
                    {"params": params, **variables}, batch[0], True, mutable=["batch_stats"]
                )
            else:
                logits = jnp.asarray(self.module.apply({"params": params}, batch[0]))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
            return jnp.mean(losses), variables

        @jax.jit
        def step(params: Any, variables: Any, state: Any, batch: Batch) -> tuple[Any, Any, Any]:
            grads, variables = jax.grad(loss, has_aux=True)(params, variables, batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), variables, state

        state = tx.init(params)
        for _ in range(self.steps):
            batch = self.batch(rng, self.batch_size)
            params, variables, state = step(params, variables, state, batch)
        return Trained(params, variables, optax.tree.get(state, "nu"))


def networks(quick: bool = False) -> dict[str, Network]:
    """The five networks, or a tiny training of one."""
    mlp = Network("mlp", "MLP 64-64-64-10, digits", MLP((64, 64, 10)), False, 300, 3e-3, 64)
    if quick:
        return {"mlp": dataclasses.replace(mlp, steps=30)}
    found = (
        Network("gpt-500k", "GPT, 0.5 M", GPT(96), True, 800, 3e-3, 16),
        Network("gpt-200k", "GPT, 0.2 M", GPT(60), True, 800, 3e-3, 16),
        Network("vit", "ViT, 0.09 M, digits", ViT(), False, 500, 2e-3, 64),
        Network("cnn", "CNN with BatchNorm, digits", BatchNormCNN(), False, 300, 3e-3, 64),
        mlp,
    )
    return {network.name: network for network in found}
