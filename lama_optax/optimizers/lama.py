"""LAMA-Adam without the learning rate: Adam whose momentum follows each layer's curvature."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from lama_optax._checks import (
    as_scalar,
    check_float_dtype,
    check_number,
    check_range,
    check_word,
    wide_dtype,
)
from lama_optax.curvature.hutchinson import hutchinson
from lama_optax.curvature.protocol import Estimator
from lama_optax.curvature.track import CurvatureState, track_curvature
from lama_optax.layers import LayerSpec, check_structure, resolve_layers
from lama_optax.optimizers import equations as eq

PyTree = Any


class LamaState(NamedTuple):
    """State of `lama_scale`; L layers in the order of `layer_names`."""

    mu: optax.Updates  #: like params, mu_dtype; first moment, Eq. 6
    nu: optax.Updates  #: like params, at least float32; second moment, Eq. 2
    alpha: jax.Array  #: shape=(L,), float32 (float64 where a parameter is); Eq. 9
    momentum: jax.Array  #: shape=(L,), same dtype; min(alpha b1, max_momentum), used by Eq. 6
    weight_sum: jax.Array  #: shape=(L,), same dtype; sum of the gradients' weights in `mu`
    tracker: CurvatureState  #: count, curvature (Eq. 8) and its standard error

    @property
    def count(self) -> jax.Array:  # type: ignore[override]  # a tuple's method
        """Updates made, shape ()."""
        return self.tracker.count

    @property
    def curvature(self) -> jax.Array:
        """H_l of Eq. 8, shape (L,)."""
        return self.tracker.curvature

    @property
    def rejected(self) -> jax.Array:
        """How many layers' estimates were not finite, shape ()."""
        return self.tracker.rejected


