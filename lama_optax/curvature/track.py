"""Curvature beside any optimizer: the tracker and its state."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from lama_optax._checks import check_number
from lama_optax._jaxpr.collectives import holds_collective
from lama_optax.curvature.average import Average, absorb, widened_share
from lama_optax.curvature.fisher import fisher
from lama_optax.curvature.interval import Interval
from lama_optax.curvature.protocol import Estimator, check_estimator
from lama_optax.layers import Layers, LayerSpec, match_to_params, resolve_layers

PyTree = Any


class CurvatureState(NamedTuple):
    """State of `track_curvature`; L layers in the order of `layer_names`. All of it is finite."""

    #: shape=(), dtype=int32; updates made
    count: jax.Array  # type: ignore[assignment]  # a tuple's method
    curvature: jax.Array  #: shape=(L,), float32 (float64 where a parameter is); the average of H_l
    spread: jax.Array  #: shape=(L,), same dtype; weighted variance of the estimates in it
    weight: jax.Array  #: shape=(L,), same dtype; sum of the average's weights, 0 before an estimate
    weight_squares: jax.Array  #: shape=(L,), same dtype; sum of their squares
    key: jax.Array  #: shape=(2,) for the default PRNG, dtype=uint32; raw data of the first key
    rejected: jax.Array  #: shape=(), dtype=int32; layers' estimates that were not finite

    @property
    def average(self) -> Average:
        """What `lama_optax.curvature.average` calls these arrays."""
        return Average(self.curvature, self.spread, self.weight, self.weight_squares)

    @property
    def std_error(self) -> jax.Array:
        """One standard error of ``curvature``, shape (L,); NaN while it cannot be known."""
        factor, known = widened_share(self.average)
        # From numpy: `jax.debug_nans` looks for NaN in what JAX computes.
        unknown = np.full(known.shape, np.nan, factor.dtype)
        if isinstance(known, jax.core.Tracer):
            return jnp.where(known, jnp.sqrt(self.spread * factor), unknown)
        error = np.where(known, np.sqrt(np.asarray(self.spread * factor)), unknown)
        return jax.device_put(error.astype(factor.dtype))


def track_curvature(
    estimator: Estimator = fisher(),
    *,
    layers: LayerSpec = "module",
    update_interval: ArrayLike = 10,
    curvature_decay: ArrayLike = 0.9,
    axis_name: str | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Measures each layer's curvature while any optimizer trains; updates pass unchanged.

    At every ``update_interval``-th step an estimate :math:`x_n` of each layer's average curvature
    :math:`H_l = \operatorname{tr}(\nabla_l^2 L) / N_l` enters a moving average with its
    standard error,

    .. math::
      \begin{align*}
        m_n &= \textstyle\sum_{i \le n} w_i x_i, \quad w_i \propto d^{\,n-i}, \quad
          \sum_i w_i = 1, \\
        \mathrm{se}_n^2 &= \frac{S V}{1 - S}, \quad S = \textstyle\sum_i w_i^2, \quad
          V = \sum_i w_i (x_i - m_n)^2,
      \end{align*}

    widened by Student's factor (7 % with the default decay), so that
    :math:`m_n \pm 1.96\, \mathrm{se}_n` is a 95 % interval. The spread of the estimates holds the
    noise of what was drawn and that of the batches. So, while the parameters stand still, the
    interval is one for the whole data's curvature. While they move, it is one for the average over
    the last ``1 / (1 - d)`` estimates, and the spread holds that movement too.

    A layer whose estimate is not finite keeps what it had, and ``state.rejected`` counts it.

    Args:
      estimator: `fisher`, about one gradient, for any model that has a gradient; or
        `hutchinson`, `flipout`, `gauss_newton`, `exact_trace`, or one of your own.
      layers: what one layer is, see `layer_names`.
      update_interval: estimate at every n-th step, from the first. Between them nothing is
        computed and the curvature stays.
      curvature_decay: d, decay of the bias-corrected moving average over the estimates, in
        [0, 1). 0 keeps the last estimate alone, which has no standard error.
      axis_name: name of the mapped axis inside `jax.shard_map` or `jax.pmap`. Each device then
        estimates from its own part of the batch with draws of its own, and the L averages are
        averaged over the devices. Plain `jit` over sharded arrays needs none.
      key: seed or PRNG key. Step t uses ``fold_in(key, t)``: a resumed run draws what an unbroken
        one would.

    Returns:
      A `optax.GradientTransformationExtraArgs` with a `CurvatureState`. Its ``update`` needs
      ``params`` and by keyword what the estimator asks for, which `supervised` makes all at once;
      or ``curvature``, computed elsewhere: the (L,) averages, or scalars in a tree shaped like
      params. Other keywords are ignored.

    Raises:
      ValueError: at construction, for an argument that is not allowed; at ``init``, for parameters
        that are not real floating point or ``layers`` that do not fit them; at ``update``, for
        missing ``params`` or a missing argument of the estimator.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from lama_optax import fisher, layer_report, supervised, track_curvature
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params = {"dense": {"kernel": jnp.zeros((4, 3))}}
      >>> tx = optax.chain(track_curvature(fisher(), update_interval=2), optax.adamw(1e-2))
      >>> @jax.jit
      ... def train_step(params, state, x, y):
      ...     task = supervised(apply_fn, x, y, loss="softmax_cross_entropy")
      ...     grads = jax.grad(task["value_fn"])(params)
      ...     updates, state = tx.update(grads, state, params, **task)
      ...     return optax.apply_updates(params, updates), state
      >>> state = tx.init(params)
      >>> for step in range(4):
      ...     x = jax.random.normal(jax.random.key(step), (32, 4))
      ...     params, state = train_step(params, state, x, jnp.arange(32) % 3)
      >>> sorted(layer_report(state, params)["dense"])
      ['curvature', 'size', 'std_error']
    """
    check_estimator(estimator)
    check_number("curvature_decay", curvature_decay, "in [0, 1)", low=0, high=1)
    interval = Interval(layers, update_interval, axis_name, key)

    def init_fn(params: optax.Params) -> CurvatureState:
        partition = resolve_layers(layers, params)

        # No two arrays are one buffer: a step that donates the state could not.
        def zeros() -> jax.Array:
            return jnp.zeros(len(partition.names), partition.dtype)

        count, rejected = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return CurvatureState(
            count, zeros(), zeros(), zeros(), zeros(), interval.raw_key(), rejected
        )

    def update_fn(
        updates: optax.Updates,
        state: CurvatureState,
        params: optax.Params | None = None,
        *,
        curvature: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CurvatureState]:
        partition = interval.partition(params, state.curvature.size)

        def taken(mean: jax.Array) -> CurvatureState:
            if axis_name is not None:
                mean = jax.lax.pmean(mean, axis_name)
            latest, ok = absorb(state.average, mean.astype(partition.dtype), curvature_decay)
            rejected = state.rejected + jnp.sum(~ok, dtype=state.rejected.dtype)
            return CurvatureState(state.count, *latest, state.key, rejected)

        def estimate(step_key: jax.Array) -> CurvatureState:
            own_params, own_key, own_args = _of_this_device(interval, params, step_key, extra_args)
            own_args = own_args | {"updates": updates}
            return taken(estimator.estimate(own_key, own_params, partition, **own_args).mean)

        if curvature is not None:
            latest = taken(_curvature_array(curvature, params, partition))
        else:
            latest = interval.when_due(state, estimate)
        return updates, latest._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _of_this_device(
    interval: Interval, params: PyTree, key: jax.Array, extra_args: dict[str, Any]
) -> tuple[PyTree, jax.Array, dict[str, Any]]:
    """What one device of a mapped axis estimates from: its part of the batch, its own draws.

    A ``value_fn`` that itself sums over the devices is one function of all: then all take the same
    draws, and the mean over devices makes their losses one.
    """
    axis_name, value_fn = interval.axis_name, extra_args.get("value_fn")
    if (
        axis_name is None
        or not callable(value_fn)
        or not holds_collective(jax.make_jaxpr(value_fn)(params))
    ):
        return *interval.of_this_device(params, key), extra_args

    def mean(p: PyTree) -> Any:
        return jax.tree.map(lambda x: jax.lax.pmean(x, axis_name), value_fn(p))

    return params, key, extra_args | {"value_fn": mean}


