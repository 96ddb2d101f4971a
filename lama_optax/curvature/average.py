r"""A moving average that knows its own standard error.

With decay d the n-th estimate x_n enters by the weight 1 - d, and all that came before by d:

    W_n = d W_{n-1} + (1 - d),       Q_n = d^2 Q_{n-1} + (1 - d)^2,
    m_n = (d W_{n-1} m_{n-1} + (1 - d) x_n) / W_n.

So m_n is the mean with weights w_i, which sum to 1, and sum_i w_i^2 = Q_n / W_n^2 =: S. With
independent estimates of one variance, the weighted spread V = sum_i w_i (x_i - m_n)^2 has the mean
(1 - S) Var[x], and Var[m_n] = S Var[x]. Hence the squared standard error V S / (1 - S).

That error is itself estimated, from about 1/S estimates. So it is widened as Student's t
distribution with n = 1/S - 1 degrees of freedom is wider than the normal one, such that the mean
+- 1.96 standard errors is an interval of 95 %: by 1 + 1.21 / n + 1.44 / n^2, the first terms of
the quantile's expansion (Abramowitz and Stegun, 26.7.5). With decay 0.9 these are 7 %.

An estimate may be of k numbers a layer, (k, L). Then V is their weighted covariance, (k, k, L).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lama_optax._checks import as_scalar


class Average(NamedTuple):
    """A moving average for each of L layers; all entries are finite."""

    mean: jax.Array  # shape=(L,) or (k, L), 0 before the first estimate
    spread: jax.Array  # shape=(L,) or (k, k, L), V
    weight: jax.Array  # shape=(L,), W, 0 before the first estimate
    weight_squares: jax.Array  # shape=(L,), Q


def absorb(old: Average, new: jax.Array, decay: ArrayLike) -> tuple[Average, jax.Array]:
    """Averages (L,) or (k, L) in where that is finite, and tells for which layers (L,) it is."""
    decay = as_scalar(decay, new.dtype)
    weight = decay * old.weight + (1 - decay)
    before, after = (jnp.broadcast_to(w, new.shape) for w in (decay * old.weight, weight))
    mean = (before * old.mean + (1 - decay) * new) / after
    share = (1 - decay) / weight
    limit = jnp.finfo(new.dtype).max
    distance = jnp.clip(new - old.mean, -limit, limit)
    # In this order a first estimate, whose share is 1, adds 0 even where its square overflows.
    scaled = jnp.broadcast_to((1 - share) * share, new.shape) * distance
    product = scaled * distance if new.ndim == 1 else scaled[:, None] * distance[None]
    spread = jnp.broadcast_to(1 - share, product.shape) * old.spread + product
    spread = jnp.clip(spread, -limit, limit)
    latest = Average(mean, spread, weight, decay**2 * old.weight_squares + (1 - decay) ** 2)
    taken = jnp.all(jnp.isfinite(mean), axis=tuple(range(mean.ndim - 1)))
    return keep(taken, latest, old), taken


def keep(where: jax.Array, new: Average, old: Average) -> Average:
    """``new`` for the layers ``where`` (L,) is true, ``old`` for the others."""
    return jax.tree.map(lambda n, o: jnp.where(jnp.broadcast_to(where, n.shape), n, o), new, old)


def widened_share(average: Average) -> tuple[jax.Array, jax.Array]:
    """What times the spread is the mean's squared standard error; known from two estimates on."""
    weight = jnp.where(average.weight > 0, average.weight, 1)
    share = average.weight_squares / weight**2
    # A decay of less than 1e-5 keeps the last estimate alone, whatever came before.
    known = (average.weight > 0) & (share < 1 - 1e-5)
    share = jnp.where(known, share, 0.5)
    freedom = 1 / share - 1
    student = 1 + 1.21 / freedom + 1.44 / freedom**2
    return student**2 * share / (1 - share), known
