"""What an optimizer's state knows of each layer, ready for a logger."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lama_optax.curvature.average import widened_share
from lama_optax.curvature.track import CurvatureState
from lama_optax.layers import Layers, LayerSpec, is_masked, resolve_layers, unique_names
from lama_optax.noise_scale import NoiseScaleState
from lama_optax.optimizers.lama import LamaState

PyTree = Any
Row = dict[str, float | int | None]


def layer_report(
    opt_state: PyTree, params: PyTree, layers: LayerSpec = "module", *, flat: bool = False
) -> dict[str, Any]:
    """Reads each layer's curvature and its standard error out of an optimizer's state.

    Args:
      opt_state: any optax state that holds the state of `track_curvature`, `lama_scale` or
        `lama_adam`, one or more, however deep.
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
    states = _states(opt_state, CurvatureState | LamaState)
    if not states:
        raise ValueError(
            "opt_state must hold the state of track_curvature, lama_scale or lama_adam; none was"
            " found."
        )
    names: list[str] = []
    rows: list[Row] = []
    for state in states:
        tracker = _on_host(state.tracker if isinstance(state, LamaState) else state)
        columns = {
            "curvature": np.where(tracker.weight > 0, tracker.curvature, np.nan),
            "std_error": np.asarray(tracker.std_error),
        }
        if isinstance(state, LamaState):
            alpha, momentum = jax.device_get(jax.tree.leaves((state.alpha, state.momentum)))
            columns |= {"alpha": alpha, "momentum": momentum}
            params_of_state = _visible_params(state, params)
        else:
            params_of_state = params
        partition = _partition(layers, params_of_state, len(tracker.curvature), "the optimizer")
        names += partition.names
        for size, *values in zip(partition.sizes, *columns.values(), strict=True):
            known = [float(x) if np.isfinite(x) else None for x in values]
            rows.append(dict(zip(columns, known, strict=True)) | {"size": size})
    # Two states may each hold a part of one module: its kernel and its bias, say.
    report = dict(zip(unique_names(names), rows, strict=True))
    return _flat(report, "curvature") if flat else report


def noise_report(
    opt_state: PyTree, params: PyTree, layers: LayerSpec = "module", *, flat: bool = False
) -> dict[str, Any]:
    r"""Reads the gradient noise scale, of all parameters and of each layer, out of a state.

    At a batch of B examples training takes about :math:`1 + B_\mathrm{noise} / B` times the steps
    of an endless batch, and :math:`1 + B / B_\mathrm{noise}` times the fewest examples:

    ===========================  =====  ====  ===  =  ===  ====
    batch size over noise scale  1/8    1/4   1/2  1  2    4
    steps over the minimum       9      5     3    2  1.5  1.25
    examples over the minimum    1.125  1.25  1.5  2  3    5
    ===========================  =====  ====  ===  =  ===  ====

    Args:
      opt_state: any optax state that holds the state of `track_noise_scale` once, however deep.
      params: the parameters that the state was made for.
      layers: the same as `track_noise_scale` was given.
      flat: whether to return one number a name, as loggers take them.

    Returns:
      ``"total"``, and each layer's name ->
      ``{"noise_scale": ..., "std_error": ..., "at_least": ..., "at_most": ...}``, in examples, as
      Python numbers, for `json.dumps`. The standard error is by the delta method; the last two are
      the ends of Fieller's 95 % interval for a ratio. What is not known is None: ``at_most``
      where :math:`\lVert G \rVert^2` may be 0, ``at_least`` where :math:`\operatorname{tr}(\Sigma)`
      may be, the other two where either may; all of them before the third estimate. With ``flat``,
      without these: ``{"noise_scale/total": ..., "noise_scale_at_least/total": ...}``.

    Raises:
      ValueError: if ``opt_state`` does not hold one such state, or ``layers`` do not fit it.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lama_optax import noise_report, track_noise_scale
      >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
      >>> report = noise_report(track_noise_scale().init(params), params)
      >>> report["total"]
      {'noise_scale': None, 'std_error': None, 'at_least': None, 'at_most': None}
      >>> list(report)
      ['total', 'Dense_0']
    """
    states = _states(opt_state, NoiseScaleState)
    if len(states) != 1:
        raise ValueError(
            f"opt_state must hold the state of track_noise_scale once; found {len(states)}."
        )
    state = _on_host(states[0])
    names = _partition(layers, params, len(state.weight) - 1, "track_noise_scale").names
    factor, known = (np.asarray(x, np.float64) for x in widened_share(state.average))
    mean, spread = (np.asarray(x, np.float64) for x in (state.mean, state.spread))
    unknown: Row = dict.fromkeys(("noise_scale", "std_error", "at_least", "at_most"))
    rows = [
        unknown | (_ratio(mean[:, i], spread[:, :, i] * factor[i]) if known[i] else {})
        for i in (-1, *range(len(names)))
    ]
    report = dict(zip(unique_names(["total", *names]), rows, strict=True))
    return _flat(report, "noise_scale") if flat else report


