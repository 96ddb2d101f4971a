"""Hutchinson's estimator with a probe of its own for every example.

For a loss that is a mean over examples the Hessian is a mean of the examples' Hessians,

    trace(H_l) = (1/B) sum_b E[v_b^T H_b,l v_b],

and with independent v_b the variance falls by up to the batch size. `lama_optax._jaxpr.weights`
applies the probes without drawing or storing one weight-shaped array for each example.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lama_optax._checks import check_count, check_word
from lama_optax._jaxpr.channels_last import channels_last
from lama_optax._jaxpr.curvature.second_derivatives import second_derivatives
from lama_optax._jaxpr.interpret import names_in
from lama_optax._jaxpr.weights.evaluate import evaluate
from lama_optax._jaxpr.weights.perturbed import (
    DropSigns,
    Entry,
    Perturbed,
    Signs,
    UsedAgain,
    Uses,
)
from lama_optax.curvature.probes import signs
from lama_optax.curvature.protocol import (
    LayerCurvature,
    check_batch,
    of_each_device,
    scalar_objective,
)
from lama_optax.layers import Layers

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
        **extra_args: Any,
    ) -> LayerCurvature:
        """The mean over examples and probes of ``v_b^T H_b,l v_b``, over N_l."""
        del extra_args
        if example_value_fn is None or batch is None:
            raise ValueError(
                "example_value_fn and batch are needed by flipout: tx.update(grads, state, params,"
                " example_value_fn=lambda p, example: loss of one example, batch=batch), where the"
                " arrays of batch have the examples along their leading axis."
            )
        check_batch(batch)
        is_block = self.scope == "block" or (
            self.scope is None and 0 < len(layers.names) <= _BLOCK_LAYERS
        )
        loss = _ExampleLoss(example_value_fn, params, batch, layers)
        scale = _balanced(updates, layers)

        def joint(probe: PyTree, own: jax.Array, example: PyTree) -> jax.Array:
            def along(t: jax.Array) -> jax.Array:
                return loss(t, probe, own, example)[0]

            t = loss.zeros()
            return jax.jvp(jax.grad(along), (t,), (t + scale,))[1] / scale

        def block(probe: PyTree, own: jax.Array, example: PyTree) -> jax.Array:
            def along(*t: jax.Array) -> tuple[jax.Array, list[Entry]]:
                return loss(t, probe, own, example)

            return jnp.stack(second_derivatives(along, list(loss.zeros())))

        per_example = channels_last(
            jax.vmap(block if is_block else joint, in_axes=(None, 0, 0)), loss.primitives
        )

        def sample(probe_key: jax.Array) -> jax.Array:
            weight_key, sign_key = jax.random.split(probe_key)
            own = _example_signs(sign_key, loss.batch_size, loss.num_signs)
            return per_example(optax.tree.random_like(weight_key, params, signs), own, batch)

        keys = jax.random.split(key, self.num_probes)
        samples = jax.lax.map(sample, keys) if self.num_probes > 1 else sample(keys[0])[None]
        return LayerCurvature.from_trace(
            layers, jnp.mean(samples, axis=(0, 1)), _standard_error(samples, loss.independent)
        )


def _example_signs(key: jax.Array, batch_size: int, num_signs: int) -> jax.Array:
    """Rademacher numbers as `signs` draws them, shape (batch_size, num_signs), int8.

    Unpacked in a loop, which XLA does not fuse: else each use of a sign would unpack it anew.
    """
    words = jax.random.bits(key, (batch_size, -(-num_signs // 32)), jnp.uint32)

    def unpacked(place: jax.Array) -> jax.Array:
        return 1 - 2 * (jnp.right_shift(words, place) & 1).astype(jnp.int8)

    bits = jax.lax.map(unpacked, jnp.arange(32, dtype=words.dtype))
    return jnp.moveaxis(bits, 0, 1).reshape(batch_size, -1)[:, :num_signs]


def _balanced(updates: PyTree, layers: Layers) -> jax.Array:
    """How far joint scope moves each layer, shape (L,): about 1/|g_l|, or 1 without a gradient.

    With layer k moved by s_k v_k, layer l is read as (1/s_l) sum_k s_k v_l^T H_lk v_k. Its own
    term is free of s; the others have mean 0 and, where H_lk is of the size of the root of the
    traces' product, the same relative noise in every layer if s is 1 over the trace's root. A
    gradient's norm follows that root. A layer whose gradient vanishes must not drown the others.
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