def lama_scale(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    *,
    alpha_min: ArrayLike = 0.5,
    alpha_max: ArrayLike = 1.5,
    sensitivity: ArrayLike = 0.01,
    estimator: Estimator = hutchinson(num_probes=1),
    layers: LayerSpec = "module",
    update_interval: ArrayLike = 10,
    curvature_decay: ArrayLike = 0.0,
    momentum: str = "paper",
    max_momentum: ArrayLike | None = 0.999,
    mu_dtype: DTypeLike | None = None,
    axis_name: str | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by LAMA-Adam: Adam with layer-adaptive momentum.

    For every layer l with Hessian block :math:`\nabla_l^2 L` and :math:`N_l` parameters

    .. math::
      \begin{align*}
        H_l &= \operatorname{tr}(\nabla_l^2 L) / N_l \\
        \alpha_l &= \alpha_{\min} + (\alpha_{\max} - \alpha_{\min})
          \operatorname{sigmoid}(\lambda H_l) \\
        m_t &= \alpha_l b_1 m_{t-1} + (1 - b_1) g_t, \quad
        v_t = b_2 v_{t-1} + (1 - b_2) g_t^2 \\
        u_t &= \frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t) + \bar\varepsilon} + \varepsilon}
      \end{align*}

    The curvature H_l is that of `track_curvature`, which this is built on. The paper's setting is
    ``lama_scale(estimator=hutchinson(10), update_interval=1, max_momentum=None)``. An entry whose
    gradient is not finite, or whose square overflows, keeps its moments and gets the update 0.

    Args:
      b1: momentum that Eq. 9's factor multiplies, in [0, 1).
      b2: decay of the squared gradients, in [0, 1).
      eps: added to the denominator, outside the square root.
      eps_root: added inside the square root, as in `optax.adam`.
      alpha_min: factor's lower limit.
      alpha_max: factor's upper limit.
      sensitivity: the paper's lambda, in units of 1/curvature. Positive: more curvature, more
        momentum (Eq. 9); negative: less (the paper's Section 5.1).
      estimator: of each layer's curvature, for instance ``hutchinson(num_probes=10)``.
      layers: what one layer is, see `layer_names`. It and ``update_interval``,
        ``curvature_decay``, ``axis_name`` and ``key`` are those of `track_curvature`.
      update_interval: estimate at every n-th step; between them the curvature stays.
      curvature_decay: of the average over the estimates; 0 keeps the last estimate alone.
      momentum: ``"paper"`` is Eq. 6 with Eq. 3's correction, under which alpha moves the step size
        too: the steady gain of the gradient is (1 - b1)/(1 - alpha b1). ``"ema"`` weighs
        the gradient by 1 - alpha b1 and divides by the exact sum of the weights: gain 1. If alpha
        fluctuates, its bound of stability can be about half of that with a constant alpha
        (the site's notebook on stability): smooth it by ``curvature_decay`` or ``update_interval``.
      max_momentum: upper limit of alpha b1, in [0, 1). With None, alpha b1 can pass 1 and
        training diverge.
      mu_dtype: dtype of the first moment; None: that of the parameters.
      axis_name: mapped axis over which the curvature is averaged.
      key: seed or PRNG key of the probes.

    Returns:
      A `optax.GradientTransformationExtraArgs`, whose ``update`` takes ``params`` and by keyword
      what the estimator needs (``value_fn``: params -> scalar loss), or ``curvature``, as that of
      `track_curvature` does.

    Raises:
      ValueError: at construction, for an argument that is not allowed; at ``init``, for parameters
        that are not real floating point or ``layers`` that do not fit them; at ``update``, for a
        missing ``value_fn``, one that returns no scalar, and parameters of another structure.

    References:
      The equations are those of the LAMA-Adam paper; (7) is `hutchinson`. The state holds the
      second moment in float32 at least, since in half precision a decay of 0.999 rounds away.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from lama_optax import lama_scale
      >>> loss_fn = lambda params: jnp.sum((params["w"] - 1.0) ** 2)
      >>> params, tx = {"w": jnp.zeros(3)}, lama_scale()
      >>> grads = jax.grad(loss_fn)(params)
      >>> updates, state = tx.update(grads, tx.init(params), params, value_fn=loss_fn)
      >>> float(state.curvature[0])
      2.0
    """
    for name, decay in (("b1", b1), ("b2", b2)):
        check_number(name, decay, "in [0, 1)", low=0, high=1)
    limits = {"eps": eps, "eps_root": eps_root, "alpha_min": alpha_min, "alpha_max": alpha_max}
    for name, limit in limits.items():
        check_number(name, limit, "a number of at least 0", low=0)
    check_range("alpha_min", alpha_min, "alpha_max", alpha_max)
    check_number("sensitivity", sensitivity, "a finite number")
    check_word("momentum", momentum, ("paper", "ema"))
    if max_momentum is not None:
        check_number("max_momentum", max_momentum, "None or in [0, 1)", low=0, high=1)
    if mu_dtype is not None:
        check_float_dtype("mu_dtype", mu_dtype)
    tracker = track_curvature(
        estimator,
        layers=layers,
        update_interval=update_interval,
        curvature_decay=curvature_decay,
        axis_name=axis_name,
        key=key,
    )
    # Then moments stay near the gradients, whose squares are finite, and so do their quotients.
    is_bounded = max_momentum is not None and isinstance(eps, int | float) and eps >= 1e-10

    def factor_and_momentum(curvature: jax.Array) -> tuple[jax.Array, jax.Array]:
        limits = (as_scalar(x, curvature.dtype) for x in (alpha_min, alpha_max, sensitivity))
        alpha = eq.momentum_factor(curvature, *limits)
        decay = alpha * as_scalar(b1, alpha.dtype)
        if max_momentum is not None:
            decay = jnp.minimum(decay, as_scalar(max_momentum, decay.dtype))
        return alpha, decay

    def init_fn(params: optax.Params) -> LamaState:
        tracked = tracker.init(params)
        alpha, decay = factor_and_momentum(jnp.zeros_like(tracked.curvature))
        return LamaState(
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p)), params),
            alpha=alpha,
            momentum=decay,
            weight_sum=jnp.zeros_like(tracked.curvature),
            tracker=tracked,
        )

    def first_moment(
        g: jax.Array, ok: jax.Array, m: jax.Array, decay: jax.Array, weight: jax.Array
    ) -> jax.Array:
        m_wide = m.astype(decay.dtype)
        new = jnp.where(ok, eq.first_moment(m_wide, g.astype(decay.dtype), decay, weight), m_wide)
        return new if is_bounded and not _is_narrow(m) else _saturated(new, m.dtype)

    def second_moment(g: jax.Array, ok: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.where(ok, eq.second_moment(v, g.astype(v.dtype), as_scalar(b2, v.dtype)), v)

    def step(m_hat: jax.Array, v_hat: jax.Array, g: jax.Array, ok: jax.Array) -> jax.Array:
        constants = (as_scalar(x, v_hat.dtype) for x in (eps, eps_root))
        u = eq.adam_step(m_hat, v_hat, *constants).astype(g.dtype)
        if not is_bounded or _is_narrow(u):
            ok = ok & jnp.isfinite(u)
        return jnp.where(ok, u, 0)

    def update_fn(
        updates: optax.Updates,
        state: LamaState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LamaState]:
        check_structure("updates", updates, state.mu)
        check_structure("params", params, state.mu)
        _, tracked = tracker.update(updates, state.tracker, params, **extra_args)
        alpha, decay = factor_and_momentum(tracked.curvature)  # Eq. 9
        # Eq. 6 keeps the weight 1 - b1; Eq. 3 is its correction for alpha = 1 alone.
        gain = decay if momentum == "ema" else as_scalar(b1, decay.dtype)
        weight = jnp.full_like(decay, 1 - gain)
        weight_sum = eq.first_moment(state.weight_sum, jnp.ones_like(decay), decay, weight)
        if max_momentum is None:
            weight_sum = _saturated(weight_sum, weight_sum.dtype)
        # Decided from the gradient alone and before the step: from what comes out, XLA would need
        # a pass of its own for each of moments and step.
        usable = jax.tree.map(_has_square, updates, state.nu)
        of_leaf = functools.partial(resolve_layers(layers, params).spread, tree=updates)
        mu = jax.tree.map(first_moment, updates, usable, state.mu, of_leaf(decay), of_leaf(weight))
        nu = jax.tree.map(second_moment, updates, usable, state.nu)
        if momentum == "ema":
            mu_hat = jax.tree.map(jnp.divide, mu, of_leaf(weight_sum))
        else:
            mu_hat = eq.bias_corrected(mu, as_scalar(b1, decay.dtype), tracked.count)
        nu_hat = eq.bias_corrected(nu, as_scalar(b2, decay.dtype), tracked.count)
        new_updates = jax.tree.map(step, mu_hat, nu_hat, updates, usable)  # Eq. 5
        mu = optax.tree.cast_like(mu, state.mu)
        return new_updates, LamaState(mu, nu, alpha, decay, weight_sum, tracked)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _saturated(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The nearest number that the dtype holds."""
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest)


def _is_narrow(x: jax.Array) -> bool:
    """Whether what `_has_square` lets pass may leave this dtype's range: float16."""
    return float(jnp.finfo(x.dtype).max) < 1e30


def _has_square(g: jax.Array, v: jax.Array) -> jax.Array:
    """Whether a gradient's square is finite in the second moment's dtype."""
    # Half of the root, so that rounding in an average of squares never reaches the limit.
    return jnp.abs(g).astype(v.dtype) < float(jnp.finfo(v.dtype).max) ** 0.5 / 2
