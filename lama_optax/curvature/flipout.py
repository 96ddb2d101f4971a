"""Hutchinson's estimator with a probe of its own for every example.

For a loss that is a mean over examples the Hessian is a mean of the examples' Hessians,

    trace(H_l) = (1/B) sum_b E[v_b^T H_b,l v_b],

and with independent v_b the variance falls by up to the batch size. `lama_optax._jaxpr.weights`
applies the probes without drawing or storing one weight-shaped array for each example.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lama_optax._checks import check_count, check_word
from lama_optax._jaxpr.channels_last import channels_last
from lama_optax._jaxpr.second_derivatives import second_derivatives
from lama_optax.curvature.examples import check_mean
from lama_optax.curvature.hutchinson import hutchinson
from lama_optax.curvature.probes import signs
from lama_optax.curvature.protocol import (
    LayerCurvature,
    has_custom_vjp,
    of_each_device,
    standard_error,
)
from lama_optax.curvature.signed_loss import SignedLoss, example_signs
from lama_optax.layers import Layers, LayerSpec, resolve_layers

PyTree = Any
# Up to so many layers their blocks are estimated one by one, unless asked otherwise.
_BLOCK_LAYERS = 8
# The layers' scales differ by at most 2 to this power.
_MAX_BALANCE = 6


@dataclasses.dataclass(frozen=True)
class _Flipout:
    """Settings of `flipout`."""

    num_probes: int
    scope: str | None

    def estimate(
        self,
        key: jax.Array,
        params: PyTree,
        layers: Layers,
        /,
        *,
        example_value_fn: Callable[[PyTree, PyTree], jax.Array] | None = None,
        batch: PyTree = None,
        updates: PyTree = None,
        value_fn: Callable[[PyTree], Any] | None = None,
        **extra_args: Any,
    ) -> LayerCurvature:
        """The mean over examples and probes of ``v_b^T H_b,l v_b``, over N_l."""
        del extra_args
        loss = SignedLoss(example_value_fn, params, batch, layers)
        if has_custom_vjp(loss.primitives):
            whole = hutchinson(self.num_probes, scope=self._scope(layers))
            return whole.estimate(key, params, layers, value_fn=loss.mean(batch))
        if updates is None and self._scope(layers) == "joint":
            gradient = channels_last(jax.grad(loss.mean(batch)), loss.primitives)
            updates = gradient(of_each_device(params, (params, batch, loss.closed.consts)))

        def sample(probe_key: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self._sample(probe_key, params, batch, loss, updates)

        keys = jax.random.split(key, self.num_probes)
        if self.num_probes > 1:
            samples, values = jax.lax.map(sample, keys)
        else:
            samples, values = (x[None] for x in sample(keys[0]))
        checked = check_mean("example_value_fn", jnp.mean(values[0]), value_fn, params, loss.closed)
        mean = checked * jnp.mean(samples, axis=(0, 1))
        with jax.debug_nans(False):  # what is not known is NaN
            error = _standard_error(samples, loss.independent)
            return LayerCurvature.from_trace(layers, mean, error)

    def explain(
        self,
        params: PyTree,
        *,
        layers: LayerSpec = "module",
        example_value_fn: Callable[[PyTree, PyTree], jax.Array] | None = None,
        batch: PyTree = None,
        **extra_args: Any,
    ) -> dict[str, dict[str, Any]]:
        """Says what `estimate` would do for each layer, without computing anything.

        Args:
          params: as for `layer_curvature`; shapes (`jax.ShapeDtypeStruct`) are enough.
          layers: as for `layer_curvature`.
          example_value_fn: as for the estimate.
          batch: as for the estimate; shapes are enough.
          **extra_args: ignored.

        Returns:
          name of the layer -> ``{"path": ..., "lost_signs": [...], "why": ...}``. The path is
          ``"joint"``, ``"block"``, or ``"block, by the gradient"``, which is slower and right for
          whatever has a second derivative; "why" names the operation that asked for it.
          ``"lost_signs"`` lists each axis of a leaf along which the examples share their signs,
          which costs variance, with the use that could not carry them.

        Examples:
          >>> import jax.numpy as jnp
          >>> from lama_optax import flipout
          >>> params = {"embed": {"table": jnp.ones((5, 3))}}
          >>> report = flipout().explain(
          ...     params,
          ...     example_value_fn=lambda p, i: jnp.sum(p["embed"]["table"][i] ** 2),
          ...     batch=jnp.arange(8).reshape(4, 2),
          ... )
          >>> report["embed"]["path"], len(report["embed"]["lost_signs"])
          ('block', 1)
        """
        del extra_args
        partition = resolve_layers(layers, params)
        loss = SignedLoss(example_value_fn, params, batch, partition)
        if not has_custom_vjp(loss.primitives):
            sample = functools.partial(self._sample, loss=loss, updates=None)
            jax.eval_shape(sample, jax.random.key(0), params, batch)
        path = self._scope(partition)
        if has_custom_vjp(loss.primitives):
            path, loss.unknown = f"hutchinson, {path}", "custom_vjp"
        elif loss.unknown is not None:
            path = "block, by the gradient"
        return {
            name: {
                "path": path,
                "lost_signs": loss.lost_signs(layer),
                "why": loss.unknown or "every operation is on the list",
            }
            for layer, name in enumerate(partition.names)
        }

    def _scope(self, layers: Layers) -> str:
        is_few = 0 < len(layers.names) <= _BLOCK_LAYERS
        return self.scope or ("block" if is_few else "joint")

    def _sample(
        self, key: jax.Array, params: PyTree, batch: PyTree, loss: SignedLoss, updates: PyTree
    ) -> tuple[jax.Array, jax.Array]:
        """By one probe for each example, ``v_b^T H_b,l v_b``, shape (B, L), and the losses."""
        scale = _balanced(updates, loss.layers)

        def block(params: PyTree, *rest: Any) -> tuple[jax.Array, jax.Array]:
            zeros = list(loss.zeros(params, rest[-1]))
            found = second_derivatives(lambda *t: loss(t, params, *rest), zeros)
            loss.unknown = found.unknown
            return found.derivatives, found.value

        def joint(params: PyTree, *rest: Any) -> tuple[jax.Array, jax.Array]:
            def along(t: jax.Array) -> jax.Array:
                return loss(t, params, *rest)

            t = loss.zeros(params, rest[-1])
            (value, _), (_, product) = jax.jvp(jax.value_and_grad(along), (t,), (t + scale,))
            return product / scale, value

        is_block = self._scope(loss.layers) == "block" and loss.layers.names
        per_example = jax.vmap(block if is_block else joint, in_axes=(None, None, 0, 0))
        weight_key, sign_key = jax.random.split(key)
        own = example_signs(sign_key, batch, loss.num_signs)
        probe = optax.tree.random_like(weight_key, params, signs)
        return channels_last(per_example, loss.primitives)(params, probe, own, batch)


def _balanced(updates: PyTree, layers: Layers) -> jax.Array:
    """How far joint scope moves each layer, shape (L,): about 1/|g_l|, or 1 without a gradient.

    With layer k moved by s_k v_k, layer l is read as (1/s_l) sum_k s_k v_l^T H_lk v_k. Its own
    term is free of s. The others have like noise in all layers if s is 1 over the trace's root,
    which a gradient's norm follows. A layer whose gradient vanishes must not drown the others.
    """
    if updates is None:
        return jnp.ones(len(layers.names), layers.dtype)
    squares = jax.tree.map(lambda g: jnp.square(g.astype(layers.dtype)), updates)
    size = 0.5 * jnp.log2(layers.sum(squares))  # -inf where the gradient is 0
    below = jnp.max(size, initial=-jnp.inf, where=jnp.isfinite(size)) - size
    below = jnp.clip(jnp.nan_to_num(below, nan=0.0), 0, _MAX_BALANCE)
    # Rounded to bfloat16: in a dtype that does not hold s, a layer's own term is not free of it.
    scale = jnp.exp2(below - _MAX_BALANCE)
    return jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)


def _standard_error(samples: jax.Array, independent: list[bool]) -> jax.Array:
    """One standard error of the mean of samples (K, B, L), given the batch."""
    between: Any = standard_error(jnp.mean(samples, axis=1))
    if between is None:
        between, variance = jnp.nan, jnp.var(samples[0], axis=0, ddof=1)
    else:
        variance = jnp.mean(jnp.var(samples, axis=0, ddof=1), axis=0)
    count = jnp.asarray(samples.shape[0] * samples.shape[1], samples.dtype)
    return jnp.where(jnp.asarray(independent), jnp.sqrt(variance / count), between)


def flipout(num_probes: int = 1, *, scope: str | None = None) -> _Flipout:
    r"""Hutchinson's estimator with a probe of its own for every example (Flipout's signs).

    .. math::
      H_l = \frac{1}{N_l} \operatorname{tr}(\nabla^2_l L)
        \approx \frac{1}{N_l K B} \sum_{k=1}^{K} \sum_{b=1}^{B} v_{kb}^\top \nabla^2_l L_b\, v_{kb},
      \qquad L = \frac{1}{B} \sum_{b=1}^{B} L_b

    Of a weight with axes 1 to n the probe is
    :math:`v_b = (s_{b1} \otimes \dots \otimes s_{bn}) \odot V`, with one Rademacher V for all
    examples and a vector of signs for each axis and example. In products the signs go to the
    activations, so that the examples together cost one matrix product with W and one with V. Where
    a use of a weight cannot carry the signs of an axis (a convolution's window, the rows of an
    embedding), that axis has none: the estimate stays unbiased, with more variance. Where a dense
    layer has one row h of outputs for each example and its weight no other use, the outputs move by
    :math:`|h_b|\, s_b`, the mean over V, without a product.

    These short cuts are for real numbers and the operations of a list. Whatever else a loss is made
    of takes a way that is slower and right for what has a second derivative; a loss with a
    `jax.custom_vjp` goes to `hutchinson` as a whole. ``flipout().explain(params, ...)``, with the
    same arguments, says which way each layer takes and which signs are lost where.

    BatchNorm in training mode has no loss of one example. It is refused where the function shows
    it. Where ``value_fn`` is given too, as `supervised` does, the mean loss of the examples must be
    its value to rounding, else the curvature of all layers is NaN (outside of `jax.jit` it is an
    error). Losses that draw random numbers, such as dropout, are not compared.

    The standard error is that of the estimate of this batch's curvature. With one probe it also
    holds the spread between examples, and so is an upper limit; for a layer with an axis without
    signs it is then NaN.

    Args:
      num_probes: K, the number of probes for each example; static. They take turns, in the memory
        of one.
      scope: ``"joint"``: all layers at once, whatever the depth. Each layer's probe is scaled by
        about one over the norm of its gradient, so that no layer drowns in the noise of others. An
        optimizer passes its gradient on, as ``updates``; without one it is computed, which costs
        one gradient more. ``"block"``: one layer at a
        time, without that noise; cost and compile time grow with the number of layers. None:
        ``"block"`` up to 8 layers.

    Returns:
      An estimator that needs two arguments by keyword, ``example_value_fn(params, example)``, the
      scalar loss of one example, and ``batch``, a pytree of arrays with the examples along the
      leading axis. The loss whose curvature it estimates is the mean over the batch.

    Raises:
      ValueError: at construction, if an argument is not one of those; at an estimate, if
        ``example_value_fn`` or ``batch`` is missing, or the loss of one example uses BatchNorm.

    References:
      Wen et al., `Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches
      <https://arxiv.org/abs/1803.04386>`_, 2018

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from lama_optax import flipout, layer_curvature
      >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
      >>> def example_value_fn(params, x):
      ...     return jnp.sum((x @ params["dense"]["kernel"] + params["dense"]["bias"]) ** 2)
      >>> batch = jax.random.normal(jax.random.key(0), (64, 3))
      >>> estimate = layer_curvature(
      ...     params, 0, estimator=flipout(), example_value_fn=example_value_fn, batch=batch
      ... )
      >>> estimate.mean.shape, bool(estimate.std_error[0] > 0)
      ((1,), True)
    """
    check_count("num_probes", num_probes)
    if scope is not None:
        check_word("scope", scope, ("joint", "block"))
    return _Flipout(num_probes, scope)
