"""What an optimizer's state knows of each layer, ready for a logger."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lama_optax.curvature.track import CurvatureState
from lama_optax.layers import LayerSpec, is_masked, resolve_layers, unique_names
from lama_optax.optimizers.lama import LamaState

PyTree = Any
Row = dict[str, float | int | None]


def layer_report(
    opt_state: PyTree, params: PyTree, layers: LayerSpec = "module", *, flat: bool = False
) -> dict[str, Any]:
    """Reads each layer's curvature and its standard error out of an optimizer's state.

    Args:
      opt_state: any optax state that holds the state of `track_curvature`, `lama_scale` or
        `lama_adam`, one or more, however deep: in a `optax.chain`, under `optax.masked`,
        `optax.MultiSteps` and so on.
      params: the parameters that the state was made for. Where a wrapper hid a part of them from
        `track_curvature`, put `optax.MaskedNode` in its place.
      layers: the same as the optimizer's.
      flat: whether to return one number a name, as loggers take them.

    Returns:
      name of the layer -> ``{"curvature": H_l, "std_error": its standard error, "size": N_l}``,
      and of LAMA also ``"alpha"`` and ``"momentum"`` (alpha_l b1 after max_momentum), as Python
      numbers, for `json.dumps`. What is not known is None: the curvature before the first estimate,
      its standard error before the second, and with ``curvature_decay=0`` always. With ``flat``:
      ``{"curvature/Dense_0": ..., "curvature_std_error/Dense_0": ..., "alpha/Dense_0": ...}``,
      without sizes and what is not known. Call it outside `jax.jit`.

    Raises:
      ValueError: if ``opt_state`` holds no such state, or one that does not fit ``layers``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lama_optax import hutchinson, lama_adam, layer_report
      >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
      >>> state = lama_adam(1e-3).init(params)
      >>> layer_report(state, params)["Dense_0"]["size"]
      9
      >>> sorted(layer_report(state, params, flat=True))
      ['alpha/Dense_0', 'momentum/Dense_0']
    """
    kinds = CurvatureState | LamaState
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds))
    states = [node for node in nodes if isinstance(node, kinds)]
    if not states:
        raise ValueError(
            "opt_state must hold the state of track_curvature, lama_scale or lama_adam; none was"
            " found."
        )
    names: list[str] = []
    rows: list[Row] = []
    for state in states:
        # From leaves, since nnx.Optimizer wraps every array of its state.
        tracker = state.tracker if isinstance(state, LamaState) else state
        tracker = CurvatureState(*jax.device_get(jax.tree.leaves(tracker)))
        columns = {
            "curvature": np.where(tracker.weight > 0, tracker.curvature, np.nan),
            "std_error": np.asarray(tracker.std_error),
        }
        if isinstance(state, LamaState):
            alpha, momentum = jax.device_get(jax.tree.leaves((state.alpha, state.momentum)))
            columns |= {"alpha": alpha, "momentum": momentum}
        visible = _visible_params(state, params)
        partition = resolve_layers(layers, visible)
        if len(partition.names) != len(tracker.curvature):
            raise ValueError(
                f"layers must be what the optimizer was given; it has {len(tracker.curvature)}"
                f" layers, layers={layers!r} gives {len(partition.names)}."
            )
        names += partition.names
        for size, *values in zip(partition.sizes, *columns.values(), strict=True):
            known = [float(x) if np.isfinite(x) else None for x in values]
            rows.append(dict(zip(columns, known, strict=True)) | {"size": size})
    # Two states may each hold a part of one module: its kernel and its bias, say.
    report = dict(zip(unique_names(names), rows, strict=True))
    return _flat(report) if flat else report


def _flat(report: dict[str, Row]) -> dict[str, float]:
    prefix = {"std_error": "curvature_std_error"}
    return {
        f"{prefix.get(column, column)}/{name}": value
        for name, row in report.items()
        for column, value in row.items()
        if column != "size" and value is not None
    }


def _visible_params(state: CurvatureState | LamaState, params: PyTree) -> PyTree:
    """``params`` without the parts that `optax.masked` hid from this state, where it shows them."""
    if isinstance(state, CurvatureState):
        return params
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
