"""Networks, data, batches and rates, fixed before the first run."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lab import _corpus as corpus
from benchmarks.lab import _data as data
from benchmarks.lab._gpt import GPT
from benchmarks.lab._models import CNN, MLP
from lama_optax import supervised

CONTEXT = 64


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is trained, at which batches and rates, and to which losses."""

    name: str
    title: str
    network: nn.Module
    text: bool
    batches: tuple[int, ...]
    rates: tuple[float, ...]  # times `base_rate`
    seeds: int
    targets: tuple[float, ...]  # losses on data that is not trained on, or on all of it (digits)
    base_rate: float  # at a batch of 32; it goes with the batch's fourth root
    guess: tuple[float, float]  # S_min and B_c by which runs are cut: 4 S_min (1 + B_c / B) steps
    true_examples: int = 384  # of the text, at each of four looks

    @functools.cached_property
    def _bytes(self) -> dict[str, jax.Array]:
        return {name: jnp.asarray(part) for name, part in corpus.split().items()}

    @functools.cached_property
    def _digits(self) -> tuple[jax.Array, jax.Array]:
        pictures, labels = data.digits(8)
        return jnp.asarray(pictures), jnp.asarray(labels)

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
        """Examples' places: windows of the text, or rows, drawn with replacement."""
        high = self._bytes["train"].size - CONTEXT if self.text else len(self._digits[0])
        return jnp.asarray(rng.integers(high, size=shape), jnp.int32)

    def batch(self, places: jax.Array, part: str = "train") -> tuple[jax.Array, jax.Array]:
        """Inputs and targets at the places."""
        if not self.text:
            return self._digits[0][places], self._digits[1][places]
        windows = self._bytes[part][places[:, None] + jnp.arange(CONTEXT + 1)].astype(jnp.int32)
        return windows[:, :-1], windows[:, 1:]

    def judged(self) -> tuple[jax.Array, jax.Array]:
        """What the loss is read from: 128 windows of files not trained on, or 512 digits."""
        if not self.text:
            return self.batch(jnp.arange(512))
        ends = np.linspace(0, self._bytes["test"].size - CONTEXT - 1, 128)
        return self.batch(jnp.asarray(ends, jnp.int32), "test")

    def exact(self) -> jax.Array:
        """Places of the examples that the true noise scale is of."""
        if not self.text:
            return jnp.arange(len(self._digits[0]))
        return self.draw(np.random.default_rng([99]), (self.true_examples,))

    def loss(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Mean loss of a batch."""
        return self.task(batch)["value_fn"](params)

    def task(self, batch: tuple[jax.Array, jax.Array]) -> dict[str, Any]:
        """What `supervised` makes of the network and a batch."""
        apply_fn: Callable[..., Any] = self.network.apply
        return supervised(apply_fn, *batch, loss="softmax_cross_entropy")

    @functools.cached_property
    def _init(self) -> Callable[..., Any]:
        return jax.jit(self.network.init)

    def init(self, seed: int) -> Any:
        """Initial parameters."""
        inputs, _ = self.batch(jnp.zeros(1, jnp.int32))
        return self._init(jax.random.key(seed), inputs)

    def rate(self, batch: int, rate: float) -> float:
        """The learning rate of a batch; the best ones lie inside the rates' range."""
        return float(self.base_rate * rate * (batch / 32) ** 0.25)

    def most_steps(self, batch: int) -> int:
        """After so many steps a run is given up."""
        steps, critical = self.guess
        return int(4 * steps * (1 + critical / batch))


_POWERS = tuple(2**i for i in range(2, 9))
_RATES = (0.5, 1.0, 2.0)


def workloads(quick: bool = False) -> dict[str, Workload]:
    """The four workloads, or a tiny one for a quick look."""
    if quick:
        tiny = (MLP((8, 10)), False, (8, 32), (1.0,), 1, (1.5,), 4e-3, (20, 10))
        return {"mlp": Workload("mlp", "MLP 64-8-10, digits", *tiny)}
    losses = (3.0, 2.8, 2.6, 2.4)
    small = (GPT(32), True, _POWERS, _RATES, 3, losses, 4e-3, (120, 50))
    large = (GPT(96), True, (4, 16, 32, 64, 128), (0.7, 1.4), 2, losses, 2e-3, (100, 50))
    digits = (False, _POWERS, _RATES, 3, (0.5, 0.3, 0.2, 0.1), 2e-3)
    found = (
        Workload("gpt-70k", "GPT, 70 k parameters, Optax's source", *small),
        Workload("gpt-500k", "GPT, 0.5 M parameters, Optax's source", *large),
        Workload("cnn", "CNN 8-16, digits", CNN((8, 16)), *digits, (60, 30)),
        Workload("mlp", "MLP 64-64-64-10, digits", MLP((64, 64, 10)), *digits, (40, 30)),
    )
    return {workload.name: workload for workload in found}
