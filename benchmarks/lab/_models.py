"""Four models as users write them, in Flax Linen, from the paper's to a small transformer."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.lab import _data as data
from benchmarks.moons._data import Classifier
from lama_optax import supervised

Params = Any
Batch = tuple[jax.Array, ...]


class MLP(nn.Module):
    """Dense layers with ReLU between them; takes pictures or vectors."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, shape (..., features[-1]), of pictures, shape (..., side, side, 1)."""
        x = x.reshape(*x.shape[:-3], -1)
        for width in self.features[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.features[-1])(x)


class CNN(nn.Module):
    """Two 3x3 convolutions, the second with stride 2, and a dense layer."""

    channels: tuple[int, int] = (32, 64)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, shape (..., 10), of pictures, shape (..., side, side, 1)."""
        x = nn.relu(nn.Conv(self.channels[0], (3, 3))(x))
        x = nn.relu(nn.Conv(self.channels[1], (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(*x.shape[:-3], -1))


class Transformer(nn.Module):
    """A decoder: layer norm before attention and before the two dense layers of each block."""

    depth: int = 4
    width: int = 144
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next token, shape (..., T, tokens), of tokens, shape (..., T)."""
        mask = nn.make_causal_mask(tokens)
        positions = jnp.arange(tokens.shape[-1])
        x = nn.Embed(data.NUM_TOKENS, self.width, name="tokens")(tokens)
        x = x + nn.Embed(tokens.shape[-1], self.width, name="positions")(positions)
        for _ in range(self.depth):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads)(h, h, mask=mask)
            h = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(h)
        return nn.Dense(data.NUM_TOKENS, name="head")(nn.LayerNorm()(x))


@dataclasses.dataclass(frozen=True)
class Task:
    """A network with its data and loss, and how it is trained before it is measured."""

    name: str
    title: str
    network: nn.Module
    load: Callable[[], data.Examples]
    loss: str  # "binary", "classes" or "tokens"
    batch_size: int
    training_steps: int
    learning_rate: float = 1e-3
    seed: int = 0

    @functools.cached_property
    def examples(self) -> data.Examples:
        """All examples: arrays whose leading axis they share."""
        return self.load()

    def output_fn(self, params: Params, batch: Batch) -> jax.Array:
        """The network's outputs for a batch, or for one example without the leading axis."""
        inputs = batch[0][..., :-1] if self.loss == "tokens" else batch[0]
        return jnp.asarray(self.network.apply(params, inputs))

    def targets(self, batch: Batch) -> jax.Array:
        """What the outputs for a batch, or for one example, are held against."""
        return batch[0][..., 1:] if self.loss == "tokens" else batch[1]

    def output_loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """The mean loss of outputs."""
        targets = self.targets(batch)
        if self.loss == "binary":
            return jnp.mean(optax.sigmoid_binary_cross_entropy(outputs, targets))
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
        return jnp.mean(losses)

    def loss_fn(self, params: Params, batch: Batch) -> jax.Array:
        """Mean loss of a batch; of one example, given without the leading axis, its loss."""
        return self.output_loss(self.output_fn(params, batch), batch)

    def supervised(self, batch: Batch) -> dict[str, Any]:
        """What `lama_optax.supervised` makes of the network and a batch: the same loss."""
        inputs = batch[0][..., :-1] if self.loss == "tokens" else batch[0]
        kind = "sigmoid_binary" if self.loss == "binary" else "softmax"
        loss = f"{kind}_cross_entropy"
        apply_fn: Any = self.network.apply  # a bound method: equal to itself
        return supervised(apply_fn, inputs, self.targets(batch), loss=loss)

    def minibatch(self, step: int) -> Batch:
        """The batch of a training step: drawn without repeats, from the seed and the step."""
        rng = np.random.default_rng([self.seed, step])
        rows = rng.choice(len(self.examples[0]), self.batch_size, replace=False)
        return tuple(jnp.asarray(array[rows]) for array in self.examples)

    def init(self) -> Params:
        """Initial parameters."""
        inputs = self.examples[0][:1]
        if self.loss == "tokens":
            inputs = inputs[:, :-1]
        init = jax.jit(self.network.init)  # one program, not one for each operation
        return init(jax.random.key(self.seed), jnp.asarray(inputs))


@dataclasses.dataclass(frozen=True)
class Model:
    """A task at trained parameters, with the one batch that every measurement uses."""

    task: Task
    params: Params
    batch: Batch

    @property
    def name(self) -> str:
        """The task's."""
        return self.task.name

    def value_fn(self, params: Params) -> jax.Array:
        """The batch's mean loss."""
        return self.task.loss_fn(params, self.batch)


def tasks(quick: bool = False) -> dict[str, Task]:
    """The four tasks, or two tiny ones for a quick look."""
    digits = functools.partial(data.digits, 8)
    two_moons = functools.partial(data.moons, 42)
    if quick:
        return {
            "moons": Task("moons", "2-4-1", Classifier(4), two_moons, "binary", 16, 3),
            "mlp": Task("mlp", "64-8-10", MLP((8, 10)), digits, "classes", 16, 3),
        }
    return {
        "moons": Task(
            "moons",
            "the paper's MLP 2-16-1, two moons, batch 64",
            Classifier(16),
            two_moons,
            "binary",
            64,
            550,
        ),
        "mlp": Task(
            "mlp",
            "MLP 784-512-512-10, digits interpolated to 28x28, batch 256",
            MLP((512, 512, 10)),
            functools.partial(data.digits, 28),
            "classes",
            256,
            200,
        ),
        "cnn": Task(
            "cnn",
            "CNN of two 3x3 convolutions and a dense layer, digits 8x8, batch 256",
            CNN(),
            digits,
            "classes",
            256,
            200,
        ),
        "transformer": Task(
            "transformer",
            "transformer of 4 blocks, 32 sequences of 64 characters",
            Transformer(),
            functools.partial(data.characters, 64),
            "tokens",
            32,
            200,
        ),
    }