class _ExampleLoss:
    """The loss of one example at perturbed params, as a function of the layers' scales t."""

    def __init__(
        self,
        example_value_fn: Callable[[PyTree, PyTree], jax.Array],
        params: PyTree,
        batch: PyTree,
        layers: Layers,
    ):
        example = jax.tree.map(lambda x: x[0], batch)
        self.batch_size = jax.tree.leaves(batch)[0].shape[0]
        self._layers = layers

        def value(p: PyTree, example: PyTree) -> jax.Array:
            objective = scalar_objective(lambda p: example_value_fn(p, example), p, has_aux=False)
            return objective(p).astype(layers.dtype)

        self._value = value(params, example)
        self._params = of_each_device(params, self._value)
        self._jaxpr = jax.make_jaxpr(value)(self._params, example)
        self.primitives = names_in(self._jaxpr)
        # Which signs each leaf can carry in all its uses, and which leaves have one use alone, is
        # found by trying, on shapes alone.
        self._signed = [tuple(range(leaf.ndim)) for leaf in jax.tree.leaves(params)]
        self._single = frozenset(range(len(self._signed)))
        while True:
            own = jax.ShapeDtypeStruct((self.num_signs,), jnp.int8)
            try:
                jax.eval_shape(lambda v, own: self(self.zeros(), v, own, example), params, own)
            except DropSigns as drop:
                self._signed[drop.leaf] = tuple(
                    axis for axis in self._signed[drop.leaf] if axis not in drop.origins
                )
            except UsedAgain as use:
                self._single -= {use.leaf}
            else:
                break
        # Given the shared probe, an example's sample is unbiased on its own, and so independent of
        # the others', where no axis of the layer's leaves lost its signs.
        shared = {
            layer
            for layer, leaf, axes in zip(
                layers.leaf_layer, jax.tree.leaves(params), self._signed, strict=True
            )
            if len(axes) < leaf.ndim
        }
        self.independent = [layer not in shared for layer in range(len(layers.names))]

    def zeros(self) -> jax.Array:
        """The point t at which the loss is differentiated, shape (L,)."""
        return of_each_device(jnp.zeros(len(self._layers.names), self._layers.dtype), self._value)

    @property
    def num_signs(self) -> int:
        """How many signs one example needs: one for each place along each axis that has any."""
        return sum(stop - start for leaf in self._sign_ranges() for _, start, stop in leaf)

    def _sign_ranges(self) -> list[list[tuple[tuple[int, ...], int, int]]]:
        """Of each leaf: the axes of each group of its signs, and where among all signs they are."""
        start = 0
        ranges: list[list[tuple[tuple[int, ...], int, int]]] = []
        for leaf, axes in zip(jax.tree.leaves(self._params), self._signed, strict=True):
            # A scalar has no axis, but a sign.
            groups = [((axis,), leaf.shape[axis]) for axis in axes] if leaf.ndim else [((), 1)]
            ranges.append([])
            for group, length in groups:
                ranges[-1].append((group, start, start + length))
                start += length
        return ranges

    def __call__(
        self,
        t: Sequence[jax.Array] | jax.Array,
        probe: PyTree,
        own: jax.Array,
        example: PyTree,
    ) -> tuple[jax.Array, list[Entry]]:
        """The loss where layer l's weights are moved by ``t[l]``, and where these moves enter.

        ``own``, of shape (num_signs,), are the example's signs.
        """
        leaves = jax.tree.leaves(self._params)
        probes = jax.tree.leaves(of_each_device(probe, self._value))
        scales = jax.tree.leaves(self._layers.spread(t, self._params))
        uses = Uses(self._single)
        weights = []
        for i, (leaf, v, scale, ranges) in enumerate(
            zip(leaves, probes, scales, self._sign_ranges(), strict=True)
        ):
            groups = tuple(
                Signs(
                    frozenset(axes),
                    axes,
                    own[start:stop].reshape([leaf.shape[a] for a in axes]).astype(leaf.dtype),
                )
                for axes, start, stop in ranges
            )
            weights.append(Perturbed(i, leaf, v, scale, groups, uses))
        (value,) = evaluate(self._jaxpr, [*weights, *jax.tree.leaves(example)])
        return value, uses.entries


