"""LAM without the learning rate: RMS scaling by weight or by layer (the LAM paper)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from lama_optax._checks import as_scalar, check_number, check_word, wide_dtype
from lama_optax.layers import LayerSpec, check_layers, check_structure, resolve_layers
from lama_optax.optimizers import equations as eq

PyTree = Any


class LamState(NamedTuple):
    """State of `lam_scale`."""

    #: like params, at least float32, with granularity="weight"; shape=(L,) with "layer"
    accumulator: optax.Updates | jax.Array


def lam_scale(
    decay: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    *,
    granularity: str = "weight",
    layers: LayerSpec = "module",
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by LAM: the root mean square of each weight's or each layer's gradient.

    .. math::
      v_t = (1 - \beta) g_t^2 + \beta v_{t-1}, \qquad
      u_t = \frac{g_t}{\sqrt{v_t} + \varepsilon}, \qquad v_0 = 0

    There is no bias correction: the first update is :math:`g / (\sqrt{1-\beta}\,|g|)`, about 3.16
    times the sign with the default decay. An entry (a layer) whose squared gradient is not
    finite keeps its accumulator and gets the update 0.

    Args:
      decay: the paper's beta, in [0, 1).
      eps: added to the denominator, outside the square root.
      granularity: ``"weight"``: one v for each weight, equal to
        ``optax.scale_by_rms(decay, eps, eps_in_sqrt=False)``. ``"layer"``: one v for each layer,
        of its mean squared gradient, so that a layer's update keeps the gradient's direction.
      layers: what one layer is, see `layer_names`; used by ``granularity="layer"`` alone.

    Returns:
      A `optax.GradientTransformationExtraArgs`; it needs no extra argument and ignores all.

    Raises:
      ValueError: for an argument that is not allowed, naming it.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lama_optax import lam_scale
      >>> tx = lam_scale()
      >>> grads = {"w": jnp.array([0.5, 1.5])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> [round(float(x), 5) for x in state.accumulator["w"]]
      [0.025, 0.225]
      >>> [round(float(x), 5) for x in 0.1 * updates["w"]]
      [0.31623, 0.31623]
    """
    check_number("decay", decay, "in [0, 1)", low=0, high=1)
    check_number("eps", eps, "a number of at least 0", low=0)
    check_word("granularity", granularity, ("weight", "layer"))
    check_layers(layers)

    def init_fn(params: optax.Params) -> LamState:
        partition = resolve_layers(layers, params)
        if granularity == "layer":
            return LamState(jnp.zeros(len(partition.names), partition.dtype))
        return LamState(jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p)), params))

    def accumulate(old: jax.Array, squared: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = eq.lam_accumulator(old, squared, as_scalar(decay, old.dtype))
        finite = jnp.isfinite(new)
        return jnp.where(finite, new, old), finite

    def scale(g: jax.Array, accumulator: jax.Array, finite: jax.Array) -> jax.Array:
        dtype = accumulator.dtype
        update = eq.lam_step(g.astype(dtype), accumulator, as_scalar(eps, dtype))
        update = update.astype(g.dtype)
        return jnp.where(finite & jnp.isfinite(update), update, 0)

    def update_fn(
        updates: optax.Updates,
        state: LamState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LamState]:
        del extra_args
        squared = jax.tree.map(lambda g: jnp.square(g.astype(wide_dtype(g))), updates)
        if granularity == "layer":
            partition = resolve_layers(layers, updates if params is None else params)
            if state.accumulator.shape != (len(partition.names),):
                raise ValueError(
                    f"updates must have the structure that `init` saw, of"
                    f" {state.accumulator.size} layers; got the layers {partition.names}."
                )
            mean_squared = partition.average(partition.sum(squared))
            new, finite = accumulate(state.accumulator, mean_squared)
            of_leaf = [partition.spread(x, updates) for x in (new, finite)]
        else:
            check_structure("updates", updates, state.accumulator)
            leaves = map(jax.tree.leaves, (state.accumulator, squared))
            pairs = [accumulate(*pair) for pair in zip(*leaves, strict=True)]
            structure = jax.tree.structure(updates)
            of_leaf = [jax.tree.unflatten(structure, [pair[i] for pair in pairs]) for i in (0, 1)]
            new = of_leaf[0]
        return jax.tree.map(scale, updates, *of_leaf), LamState(new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
