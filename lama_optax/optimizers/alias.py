"""The optimizers that users start with: a scaling rule, weight decay and a learning rate."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from lama_optax._checks import check_number
from lama_optax.curvature.hutchinson import hutchinson
from lama_optax.curvature.protocol import Estimator
from lama_optax.layers import LayerSpec
from lama_optax.optimizers.lam import lam_scale
from lama_optax.optimizers.lama import lama_scale


def lama_adam(
    learning_rate: optax.ScalarOrSchedule,
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
    weight_decay: ArrayLike = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LAMA-Adam: Adam with layer-adaptive momentum, decoupled weight decay and a learning rate.

    .. math::
      \theta_t = \theta_{t-1} - \eta_t (u_t + w\, \theta_{t-1})

    where :math:`u_t` is the update of `lama_scale` and :math:`w` the weight decay.

    Use it to study momentum per layer. That it lowers a loss has not been shown: with the
    document's ``sensitivity`` it is Adam to three digits of the loss, and with a larger one Eq. 6
    moves the step size, as ``make moons`` prints. To read curvature, chain `track_curvature` before
    the optimizer that you tune anyway.

    The paper's setting is ``lama_adam(1e-3, estimator=hutchinson(10), update_interval=1,
    max_momentum=None)``, which ``make moons`` uses.

    Args:
      learning_rate: a number or a schedule.
      b1: momentum, see `lama_scale`, as all up to ``key``.
      b2: decay of the squared gradients.
      eps: added to the denominator.
      eps_root: added under its square root.
      alpha_min: lower limit of the factor on b1.
      alpha_max: upper limit of the factor on b1.
      sensitivity: the document's lambda.
      estimator: of each layer's curvature.
      layers: what one layer is.
      update_interval: steps from one estimate to the next. Take 1 where lambda H is large.
      curvature_decay: decay of the moving average over estimates.
      momentum: ``"paper"`` or ``"ema"``.
      max_momentum: upper limit of alpha b1.
      mu_dtype: dtype of the first moment.
      axis_name: mapped axis over which curvature is averaged.
      key: seed or PRNG key of the probes.
      weight_decay: decoupled from the gradient, scaled by the learning rate, as in `optax.adamw`.
      mask: tree of booleans (or a function of params that returns one): where to decay.

    Returns:
      A `optax.GradientTransformationExtraArgs`; ``update`` takes ``value_fn`` by keyword.

    Raises:
      ValueError: as `lama_scale` does.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from lama_optax import lama_adam
      >>> loss_fn = lambda params: jnp.sum((params["w"] - 1.0) ** 2)
      >>> tx = lama_adam(learning_rate=0.1)
      >>> params = {"w": jnp.zeros(3)}
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def train_step(params, state):
      ...     value, grads = jax.value_and_grad(loss_fn)(params)
      ...     updates, state = tx.update(grads, state, params, value_fn=loss_fn)
      ...     return optax.apply_updates(params, updates), state, value
      >>> for _ in range(50):
      ...     params, state, value = train_step(params, state)
      >>> bool(value < 1e-2)
      True
    """
    check_number("weight_decay", weight_decay, "a number of at least 0", low=0)
    never_decays = isinstance(weight_decay, int | float) and weight_decay == 0
    return optax.chain(
        lama_scale(
            b1,
            b2,
            eps,
            eps_root,
            alpha_min=alpha_min,
            alpha_max=alpha_max,
            sensitivity=sensitivity,
            estimator=estimator,
            layers=layers,
            update_interval=update_interval,
            curvature_decay=curvature_decay,
            momentum=momentum,
            max_momentum=max_momentum,
            mu_dtype=mu_dtype,
            axis_name=axis_name,
            key=key,
        ),
        optax.identity() if never_decays else _add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _add_decayed_weights(
    weight_decay: ArrayLike, mask: Any | Callable[[optax.Params], Any] | None
) -> optax.GradientTransformationExtraArgs:
    """Optax's, with updates that keep their dtype where an array ``weight_decay`` has another."""
    decay = optax.with_extra_args_support(optax.add_decayed_weights(weight_decay, mask))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        decayed, state = decay.update(updates, state, params, **extra)
        return optax.tree.cast_like(decayed, updates), state

    return optax.GradientTransformationExtraArgs(decay.init, update)


def lam(
    learning_rate: optax.ScalarOrSchedule,
    decay: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    *,
    granularity: str = "weight",
    layers: LayerSpec = "module",
) -> optax.GradientTransformationExtraArgs:
    r"""LAM: RMS scaling per weight or per layer, with a learning rate.

    .. math::
      \theta_t = \theta_{t-1} - \eta_t \frac{g_t}{\sqrt{v_t} + \varepsilon}

    Per weight it equals ``optax.rmsprop(learning_rate, decay=0.9, eps=1e-8, eps_in_sqrt=False)``.
    Per layer it keeps one accumulator a layer, for where memory allows no more.

    Args:
      learning_rate: a number or a schedule.
      decay: the document's beta, see `lam_scale`, as all that follow.
      eps: added to the denominator.
      granularity: ``"weight"`` or ``"layer"``.
      layers: what one layer is.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for an argument that is not allowed, naming it.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lama_optax import lam
      >>> tx = lam(0.1, granularity="layer")
      >>> grads = {"dense": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(4, 4.0)}}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> float(state[0].accumulator[0])
      1.25
    """
    return optax.chain(
        lam_scale(decay, eps, granularity=granularity, layers=layers),
        optax.scale_by_learning_rate(learning_rate),
    )
