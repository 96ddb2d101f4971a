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


def lama_adam(  # noqa: D417 - see lama_scale
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

    Use it to study momentum per layer; to lower a loss, tune b1 of `optax.adamw`. On a small
    language model, tuned against tuned, this was 2.1 % below AdamW with b1 = 0.9 and 5.0 % above
    AdamW with a tuned b1 (``benchmarks/RESULTS.md``). With the paper's ``sensitivity`` it is Adam
    to three digits of the loss, as ``make moons`` prints. The paper's setting, which that uses, is
    ``lama_adam(1e-3, estimator=hutchinson(10), update_interval=1, max_momentum=None)``.

    Args:
      learning_rate: a number or a schedule.
      weight_decay: w, decoupled from the gradient, as in `optax.adamw`.
      mask: tree of booleans (or a function of params that returns one): where to decay.

      All others are those of `lama_scale`.

    Returns:
      A `optax.GradientTransformationExtraArgs`, whose ``update`` is called as `lama_scale`'s.

    Raises:
      ValueError: as `lama_scale` does.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from lama_optax import lama_adam
      >>> loss_fn = lambda params: jnp.sum((params["w"] - 1.0) ** 2)
      >>> params, tx = {"w": jnp.zeros(3)}, lama_adam(learning_rate=0.1)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     grads = jax.grad(loss_fn)(params)
      ...     updates, state = tx.update(grads, state, params, value_fn=loss_fn)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss_fn(params) < 2)
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


def lam(  # noqa: D417 - see lam_scale
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
    No advantage over AdamW is shown: on a digits CNN, tuned against tuned, per layer does not help
    by 1 % or more, and per weight is undecided (``benchmarks/RESULTS.md``).

    Args:
      learning_rate: a number or a schedule. All others are those of `lam_scale`.

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