def _curvature_array(curvature: Any, params: PyTree, partition: Layers) -> jax.Array:
    """The (L,) averages from themselves or from a scalar for each leaf, weighted by its size."""
    num_layers = len(partition.names)
    if isinstance(curvature, jax.Array | np.ndarray) and np.ndim(curvature) > 0:
        if curvature.shape != (num_layers,):
            raise ValueError(
                f"curvature must have shape ({num_layers},), one entry a layer, or be a tree of"
                f" scalars shaped like params; got shape {curvature.shape} for the layers"
                f" {partition.names}."
            )
        return jnp.asarray(curvature)
    leaf_means = match_to_params("curvature", curvature, params)
    leaf_sums = []
    for mean, leaf, depth in zip(
        leaf_means, jax.tree.leaves(params), partition.leaf_depth, strict=True
    ):
        shape = () if depth is None else (depth,)
        if jnp.shape(mean) not in ((), shape):
            raise ValueError(
                "curvature must hold a scalar for each leaf (or one for each stacked layer) where"
                f" it is a tree; got shape {jnp.shape(mean)} for a leaf of shape {leaf.shape}."
            )
        means = jnp.broadcast_to(jnp.asarray(mean, partition.dtype), shape)
        leaf_sums.append(means * float(math.prod(jnp.shape(leaf)) // (depth or 1)))
    return partition.average(partition.sum(leaf_sums))
