"""The exact trace of every layer's Hessian block, by every basis vector: N products."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lama_optax._checks import check_flag
from lama_optax._jaxpr.channels_last import channels_last
from lama_optax.curvature.probes import laid_out
from lama_optax.curvature.protocol import (
    LayerCurvature,
    check_twice_differentiable,
    of_each_device,
    primitive_names,
    scalar_objective,
)
from lama_optax.layers import Layers

PyTree = Any


@dataclasses.dataclass(frozen=True)
class _ExactTrace:
    """Settings of `exact_trace`."""

    has_aux: bool

    def estimate(
        self,
        key: jax.Array,
        params: PyTree,
        layers: Layers,
        /,
        *,
        value_fn: Callable[[PyTree], Any] | None = None,
        **extra_args: Any,
    ) -> LayerCurvature:
        """Sums the Hessian's diagonal, entry by entry, over each layer."""
        del key, extra_args
        objective = scalar_objective(value_fn, params, self.has_aux)
        primitives = primitive_names(objective, params)
        check_twice_differentiable(objective, params, primitives)
        leaves, treedef = jax.tree.flatten(params)
        ends = list(itertools.accumulate((leaf.size for leaf in leaves), initial=0))
        count = ends[-1]
        # A basis vector by comparison: scatters refuse leaves spread over explicit mesh axes.
        places = [
            laid_out(jnp.arange(start, end).reshape(leaf.shape), jax.typeof(leaf).sharding)
            for start, end, leaf in zip(ends, ends[1:], leaves, strict=False)
        ]

        gradient = jax.grad(objective)
        hvp = channels_last(lambda v: jax.jvp(gradient, (params,), (v,))[1], primitives)

        def diagonal_entry(i: jax.Array) -> jax.Array:
            basis = [(x == i).astype(leaf.dtype) for x, leaf in zip(places, leaves, strict=True)]
            basis = of_each_device(basis, leaves)
            hv = jax.tree.leaves(hvp(jax.tree.unflatten(treedef, basis)))
            own = [jnp.where(x == i, h, 0) for x, h in zip(places, hv, strict=True)]
            return sum((jnp.sum(x, dtype=layers.dtype) for x in own), jnp.zeros((), layers.dtype))

        numbers = jnp.arange(count)
        entries = jax.lax.map(diagonal_entry, numbers) if count else numbers.astype(layers.dtype)
        diagonal = [
            entries[start:end].reshape(leaf.shape)
            for start, end, leaf in zip(ends, ends[1:], leaves, strict=False)
        ]
        trace = layers.sum(diagonal)
        return LayerCurvature.from_trace(layers, trace, jnp.zeros_like(trace))


def exact_trace(*, has_aux: bool = False) -> _ExactTrace:
    r"""Each layer's average curvature without sampling: for small models and tests.

    .. math::
      H_l = \frac{1}{N_l} \sum_{i \in l} e_i^\top \nabla^2 L\, e_i

    Costs one Hessian-vector product for every parameter. The standard error is 0.

    Args:
      has_aux: whether ``value_fn`` returns ``(value, aux)``.

    Returns:
      An estimator that needs ``value_fn`` (params -> scalar loss) by keyword.

    Raises:
      ValueError: at an estimate, if ``value_fn`` is missing or returns no scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lama_optax import exact_trace, layer_curvature
      >>> value_fn = lambda p: jnp.sum(p["w"] ** 4)
      >>> params = {"w": jnp.ones(2)}
      >>> estimate = layer_curvature(params, 0, estimator=exact_trace(), value_fn=value_fn)
      >>> estimate.mean.tolist()
      [12.0]
    """
    check_flag("has_aux", has_aux)
    return _ExactTrace(has_aux)
