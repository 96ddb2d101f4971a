"""Weights in fewer bits: the rise in loss predicted from curvature, and bits for each layer."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lama_optax._allocation import Alone, Point, Table, squared_change
from lama_optax._checks import check_count, check_number
from lama_optax.curvature.protocol import LayerCurvature
from lama_optax.layers import Layers, LayerSpec, resolve_layers

PyTree = Any
#: A `LayerCurvature`, or what `layer_report` returned, also read back from JSON.
Curvature = LayerCurvature | Mapping[str, Mapping[str, float | None]]


def loss_increase(
    curvature: Curvature, params: PyTree, changed: PyTree, layers: LayerSpec = "module"
) -> dict[str, dict[str, float | None]]:
    r"""Predicts how much the loss rises when parameters change, layer by layer.

    .. math::
      \Delta L \approx \sum_l \tfrac{1}{2} H_l \lVert \Delta\theta_l \rVert^2

    with :math:`H_l = \operatorname{tr}(H_l) / N_l` the average curvature. It is the mean of
    :math:`g^\top \Delta\theta + \tfrac{1}{2} \Delta\theta^\top H \Delta\theta` over changes whose
    entries have mean 0 and are independent, of one size in a layer: the first order and all
    products of two entries average out, and what is left is the diagonal. Errors of rounding to
    nearest are nearly so. One change is one draw; of many entries the sum is close to its mean.

    It fails where a change is biased (pruning shrinks weights), where it is large against the
    weights (2 bits), and where layers change together in one direction. Measure the curvature on
    data that training did not see: where a model fits its training data, their loss is near 0, and
    so is their curvature. Predicted over measured rise, medians of ``python -m
    benchmarks.rounding``: 0.91 for a language model of 0.5 M parameters; for a ViT on digits 0.03
    by its training data, and 1.5 by others.

    Args:
      curvature: of ``params``, from `layer_curvature` or `layer_report`.
      params: pytree of arrays.
      changed: the same after the change: rounded, cast, of lower rank, with noise.
      layers: the same as the curvature was measured with.

    Returns:
      Each layer's name, and ``"total"`` -> ``{"increase": ..., "std_error": ...}``, in units of the
      loss; the error is from the curvature's. Both are None where the curvature is not known or not
      finite, and for the total where it is so for a layer that changed. The error holds how well
      the curvature is known, not that one change is one draw.

    Raises:
      ValueError: if ``changed`` or ``curvature`` does not fit ``params``.

    References:
      Dong et al., `HAWQ-V2 <https://arxiv.org/abs/1911.03852>`_, 2019; Zandonati et al., `FIT
      <https://arxiv.org/abs/2210.08502>`_, 2022

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from lama_optax.rounding import loss_increase
      >>> params = {"dense": {"kernel": jnp.array([[0.4, -1.2]])}}
      >>> report = {"dense": {"curvature": 2.0, "std_error": 0.1, "size": 2}}
      >>> rise = loss_increase(report, params, jax.tree.map(jnp.round, params))
      >>> {name: round(row["increase"], 3) for name, row in rise.items()}
      {'dense': 0.2, 'total': 0.2}
    """
    partition = resolve_layers(layers, params)
    mean, error = _values(curvature, partition.names)
    squares = squared_change(partition, params, changed)
    # A layer that stands still adds nothing, whatever its curvature.
    rise = np.where(squares > 0, mean * squares / 2, 0.0)
    error = np.where(squares > 0, error * squares / 2, 0.0)
    rows = {name: _row(r, e) for name, r, e in zip(partition.names, rise, error, strict=True)}
    return rows | {"total": _row(np.sum(rise), np.sqrt(np.sum(error**2)))}


def round_symmetric(array: jax.Array, bits: int) -> jax.Array:
    """Rounds to nearest on a symmetric grid with one scale a channel, of the last axis.

    The grid is s {-n, ..., n} with n = 2^(bits - 1) - 1, and ends at the channel's largest entry.
    Arrays of fewer than two axes (biases, norms) pass unchanged.

    Args:
      array: any array of floats.
      bits: at least 2.

    Returns:
      An array of the same shape and dtype.

    Raises:
      ValueError: if ``bits`` is not an integer of at least 2.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lama_optax.rounding import round_symmetric
      >>> round_symmetric(jnp.array([[0.4, 2.0], [-1.0, 0.9]]), 2).tolist()
      [[0.0, 2.0], [-1.0, 0.0]]
    """
    check_count("bits", bits)
    if bits < 2:
        raise ValueError(f"bits must be an integer of at least 2; got {bits!r}.")
    if array.ndim < 2:
        return array
    steps = 2 ** (bits - 1) - 1
    largest = jnp.max(jnp.abs(array), axis=tuple(range(array.ndim - 1)), keepdims=True)
    scale = jnp.where(largest > 0, largest / steps, 1)
    return (jnp.round(array / scale) * scale).astype(array.dtype)


@dataclasses.dataclass(frozen=True)
class BitAllocation:
    """Bits for each layer, and what they are expected to cost."""

    bits: dict[str, int]  #: layer -> width; layers that `quantize` leaves alone are absent
    params: PyTree  #: the rounded parameters
    #: Predicted rise of the loss, of the layers whose curvature is known; of widths that are not
    #: trusted, measured.
    increase: float
    std_error: float | None  #: of it, from the curvature's; None where that is not known
    mean_bits: float  #: a weight's, over the arrays that are rounded
    size_bytes: int  #: of these arrays, without their scales
    unknown: tuple[str, ...]  #: layers without a known positive curvature; they have most bits
    #: From few bits to many: ``(mean_bits, size_bytes, increase)``, size against predicted loss.
    curve: tuple[Point, ...]
    #: With ``value_fn``, the measured rise of "predicted", the first choice, "corrected" and
    #: "uniform" (None where no width fits). The least is what was chosen.
    measured: dict[str, float | None] | None


def allocate_bits(
    curvature: Curvature,
    params: PyTree,
    *,
    mean_bits: float | None = None,
    size_bytes: int | None = None,
    bits: Sequence[int] = (2, 3, 4, 6, 8),
    quantize: Callable[[jax.Array, int], jax.Array] = round_symmetric,
    value_fn: Callable[[PyTree], Any] | None = None,
    layers: LayerSpec = "module",
    max_change: float = 0.4,
) -> BitAllocation:
    r"""Chooses each layer's bits so that the predicted rise in loss is least within a size.

    .. math::
      \min_{b} \sum_l \tfrac{1}{2} H_l \lVert q(\theta_l, b_l) - \theta_l \rVert^2 \quad \text{such
      that} \quad \sum_l N_l b_l \le \text{budget}

    It is solved exactly, as an integer program. The prediction is a quadratic, and a layer at too
    few bits has left its reach: a width is trusted only where it changes the layer's weights by at
    most ``max_change`` of their norm. What is not trusted is not offered.

    With ``value_fn`` what is not trusted is measured instead, each layer rounded alone, and the
    choice is verified: a prediction that was off is corrected by what was measured, at most
    threefold, and the choice is made again. What measures least is returned: the first choice, the
    corrected one, or one width for all. That takes one evaluation of ``value_fn`` for each layer
    and width that is not trusted, one more a layer and five more.

    Args:
      curvature: of ``params``, from `layer_curvature` or `layer_report`. Layers whose curvature is
        unknown, not finite or not positive get most bits and are named in ``unknown``.
      params: pytree of arrays.
      mean_bits: budget: bits of a weight in the mean over the arrays that are rounded.
      size_bytes: or the bytes of those arrays; give one of the two.
      bits: the widths to choose from.
      quantize: ``(array, bits) -> array`` rounded, of the same shape. An array that it returns as
        it was at the largest width is not counted.
      value_fn: a loss of params to verify by, on data other than the training's if there are any.
      layers: the same as the curvature was measured with. ``"leaf"`` has a width for each array.
      max_change: the largest relative change of a layer that the prediction is trusted with.

    Returns:
      A `BitAllocation`.

    Raises:
      ValueError: for an argument that is not allowed, or a budget below what is offered: then pass
        ``value_fn``.

    References:
      As `loss_increase`.

    Examples:
      >>> import jax
      >>> from lama_optax.rounding import allocate_bits
      >>> keys = jax.random.split(jax.random.key(0))
      >>> params = {name: jax.random.normal(k, (64, 8)) for name, k in zip("ab", keys)}
      >>> report = {"a": {"curvature": 1.0}, "b": {"curvature": 0.01}}
      >>> allocate_bits(report, params, mean_bits=4, layers="leaf", bits=(3, 4, 6)).bits
      {'a': 4, 'b': 4}
      >>> allocate_bits(report, params, mean_bits=4.5, layers="leaf", bits=(3, 4, 6)).bits
      {'a': 6, 'b': 3}
    """
    widths = _check_widths(bits)
    partition = resolve_layers(layers, params)
    mean, error = _values(curvature, partition.names)
    rounded = {width: jax.tree.map(lambda a, w=width: quantize(a, w), params) for width in widths}
    table = Table.of(partition, params, rounded, widths, max_change)
    budget = _budget(mean_bits, size_bytes, table)
    known = np.isfinite(mean) & (mean > 0)
    costs = np.where(known[:, None], mean[:, None] * table.squares / 2, 0.0)

    def tree(choice: np.ndarray) -> PyTree:
        return _choose(partition, params, rounded, [widths[i] for i in choice])

    trusted = table.offered
    measured: dict[str, float | None] | None = None
    if value_fn is None:
        chosen = table.solve(costs, budget, known)
    else:
        loss = jax.jit(lambda p: jnp.asarray(value_fn(p)))
        base = float(loss(params))
        if not np.isfinite(base):
            raise ValueError(f"value_fn must be finite at params; got {base}.")

        def rise(choice: np.ndarray) -> float:
            found = float(loss(tree(choice))) - base
            return found if np.isfinite(found) else np.inf

        alone = Alone(table, costs, rise)
        table, costs = alone.beyond_trust(known)
        first = table.solve(costs, budget, known)
        corrected = table.solve(costs * alone.corrections(first), budget, known)
        candidates = {"predicted": first, "corrected": corrected}
        if (uniform := table.uniform(budget)) is not None:
            candidates["uniform"] = uniform
        found = {name: rise(choice) for name, choice in candidates.items()}
        measured = {name: found.get(name) for name in ("predicted", "corrected", "uniform")}
        chosen = candidates[min(found, key=found.__getitem__)]
    rows, used = table.rows, table.used
    # What was measured has no error of the curvature's.
    predicted = known & trusted[rows, chosen]
    errors = np.where(predicted, error, 0.0) * table.squares[rows, chosen] / 2
    total_error = float(np.sqrt(np.sum(errors**2)))
    size = int(table.size(chosen))
    return BitAllocation(
        bits={partition.names[i]: widths[chosen[i]] for i in rows if used[i]},
        params=tree(chosen),
        increase=float(np.sum(costs[rows, chosen])),
        std_error=total_error if np.isfinite(total_error) else None,
        mean_bits=size / max(1, int(table.counts.sum())),
        size_bytes=-(-size // 8),
        unknown=tuple(partition.names[i] for i in rows if used[i] and not known[i]),
        curve=table.curve(costs, known),
        measured=measured,
    )


def qwix_rules(bits: Mapping[str, int], **settings: Any) -> list[Any]:
    """The allocation as rules for `qwix <https://github.com/google/qwix>`_: one for each layer.

    Qwix's integer types have 2, 4 and 8 bits: allocate with ``bits=(2, 4, 8)`` and the default
    layers, whose names are the modules' paths.

    Args:
      bits: layer -> width, as `BitAllocation` has it.
      **settings: further fields of `qwix.QuantizationRule`, as ``tile_size``.

    Raises:
      ValueError: for a width that Qwix does not have.
    """
    import qwix

    wrong = {name: width for name, width in bits.items() if width not in (2, 4, 8)}
    if wrong:
        raise ValueError(f"bits must be 2, 4 or 8, which Qwix has; got {wrong}.")
    return [
        qwix.QuantizationRule(
            module_path=f"{re.escape(name)}$", weight_qtype=f"int{width}", **settings
        )
        for name, width in bits.items()
    ]


def _choose(
    layers: Layers, params: PyTree, rounded: Mapping[int, PyTree], widths: Sequence[int]
) -> PyTree:
    """Each leaf rounded to its layer's width; a stacked leaf slice by slice."""
    leaves, treedef = jax.tree.flatten(params)
    options = {width: jax.tree.leaves(tree) for width, tree in rounded.items()}
    result = []
    for i in range(len(leaves)):
        first, depth = layers.leaf_layer[i], layers.leaf_depth[i]
        if depth is None:
            result.append(options[widths[first]][i])
        else:
            slices = [options[widths[first + j]][i][j] for j in range(depth)]
            result.append(jnp.stack(slices))
    return jax.tree.unflatten(treedef, result)