def _ratio(mean: np.ndarray, variance: np.ndarray) -> Row:
    """Ratio x / y of two means that are not negative, and where it lies to 95 %.

    Fieller's interval holds each ratio r for which x - r y lies within 1.96 of its own standard
    errors of 0: a r^2 - 2 b r + c <= 0. Where y is known not to be 0, a > 0; where x is, c > 0.
    """
    (x, y), ((xx, xy), (_, yy)) = mean, variance
    a, b, c = (p - 1.96**2 * v for p, v in ((y * y, yy), (x * y, xy), (x * x, xx)))
    root = np.sqrt(max(b * b - a * c, 0.0))
    row: Row = {}
    if b + root <= 0:  # so it is too where x or y is known to be negative
        return row
    if x > 0 and c > 0:
        row["at_least"] = float(c / (b + root))
    if y > 0 and a > 0:
        row["at_most"] = float((b + root) / a)
    if len(row) == 2:
        row["noise_scale"] = float(x / y)
        relative = xx / x**2 - 2 * xy / (x * y) + yy / y**2
        row["std_error"] = float(x / y * np.sqrt(max(relative, 0.0)))
    return row


def _states(opt_state: PyTree, kinds: Any) -> list[Any]:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds))
    return [node for node in nodes if isinstance(node, kinds)]


def _on_host(state: Any) -> Any:
    """From leaves, since nnx.Optimizer wraps every array of its state."""
    state = type(state)(*jax.device_get(jax.tree.leaves(state)))
    if np.ndim(state.count):
        raise ValueError(
            f"opt_state must be one model's; got {np.shape(state.count)} of them, as jax.vmap makes"
            " them. Report each: layer_report(jax.tree.map(lambda x: x[i], opt_state), params)."
        )
    return state


def _partition(layers: LayerSpec, params: PyTree, num_layers: int, owner: str) -> Layers:
    partition = resolve_layers(layers, params)
    if len(partition.names) != num_layers:
        raise ValueError(
            f"layers must be what {owner} was given; it has {num_layers} layers, layers={layers!r}"
            f" gives {len(partition.names)}."
        )
    return partition


def _flat(report: dict[str, Row], quantity: str) -> dict[str, float]:
    """One number a name, such as ``curvature_std_error/Dense_0``; what is not known is left out."""
    own = {column: f"{quantity}_{column}" for column in ("std_error", "at_least", "at_most")}
    return {
        f"{own.get(column, column)}/{name}": value
        for name, row in report.items()
        for column, value in row.items()
        if column != "size" and value is not None
    }


def _visible_params(state: LamaState, params: PyTree) -> PyTree:
    """``params`` without the parts that `optax.masked` hid from this state."""

    def shapes(tree: PyTree) -> list[tuple[int, ...]]:
        return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]

    visible = params
    if any(is_masked(moment) for moment in jax.tree.leaves(state.mu, is_leaf=is_masked)):
        with contextlib.suppress(ValueError):
            visible = jax.tree.map(
                lambda moment, p: moment if is_masked(moment) else p,
                *(state.mu, params),
                is_leaf=is_masked,
            )
    if shapes(visible) != shapes(state.mu):
        raise ValueError(
            "params must be those that opt_state was made for, of structure"
            f" {jax.tree.structure(state.mu)}; got {jax.tree.structure(params)}."
        )
    return visible
