"""What the estimators that take one example at a time ask of the loss of one example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lama_optax._jaxpr.batch_norm import find_batch_norm
from lama_optax._jaxpr.channels_last import channels_last
from lama_optax._jaxpr.collectives import holds_collective
from lama_optax._jaxpr.interpret import names_in, narrowest_dtype
from lama_optax.curvature.protocol import scalar_objective

PyTree = Any
_REMEDIES = (
    "Take fisher() or hutchinson(), whose functions see the batch as a whole, or BatchNorm's"
    " running averages."
)


def trace_checked(
    name: str, fn: Callable[[PyTree, PyTree], jax.Array], params: PyTree, batch: PyTree
) -> Any:
    """The jaxpr of ``fn(params, example)``, the argument ``name``, for one example of a batch.

    Raises:
      ValueError: if the function normalises by statistics over the batch, which has one example.
    """
    traced: list[Any] = []
    # Inside of `jax.vmap` an example has the sharding that JAX gives it.
    jax.eval_shape(jax.vmap(lambda e: traced.append(jax.make_jaxpr(fn)(params, e))), batch)
    closed = traced[0]
    found = find_batch_norm(closed, len(jax.tree.leaves(params)))
    if found is not None:
        raise ValueError(
            f"{name} takes a mean over the examples, of which it sees one, and subtracts it"
            f" ({found}): BatchNorm in training mode has no loss of one example. {_REMEDIES}"
        )
    return closed


def check_mean(
    name: str,
    mean: jax.Array,
    value_fn: Callable[[PyTree], Any] | None,
    params: PyTree,
    closed: Any,
) -> jax.Array:
    """1, or NaN where the examples' mean loss is not the value of ``value_fn``.

    They are not compared where ``value_fn`` is missing, where it sums over devices, and where a
    function draws random numbers (dropout), which may be others for the batch.

    Raises:
      ValueError: instead of NaN where the values are known at once, outside of `jax.jit`.
    """
    one = jnp.ones((), mean.dtype)
    if not callable(value_fn):
        return one
    objective = scalar_objective(_without_aux(value_fn), params, has_aux=False)
    whole = jax.make_jaxpr(objective)(params)
    if holds_collective(whole) or any(
        name.startswith(("random_", "threefry", "rng_"))
        for name in names_in(whole) | names_in(closed)
    ):
        return one
    value = channels_last(objective, names_in(whole))(params).astype(mean.dtype)
    # Sums of many roundings of the loss's narrowest dtype; another loss differs by far more.
    eps = float(jnp.finfo(narrowest_dtype(closed)).eps)
    limit = eps**0.5 * jnp.maximum(jnp.abs(value), jnp.abs(mean))
    is_same = jnp.abs(value - mean) <= limit
    if not isinstance(is_same, jax.core.Tracer) and not is_same:
        raise ValueError(
            f"{name} and value_fn must be of one loss: the mean over the examples is {mean:.6g},"
            f" value_fn(params) is {value:.6g}. Statistics over the batch (BatchNorm in training"
            " mode) do that, and so does a term that only one of them has, such as weight decay."
            f" {_REMEDIES}"
        )
    return jnp.where(is_same, one, jnp.nan)


def _without_aux(value_fn: Callable[[PyTree], Any]) -> Callable[[PyTree], Any]:
    def value(params: PyTree) -> Any:
        out = value_fn(params)
        return out[0] if isinstance(out, tuple) and len(out) == 2 else out

    return value
