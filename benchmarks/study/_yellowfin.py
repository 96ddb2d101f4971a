"""YellowFin's measurements and its SingleStep rule (Zhang and Mitliagkas, 2017), by layer.

In the metric preconditioned by P: gradients are P^(1/2) g, and the curvature h is the layer's
mean of P^(1/2) H P^(1/2), measured by a probe and without its sign, where YellowFin takes the
squared norm of the gradient, which would depend on the scale of the loss.

    h_min, h_max    smallest and largest h of the last 20 steps, averaged
    C               variance of the gradient;   D  distance to the optimum, from |g| / h
    x = sqrt(b)     minimises x^2 D^2 + (1 - x)^4 C / h_min^2, or what h_max / h_min demands
    rate            (1 - sqrt(b))^2 / h_min
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.study._groups import Groups

PyTree = Any

WINDOW = 20
DECAY = 0.999
#: h counts as at least this share of the window's largest: noise takes it through 0 at times.
SMALLEST_SHARE = 1e-3


class Memory(NamedTuple):
    """Running measurements; averages are not yet divided by their weights."""

    window: jax.Array  # shape=(WINDOW, L); the last h, the oldest overwritten
    h_min: jax.Array  # shape=(L,), as all that follow but the mean gradient
    h_max: jax.Array
    mean_gradient: PyTree
    squared_gradient: jax.Array
    norm: jax.Array
    h: jax.Array
    distance: jax.Array
    variance: jax.Array  # C of the last step, corrected


def start(params: PyTree, groups: Groups) -> Memory:
    """Nothing measured yet."""
    zeros = jnp.zeros(groups.count)
    none = jax.tree.map(jnp.zeros_like, params)
    window = jnp.zeros((WINDOW, groups.count))
    return Memory(window, zeros, zeros, none, zeros, zeros, zeros, zeros, zeros)


def measure(
    memory: Memory,
    gradient: PyTree,
    h: jax.Array,
    groups: Groups,
    count: jax.Array,
    pool: float | jax.Array,
) -> Memory:
    """One step's measurements; with ``pool`` = 1 every layer gets those of all together."""
    sizes = jnp.asarray(groups.sizes, float)

    def pooled(values: jax.Array) -> jax.Array:
        return jnp.where(jnp.asarray(pool) == 1, jnp.sum(values), values)

    def average(old: Any, new: Any) -> Any:
        return DECAY * old + (1 - DECAY) * new

    h = jnp.abs(jnp.where(jnp.asarray(pool) == 1, jnp.sum(sizes * h) / jnp.sum(sizes), h))
    window = memory.window.at[(count - 1) % WINDOW].set(h)
    filled = (jnp.arange(WINDOW) < count)[:, None]
    largest = jnp.maximum(jnp.max(jnp.where(filled, window, -jnp.inf), axis=0), 1e-30)
    floor = SMALLEST_SHARE * largest
    smallest = jnp.maximum(jnp.min(jnp.where(filled, window, jnp.inf), axis=0), floor)
    h = jnp.maximum(h, floor)

    correction = 1 - DECAY ** count.astype(float)
    mean_gradient = jax.tree.map(average, memory.mean_gradient, gradient)
    squared = average(memory.squared_gradient, groups.sum(jax.tree.map(jnp.square, gradient)))
    mean_squared = groups.sum(jax.tree.map(lambda m: (m / correction) ** 2, mean_gradient))
    variance = pooled(jnp.maximum(squared / correction - mean_squared, 0))
    norm = average(memory.norm, jnp.sqrt(pooled(groups.sum(jax.tree.map(jnp.square, gradient)))))
    h_mean = average(memory.h, h)
    return Memory(
        window=window,
        h_min=average(memory.h_min, smallest),
        h_max=average(memory.h_max, largest),
        mean_gradient=mean_gradient,
        squared_gradient=squared,
        norm=norm,
        h=h_mean,
        # The weights of both averages are equal and cancel.
        distance=average(memory.distance, norm / h_mean),
        variance=variance,
    )


def single_step(memory: Memory, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Momentum and rate of every layer."""
    correction = 1 - DECAY ** count.astype(float)
    h_min, h_max = memory.h_min / correction, memory.h_max / correction
    distance = memory.distance / correction
    # x^2 D^2 + (1 - x)^4 C / h_min^2 is least where p x = (1 - x)^3.
    p = distance**2 * h_min**2 / (2 * jnp.maximum(memory.variance, 1e-30))
    p = jnp.clip(p, 1e-6, 1e6)  # beyond, float32 loses the root, which is 1 or 0
    x = _root(p)
    condition = jnp.sqrt(h_max / h_min)
    b = jnp.maximum(x, (condition - 1) / (condition + 1)) ** 2
    b = jnp.clip(b, 0, 0.999)
    return b, (1 - jnp.sqrt(b)) ** 2 / h_min


def _root(p: jax.Array) -> jax.Array:
    """The root of p x = (1 - x)^3 in (0, 1): by bisection, whose float32 error is known."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        is_low = p * middle < (1 - middle) ** 3
        return jnp.where(is_low, middle, low), jnp.where(is_low, high, middle)

    low, high = jax.lax.fori_loop(0, 24, halve, (jnp.zeros_like(p), jnp.ones_like(p)))
    return (low + high) / 2
