"""How large a batch is worth it: the gradient noise scale of every layer, with an error bar."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from lama_optax._checks import check_count, check_number
from lama_optax._jaxpr.channels_last import channels_last
from lama_optax.curvature.average import Average, absorb, keep
from lama_optax.curvature.interval import Interval
from lama_optax.curvature.protocol import operations_of_own_part, unreduced
from lama_optax.layers import Layers, LayerSpec, match_to_params, resolve_layers

PyTree = Any


class NoiseScaleState(NamedTuple):
    """State of `track_noise_scale`: of L layers, in the order of `layer_names`, and their total."""

    # All of it is finite: float32, or float64 where a parameter is.
    #: shape=(), dtype=int32; updates made
    count: jax.Array  # type: ignore[assignment]  # a tuple's method
    mean: jax.Array  #: shape=(2, L + 1); averages of tr(Sigma) / scale and ``|G|^2 / scale``
    spread: jax.Array  #: shape=(2, 2, L + 1); weighted covariance of the estimates in them
    weight: jax.Array  #: shape=(L + 1,); sum of the averages' weights, 0 before an estimate
    weight_squares: jax.Array  #: shape=(L + 1,); sum of their squares
    scale: jax.Array  #: shape=(L + 1,); average of ``|g|^2``, which divides the next estimate
    key: jax.Array  #: shape=(2,) for the default PRNG, dtype=uint32; raw data of the first key
    rejected: jax.Array  #: shape=(), dtype=int32; estimates that were not finite

    @property
    def average(self) -> Average:
        """What `lama_optax.curvature.average` calls these arrays."""
        return Average(self.mean, self.spread, self.weight, self.weight_squares)


class _Draw(NamedTuple):
    """One estimate, each of shape (L + 1,)."""

    covariance: jax.Array  # of tr(Sigma)
    square: jax.Array  # of |G|^2, the square norm of the mean gradient
    norm: jax.Array  # |g|^2 of the batch's gradient


def track_noise_scale(
    *,
    layers: LayerSpec = "module",
    update_interval: ArrayLike = 10,
    decay: ArrayLike = 0.9,
    axis_name: str | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Measures each layer's gradient noise scale beside any optimizer; updates pass unchanged.

    .. math::
      B_\mathrm{noise} = \frac{\operatorname{tr}(\Sigma)}{\lVert G \rVert^2}

    where one example's gradient has the mean G and the covariance :math:`\Sigma`. What it says of
    the batch size is in `noise_report`. One more backward pass gives it, with random signs
    :math:`e_i = \pm 1`, from the losses before they are averaged and the batch's gradient g:

    .. math::
      q = \frac{1}{B} \Big\lVert \nabla \sum_i e_i \ell_i \Big\rVert^2, \quad
      \operatorname{tr}(\Sigma) \approx s = (q - \lVert g \rVert^2) \frac{B}{B - 1}, \quad
      \lVert G \rVert^2 \approx m = \frac{B \lVert g \rVert^2 - q}{B - 1}.

    With weights :math:`w_i`, put :math:`e_i w_i` for :math:`e_i` and :math:`\sum_i w_i^2` for B in
    q, and :math:`(\sum_i w_i)^2 / \sum_i w_i^2` for B in s and m. The gradients
    :math:`g_1 \dots g_G` of G groups give it without another pass:

    .. math::
      s = \frac{B}{G} \frac{\sum_k \lVert g_k - \bar g \rVert^2}{G - 1}, \qquad
      m = \lVert \bar g \rVert^2 - \frac{s}{B}.

    All four are unbiased. Gradients shrink by orders of magnitude in training. So that no part of
    it outweighs the others, s and m are divided by a quick average of :math:`\lVert g \rVert^2`
    over the estimates before, and then averaged.

    Place it first in a chain: after clipping or a learning rate the gradient is smaller, and the
    noise scale comes out too large or is not known. Under BatchNorm signs measure total
    derivatives, through the whole batch's statistics; each group has its own.

    Args:
      layers: what one layer is, see `layer_names`.
      update_interval: estimate by signs at every n-th step, from the first. Groups are averaged at
        every step, whatever it is.
      decay: d, decay of the bias-corrected moving average over the estimates, in [0, 1), which
        lags behind by ``1 / (1 - d)`` of them: let these be a small part of the run, since the
        interval does not hold that lag. 0 keeps the last alone, of which nothing is known.
      axis_name: name of the mapped axis inside `jax.shard_map` or `jax.pmap`. Each device then
        draws signs of its own, or passes its own groups, one or more; updates are the mean over
        all, and L + 1 numbers travel. Plain `jit` over sharded arrays needs none.
      key: seed or PRNG key; step t uses ``fold_in(key, t)``.

    Returns:
      A `optax.GradientTransformationExtraArgs` with a `NoiseScaleState`, for `noise_report`. Its
      ``update`` needs ``params``, the batch's gradient as updates, and by keyword either

      * ``losses_fn(params)``, which `supervised` makes: the losses, not reduced, whose mean the
        updates are the gradient of. The first axis counts examples, further axes are averaged. For
        padding and unequal lengths ``(losses, weights)``. For micro-batches, as under
        `optax.MultiSteps`, those of all: ``lambda p: jnp.concatenate(jax.lax.map(
        jax.checkpoint(lambda b: losses(p, b)), micro_batches))``;
      * or ``group_gradients``, shaped like params with a leading axis of groups of equal size, and
        ``batch_size``, the examples of all groups (of all devices); see `grouped_value_and_grad`.

    Raises:
      ValueError: for an argument that is not allowed or is missing, losses that are reduced, or
        fewer than two examples or groups.

    References:
      McCandlish et al., `An Empirical Model of Large-Batch Training
      <https://arxiv.org/abs/1812.06162>`_, 2018

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from lama_optax import noise_report, supervised, track_noise_scale
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params = {"dense": {"kernel": jnp.zeros((4, 3))}}
      >>> tx = optax.chain(track_noise_scale(update_interval=1), optax.sgd(0.01))
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> for step in range(30):
      ...     x = jax.random.normal(jax.random.key(step), (32, 4))
      ...     task = supervised(apply_fn, x, jnp.argmax(x[:, :3], axis=1))
      ...     grads = jax.grad(task["value_fn"])(params)
      ...     updates, state = update(grads, state, params, **task)
      ...     params = optax.apply_updates(params, updates)
      >>> total = noise_report(state, params)["total"]
      >>> 0 < total["at_least"] < total["noise_scale"] < total["at_most"] < 32
      True
    """
    check_number("decay", decay, "in [0, 1)", low=0, high=1)
    interval = Interval(layers, update_interval, axis_name, key)

    def init_fn(params: optax.Params) -> NoiseScaleState:
        partition = resolve_layers(layers, params)

        # No two arrays are one buffer: a step that donates the state could not.
        def zeros(*shape: int) -> jax.Array:
            return jnp.zeros((*shape, len(partition.names) + 1), partition.dtype)

        arrays = zeros(2), zeros(2, 2), zeros(), zeros(), zeros()
        count, rejected = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return NoiseScaleState(count, *arrays, interval.raw_key(), rejected)

    def update_fn(
        updates: optax.Updates,
        state: NoiseScaleState,
        params: optax.Params | None = None,
        *,
        losses_fn: Callable[[PyTree], Any] | None = None,
        group_gradients: PyTree = None,
        batch_size: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, NoiseScaleState]:
        del extra_args
        partition = interval.partition(params, state.weight.size - 1)

        def taken(draw: _Draw) -> NoiseScaleState:
            finite = jnp.isfinite(draw.covariance) & jnp.isfinite(draw.square)
            # A gradient of 0, as of an unused expert, says nothing of the ratio.
            seen = finite & ((draw.covariance != 0) | (draw.square != 0))
            ready = seen & (state.scale > 0)
            divided = jnp.stack(draw[:2]) / jnp.where(ready, state.scale, 1)[None]
            latest, ok = absorb(state.average, divided, decay)
            quick = jnp.where(state.scale > 0, state.scale / 2 + draw.norm / 2, draw.norm)
            rejected = jnp.sum(~finite | (ready & ~ok), dtype=state.rejected.dtype)
            return NoiseScaleState(
                state.count,
                *keep(ready, latest, state.average),
                jnp.where(seen & jnp.isfinite(quick), quick, state.scale),
                state.key,
                state.rejected + rejected,
            )

        def estimate(step_key: jax.Array) -> NoiseScaleState:
            own_params, own_key = interval.of_this_device(params, step_key)
            return taken(_by_signs(losses_fn, own_params, own_key, updates, partition, axis_name))

        if group_gradients is not None:
            leaves = match_to_params("group_gradients", group_gradients, params)
            latest = taken(_by_groups(leaves, batch_size, updates, partition, axis_name))
        else:
            latest = interval.when_due(state, estimate)
        return updates, latest._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _by_signs(
    losses_fn: Callable[[PyTree], Any] | None,
    params: PyTree,
    key: jax.Array,
    updates: PyTree,
    layers: Layers,
    axis_name: str | None,
) -> _Draw:
    """From one backward pass through the examples' losses, each with a random sign."""
    if not callable(losses_fn):
        raise ValueError(
            "losses_fn is missing: the noise scale is estimated from the examples' losses. Pass"
            " tx.update(grads, state, params, **supervised(apply_fn, inputs, targets)), or your own"
            " losses_fn=lambda params: the losses, not reduced; or group_gradients and batch_size,"
            f" from grouped_value_and_grad. Got losses_fn={losses_fn!r}."
        )
    operations = operations_of_own_part("losses_fn", losses_fn, params)

    def signed_sum(p: PyTree) -> tuple[jax.Array, jax.Array]:
        losses, weights = unreduced("losses_fn", losses_fn(p), layers.dtype)
        axes = tuple(range(1, losses.ndim))
        signs = jax.random.rademacher(key, losses.shape[:1], layers.dtype)
        return jnp.sum(signs * jnp.sum(weights * losses, axes)), jnp.sum(weights, axes)

    gradient, weights = channels_last(jax.grad(signed_sum, has_aux=True), operations)(params)
    found = _squares(layers, gradient), jnp.sum(weights), jnp.sum(jnp.square(weights))
    num_examples = weights.size
    if axis_name is not None:
        found = jax.lax.psum(found, axis_name)
        num_examples *= jax.lax.axis_size(axis_name)
    if num_examples < 2:
        raise ValueError(
            "losses_fn must return the losses of at least two examples, along the first axis; got"
            f" {num_examples}."
        )
    square, weight, weight_squares = found
    effective = weight**2 / weight_squares
    # Not so where all other examples are padding: then it is an estimate of nothing, (0, 0).
    known = effective > 1.001
    others = jnp.where(known, effective - 1, 1)
    q, norm = square / weight_squares, _squares(layers, updates)
    covariance = jnp.where(known, (q - norm) * (effective / others), 0)
    return _Draw(covariance, jnp.where(known, (effective * norm - q) / others, 0), norm)