def _values(curvature: Curvature, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error of each layer, NaN where one is not known."""
    if isinstance(curvature, LayerCurvature):
        mean, error = (np.asarray(x, np.float64) for x in curvature[:2])
        if mean.shape != (len(names),):
            raise ValueError(
                f"curvature must have one entry for each of the {len(names)} layers; got shape"
                f" {mean.shape}. Was it measured with other layers?"
            )
        return mean, error
    if not isinstance(curvature, Mapping) or set(curvature) != set(names):
        given = sorted(curvature) if isinstance(curvature, Mapping) else repr(curvature)
        raise ValueError(
            "curvature must be a LayerCurvature or a layer_report of the same layers,"
            f" {list(names)}; got {given}."
        )
    columns = ("curvature", "std_error")
    found = [[curvature[name].get(column) for column in columns] for name in names]
    array = np.asarray(found, np.float64).reshape(len(names), 2)  # None is NaN
    return array[:, 0], array[:, 1]


def _row(increase: float, error: float) -> dict[str, float | None]:
    known = bool(np.isfinite(increase))
    return {
        "increase": float(increase) if known else None,
        "std_error": float(error) if known and np.isfinite(error) else None,
    }


def _check_widths(bits: Sequence[int]) -> tuple[int, ...]:
    widths = tuple(sorted(set(bits)))
    if not widths or any(not isinstance(w, int) or not 2 <= w <= 16 for w in widths):
        raise ValueError(f"bits must be integers from 2 to 16; got {bits!r}.")
    return widths


def _budget(mean_bits: float | None, size_bytes: int | None, table: Table) -> float:
    """In bits."""
    if (mean_bits is None) == (size_bytes is None):
        raise ValueError(
            f"give one of mean_bits and size_bytes; got mean_bits={mean_bits!r},"
            f" size_bytes={size_bytes!r}."
        )
    if mean_bits is not None:
        check_number("mean_bits", mean_bits, "a number of at least 0", low=0)
        return float(mean_bits) * int(table.counts.sum())
    check_count("size_bytes", size_bytes)
    assert size_bytes is not None
    return 8.0 * size_bytes
