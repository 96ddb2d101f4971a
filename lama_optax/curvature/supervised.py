"""One objective over several micro-batches, for gradients and curvature alike."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def mean_value_fn(
    loss_fn: Callable[[PyTree, PyTree], jax.Array], micro_batches: PyTree
) -> Callable[[PyTree], jax.Array]:
    r"""The mean loss over micro-batches as a function of params, in the memory of one of them.

    .. math::
      L(\theta) = \frac{1}{n} \sum_{i=1}^{n} \mathrm{loss}(\theta, B_i)

    This is the way to accumulate gradients with LAMA: its gradient is the accumulated gradient,
    and a curvature estimated from it is that of all micro-batches, one estimate for each emitted
    step. `optax.MultiSteps` calls the optimizer at every micro-step and keeps the last call: with
    a ``value_fn`` of one micro-batch it would make n estimates and use the last one alone.

    Args:
      loss_fn: ``loss_fn(params, micro_batch) -> scalar``, a mean over equally many examples.
      micro_batches: pytree of arrays with a leading axis of n micro-batches.

    Returns:
      ``value_fn``, a function of params alone. Each micro-batch is evaluated in turn and again
      during differentiation (`jax.checkpoint`), so activations of one are in memory at a time.

    Raises:
      ValueError: if ``micro_batches`` holds no array.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from lama_optax import lama_adam, mean_value_fn
      >>> loss_fn = lambda params, x: jnp.mean((params["w"] - x) ** 2)
      >>> batch = jnp.arange(8.0)
      >>> value_fn = mean_value_fn(loss_fn, batch.reshape(4, 2))
      >>> params = {"w": jnp.zeros(())}
      >>> tx = lama_adam(0.1)
      >>> state = tx.init(params)
      >>> grads = jax.grad(value_fn)(params)
      >>> updates, state = tx.update(grads, state, params, value_fn=value_fn)
      >>> float(grads["w"]), float(state[0].curvature[0])
      (-7.0, 2.0)
    """
    if not jax.tree.leaves(micro_batches):
        raise ValueError(f"micro_batches must hold at least one array; got {micro_batches!r}.")

    def value_fn(params: PyTree) -> jax.Array:
        one = jax.checkpoint(lambda micro_batch: loss_fn(params, micro_batch))
        return jnp.mean(jax.lax.map(one, micro_batches))

    return value_fn