def _standard_error(samples: jax.Array, independent: list[bool]) -> jax.Array:
    """One standard error of the mean of samples (K, B, L), given the batch."""
    num_probes, batch_size, num_layers = samples.shape
    root = jnp.sqrt(jnp.asarray(num_probes * batch_size, samples.dtype))
    if num_probes == 1:
        within = jnp.std(samples[0], axis=0, ddof=1) / root
        between = jnp.full((num_layers,), jnp.nan, samples.dtype)
    else:
        within = jnp.sqrt(jnp.mean(jnp.var(samples, axis=0, ddof=1), axis=0)) / root
        between = jnp.std(jnp.mean(samples, axis=1), axis=0, ddof=1) / jnp.sqrt(
            jnp.asarray(num_probes, samples.dtype)
        )
    return jnp.where(jnp.asarray(independent), within, between)


def flipout(num_probes: int = 1, *, scope: str | None = None) -> _Flipout:
    r"""Hutchinson's estimator with a probe of its own for every example (Flipout's signs).

    .. math::
      H_l = \frac{1}{N_l} \operatorname{tr}(\nabla^2_l L)
        \approx \frac{1}{N_l K B} \sum_{k=1}^{K} \sum_{b=1}^{B} v_{kb}^\top \nabla^2_l L_b\, v_{kb},
      \qquad L = \frac{1}{B} \sum_{b=1}^{B} L_b

    Of a weight with axes 1 to n the probe is
    :math:`v_b = (s_{b1} \otimes \dots \otimes s_{bn}) \odot V`, with one
    Rademacher V for all examples and a vector of signs for each axis and example. In
    products of the weight with activations the signs go to the activations, so that the examples
    together still cost one matrix product with W and one with V. It works on any function that
    JAX traces; where a use of a weight cannot carry the signs of an axis (a convolution's window,
    the rows of an embedding), that axis has none in all uses of the weight, and the estimate stays
    unbiased. Where a dense layer has one row of outputs for each example and its weight no other
    use, the mean over inputs is taken exactly: the outputs move by :math:`|h_b|\, s_b` and no
    product with V is needed. In block scope an activation f between a layer and the next product,
    at z = h W + b, adds :math:`f''(z)\, \mathrm{E}[z'^2] = f''(z)(|h|^2 + 1)` instead of
    :math:`f''(z)\, z'^2`: the mean over probes is exact there too. So it is through softmax of a
    product of which the layer makes one factor, as a query or a key of attention does.

    The standard error is that of the estimate of this batch's curvature. With one probe it also
    holds the spread between examples, and so is an upper limit; for a layer with an axis without
    signs it is then NaN.

    Args:
      num_probes: K, the number of probes for each example; static. All share the forward pass, and
        in joint scope the gradient's way back: on a transformer ten probes took 6 times as long as
        one, in twice its memory, whatever K.
      scope: ``"joint"``: all layers at once, whatever the depth; in an optimizer, or with the
        gradient as ``updates``, each layer's probe is scaled by about one over the norm of its
        gradient, so that no layer drowns in the noise of others whose curvature is larger.
        ``"block"``: one layer at a time, without the noise of the other layers. Tangents of each
        pass forwards once, from where its weights are used: cost and compile time grow with the
        number of layers.
        None: ``"block"`` up to 8 layers, where it was measured to be the cheaper too.

    Returns:
      An estimator that needs two arguments by keyword: ``example_value_fn(params, example)``, the
      scalar loss of one example, and ``batch``, a pytree of arrays with the examples along the
      leading axis. The loss whose curvature it estimates is the mean over the batch. A third,
      ``updates``, the gradient or anything shaped like it, is what an optimizer adds by itself.

    Raises:
      ValueError: naming the argument, its value and what is allowed.

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
