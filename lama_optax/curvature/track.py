"""What a running LAMA optimizer knows of each layer, ready for a logger."""

from typing import Any

import jax
import jax.numpy as jnp

from lama_optax.layers import LayerSpec, is_masked, resolve_layers, unique_names
from lama_optax.optimizers.lama import LamaState

PyTree = Any


def layer_report(
    opt_state: PyTree, params: PyTree, layers: LayerSpec = "module"
) -> dict[str, dict[str, float | int]]:
    """Reads curvature, alpha and momentum of each layer out of an optimizer's state.

    Args:
      opt_state: any optax state that holds one or more `LamaState`, however deep: in a
        `optax.chain`, under `optax.masked`, `optax.partition`, `optax.MultiSteps` and so on.
      params: the parameters that the state was made for.
      layers: the same as the optimizer's.

    Returns:
      name of the layer -> ``{"curvature": H_l, "alpha": alpha_l, "momentum": alpha_l b1 (after
      max_momentum), "size": N_l}``, as Python numbers. Call it outside `jax.jit`.

    Raises:
      ValueError: if ``opt_state`` holds no `LamaState`, or one that does not fit ``layers``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lama_optax import lama_adam, layer_report
      >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
      >>> state = lama_adam(1e-3).init(params)
      >>> layer_report(state, params)["Dense_0"]["size"]
      9
    """
    states = [
        leaf
        for leaf in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, LamaState))
        if isinstance(leaf, LamaState)
    ]
    if not states:
        raise ValueError(
            "opt_state must hold the state of lama_scale or lama_adam; none was found."
        )
    names: list[str] = []
    rows: list[dict[str, float | int]] = []
    for state in states:
        partition = resolve_layers(layers, _visible_params(state, params))
        # Through leaves, since nnx.Optimizer wraps every array of its state.
        columns = jax.device_get(jax.tree.leaves((state.curvature, state.alpha, state.momentum)))
        if len(partition.names) != len(columns[0]):
            raise ValueError(
                f"layers must be what the optimizer was given; it has {len(columns[0])} layers,"
                f" layers={layers!r} gives {len(partition.names)}."
            )
        for name, size, *values in zip(partition.names, partition.sizes, *columns, strict=True):
            curvature, alpha, momentum = map(float, values)
            names.append(name)
            rows.append(
                {"curvature": curvature, "alpha": alpha, "momentum": momentum, "size": size}
            )
    # Two states may each hold a part of one module: its kernel and its bias, say.
    return dict(zip(unique_names(names), rows, strict=True))


def _visible_params(state: LamaState, params: PyTree) -> PyTree:
    """``params`` without the parts that `optax.masked` hid from this state."""
    moments = jax.tree.leaves(state.mu, is_leaf=is_masked)
    try:
        if any(is_masked(moment) for moment in moments):
            params = jax.tree.map(
                lambda moment, p: moment if is_masked(moment) else p,
                *(state.mu, params),
                is_leaf=is_masked,
            )
        fits = [jnp.shape(m) for m in jax.tree.leaves(state.mu)] == [
            jnp.shape(p) for p in jax.tree.leaves(params)
        ]
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            "params must be those that opt_state was made for, of structure"
            f" {jax.tree.structure(state.mu)}; got {jax.tree.structure(params)}."
        )
    return params