def _by_groups(
    groups: list[jax.Array],
    batch_size: ArrayLike | None,
    updates: PyTree,
    layers: Layers,
    axis_name: str | None,
) -> _Draw:
    """From the gradients of groups; with ``axis_name``, ``updates`` are the mean of all."""
    leaves = jax.tree.leaves(updates)
    shapes = [jnp.shape(g) for g in groups]
    count = shapes[0][0] if shapes and shapes[0] else 0
    if any(shape != (count, *jnp.shape(u)) for shape, u in zip(shapes, leaves, strict=True)):
        raise ValueError(
            "group_gradients must be shaped like the updates with one more axis, of groups, before"
            f" the others; got {shapes} for {[jnp.shape(u) for u in leaves]}."
        )
    wide = [g.astype(layers.dtype) for g in groups]
    if axis_name is None:
        means = [jnp.mean(g, axis=0) for g in wide]
    else:
        means = [u.astype(layers.dtype) for u in leaves]
        count *= jax.lax.axis_size(axis_name)
    if count < 2:
        raise ValueError(f"group_gradients must hold at least two groups; got {count}.")
    check_count("batch_size", batch_size)

    def sums(term: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        """Over the groups, of ``term`` of each gradient and the mean."""
        one = jax.vmap(lambda group: _sums(layers, jax.tree.map(term, group, means)))
        total = jnp.sum(one(wide), axis=0)
        return total if axis_name is None else jax.lax.psum(total, axis_name)

    norm = _squares(layers, means)
    variance = sums(lambda g, m: jnp.square(g - m)) / (count - 1)
    # What rounding alone makes of equal groups is 0.
    rounding = max([float(jnp.finfo(g.dtype).eps) for g in groups], default=0.0)
    variance = jnp.where(variance <= (2 * rounding) ** 2 * norm, 0, variance)
    square = norm - variance / count
    if axis_name is not None:  # updates that are not the mean are rejected, as what is infinite is
        product = sums(jnp.multiply) / count
        square = jnp.where(jnp.abs(product - norm) <= 0.01 * norm, square, jnp.inf)
    return _Draw(variance * (jnp.asarray(batch_size, layers.dtype) / count), square, norm)


def _sums(layers: Layers, tree: PyTree) -> jax.Array:
    """The sum of each layer's entries and of all, shape (L + 1,)."""
    values = layers.sum(tree)
    return jnp.concatenate([values, jnp.sum(values, keepdims=True)])


def _squares(layers: Layers, gradient: PyTree) -> jax.Array:
    return _sums(layers, jax.tree.map(lambda g: jnp.square(g.astype(layers.dtype)), gradient))
