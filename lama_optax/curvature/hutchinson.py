"""Hutchinson's estimator: trace(H_l) ~ (1/K) sum_k v_k^T H_l v_k, Eq. 7.

The Hessian is never formed; ``H v`` is one differentiation of the gradient along ``v``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lama_optax._checks import check_count, check_flag, check_number, check_word, wide_dtype
from lama_optax._jaxpr.channels_last import channels_last
from lama_optax.curvature.probes import PROBES
from lama_optax.curvature.protocol import (
    LayerCurvature,
    check_twice_differentiable,
    primitive_names,
    scalar_objective,
    standard_error,
)
from lama_optax.layers import Layers

PyTree = Any
Objective = Callable[[PyTree], jax.Array]


@dataclasses.dataclass(frozen=True)
class _Hutchinson:
    """Settings of `hutchinson`."""

    num_probes: int
    probe: str
    hvp: str
    fd_step: float
    scope: str
    chunk_size: int | None
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
        """Eq. (7): the mean over K probes of ``v^T H_l v``, over N_l, for every layer l."""
        del extra_args
        objective = scalar_objective(value_fn, params, self.has_aux)
        primitives = primitive_names(objective, params)
        if self.hvp == "exact":
            check_twice_differentiable(objective, params, primitives)
        quadratic_forms = self._quadratic_forms(objective, params, layers, primitives)
        chunk = self.chunk_size or 1

        def sample(probe_key: jax.Array) -> jax.Array:
            at = params
            if chunk < self.num_probes:
                at, probe_key = _anew(params, probe_key)
            probe = PROBES[self.probe](probe_key, params, layers)
            return quadratic_forms(at, probe)

        keys = jax.random.split(key, self.num_probes)
        if chunk < self.num_probes:
            samples = jax.lax.map(sample, keys, batch_size=chunk if chunk > 1 else None)
        else:
            samples = jax.vmap(sample)(keys)
        return LayerCurvature.from_trace(layers, jnp.mean(samples, axis=0), standard_error(samples))

    def _quadratic_forms(
        self, objective: Objective, params: PyTree, layers: Layers, primitives: frozenset[str]
    ) -> Callable[[PyTree, PyTree], jax.Array]:
        """The function of params and a probe that returns each ``v_l^T H v_l``, shape (L,)."""
        num_layers = len(layers.names)
        hvp = self._hessian_vector_product(objective, params, primitives)

        def joint(params: PyTree, probe: PyTree) -> jax.Array:
            products = jax.tree.map(
                lambda v, hv: v.astype(layers.dtype) * hv.astype(layers.dtype),
                probe,
                hvp(params, probe),
            )
            return layers.sum(products)

        def block(params: PyTree, probe: PyTree) -> jax.Array:
            def one_layer(layer: jax.Array) -> jax.Array:
                is_layer = jnp.arange(num_layers) == layer
                masked = jax.tree.map(
                    lambda v, m: jnp.where(m, v, 0), probe, layers.spread(is_layer, params)
                )
                # A product with 0 would let the other layers' infinities through.
                return jnp.sum(jnp.where(is_layer, joint(params, masked), 0))

            return jax.lax.map(one_layer, jnp.arange(num_layers))

        return joint if self.scope == "joint" else block

    def _hessian_vector_product(
        self, objective: Objective, params: PyTree, primitives: frozenset[str]
    ) -> Callable[[PyTree, PyTree], PyTree]:
        gradient = jax.grad(objective)
        if self.hvp == "exact":
            return channels_last(lambda p, v: jax.jvp(gradient, (p,), (v,))[1], primitives)
        # H v ~ (grad L(theta + delta v) - grad L(theta)) / delta
        gradient = channels_last(gradient, primitives)
        at_params = gradient(params)
        steps = jax.tree.map(lambda p: _representable_step(p, self.fd_step), params)

        def moved(p: jax.Array, v: jax.Array, step: jax.Array) -> jax.Array:
            return (p.astype(step.dtype) + step * v.astype(step.dtype)).astype(p.dtype)

        def quotient(g1: jax.Array, g0: jax.Array, step: jax.Array) -> jax.Array:
            return (g1.astype(step.dtype) - g0.astype(step.dtype)) / step

        def finite_difference(params: PyTree, v: PyTree) -> PyTree:
            at_moved = gradient(jax.tree.map(moved, params, v, steps))
            return jax.tree.map(quotient, at_moved, at_params, steps)

        return finite_difference


def _representable_step(p: jax.Array, step: float) -> jax.Array:
    """For each entry the step nearest to ``step`` that its dtype can take; NaN where that is 0.

    |p| + step is rounded to the grid of the dtype there, on which p - step lies too: it is at least
    as fine towards 0.
    """
    wide = wide_dtype(p)
    dtype = jnp.finfo(p.dtype)
    size = jnp.abs(p.astype(wide))
    end = jax.lax.reduce_precision(size + step, dtype.nexp, dtype.nmant)
    taken = end - size
    return jnp.where(taken > 0, taken, jnp.nan)


def _anew(params: PyTree, probe_key: jax.Array) -> tuple[PyTree, jax.Array]:
    """Both, such that XLA takes the vectors for others in each turn of a loop over probes.

    Else it moves all that the turns share out of the loop, and holds it beside a turn's own values.
    Not the matrices: where they are spread over devices, each turn would gather them.
    """
    leaves, treedef = jax.tree.flatten(params)
    vectors = {i: leaf for i, leaf in enumerate(leaves) if leaf.ndim < 2}
    vectors, probe_key = jax.lax.optimization_barrier((vectors, probe_key))
    anew = [vectors.get(i, leaf) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, anew), probe_key


def hutchinson(
    num_probes: int = 10,
    *,
    probe: str = "rademacher",
    hvp: str = "exact",
    fd_step: float = 1e-2,
    scope: str = "joint",
    chunk_size: int | None = None,
    has_aux: bool = False,
) -> _Hutchinson:
    r"""Hutchinson's estimator of each layer's average curvature.

    .. math::
      H_l = \frac{1}{N_l} \operatorname{tr}(\nabla^2_l L)
        \approx \frac{1}{N_l K} \sum_{k=1}^{K} v_k^\top \nabla^2_l L\, v_k,
      \qquad \mathbb{E}[v v^\top] = I

    The standard error is the samples' standard deviation over :math:`\sqrt K`. One probe has no
    standard error: it is NaN with ``num_probes=1``.

    Args:
      num_probes: K, the number of probes; static.
      probe: distribution of the probes: ``"rademacher"``, ``"gaussian"`` or ``"sphere"`` (each
        layer's block on the sphere of radius :math:`\sqrt{N_l}`).
      hvp: ``"exact"`` (`jax.jvp` of `jax.grad`) or ``"finite_difference"`` (of gradients; for
        losses that cannot be differentiated twice).
      fd_step: the finite difference's step delta, in units of the parameters. Each entry takes the
        nearest step that its dtype holds and divides by that one. A layer with an entry so large
        that the step rounds away is NaN: take a larger step, or wider parameters.
      scope: ``"joint"``: one probe over all layers, K products in all; the other layers' entries
        add noise. ``"block"``: one layer at a time, no noise from the others: K L products.
      chunk_size: how many probes are vmapped at once; the others wait in a loop. Changes memory
        and speed only. None: one, the least memory.
      has_aux: whether ``value_fn`` returns ``(value, aux)``.

    Returns:
      An estimator that needs ``value_fn`` (params -> scalar loss) by keyword, from
      ``tx.update`` or `layer_curvature`.

    Raises:
      ValueError: at construction, if an argument is not one of those; at an estimate, if
        ``value_fn`` is missing, returns no scalar or cannot be differentiated twice.

    References:
      Hutchinson, `A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian
      Smoothing Splines <https://doi.org/10.1080/03610919008812866>`_, 1990

    Examples:
      >>> import jax.numpy as jnp
      >>> from lama_optax import hutchinson, layer_curvature
      >>> value_fn = lambda p: jnp.sum(jnp.sin(p["w"]) * p["w"])
      >>> estimate = layer_curvature(
      ...     {"w": jnp.zeros(4)}, 0, estimator=hutchinson(num_probes=3), value_fn=value_fn
      ... )
      >>> estimate.mean.tolist()
      [2.0]
    """
    check_count("num_probes", num_probes)
    check_word("probe", probe, tuple(PROBES))
    check_word("hvp", hvp, ("exact", "finite_difference"))
    check_number("fd_step", fd_step, "a positive number", low=1e-30)
    check_word("scope", scope, ("joint", "block"))
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    check_flag("has_aux", has_aux)
    return _Hutchinson(num_probes, probe, hvp, fd_step, scope, chunk_size, has_aux)
