"""How a perturbed weight passes through one operation: products that use it, and changes of shape.

In a product with an activation h the signs move to the activation and the result,

    h (W + t s V) = h W + t ((h * s_in) V) * s_out        (Flipout, Wen et al. 2018)

Where a dense layer has one row of outputs for each example, and the weight has no other use,
(h * s_in) V is replaced by |h|: the mean over s_in and V is then exact. A rule returns None where
it does not apply, and raises `DropSigns` where the weight could be followed without some signs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lama_optax._checks import wide_dtype
from lama_optax._jaxpr.curvature.moments import Moments, segments
from lama_optax._jaxpr.weights.perturbed import (
    DropSigns,
    Perturbed,
    Signs,
    Taps,
    Value,
    along,
    formed,
)


def _product(
    weight: Perturbed,
    activation: jax.Array,
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    to_activation: dict[int, int],
    to_output: dict[int, int],
    moments: Callable[[], Moments] | None = None,
) -> list[jax.Array] | None:
    """``h W + t ((h * s_in) V) * s_out`` for any product that is linear in both.

    ``to_activation`` and ``to_output`` say which axis of the activation or of the output an
    axis of the weight meets; ``moments()`` are the perturbation's.
    """
    if weight.scale.ndim:
        return None
    weight.uses.add(weight.leaf)
    signed = jax.lax.stop_gradient(activation) if weight.is_single else activation
    outer: list[Signs] = []
    for group in weight.signs:
        if all(axis in to_activation for axis in group.axes):
            axes = [to_activation[axis] for axis in group.axes]
            signed = signed * along(group.values, axes, activation.ndim).astype(signed.dtype)
        elif all(axis in to_output for axis in group.axes):
            outer.append(group)
        else:
            raise DropSigns(weight, [group])
    out = multiply(activation, weight.value)
    perturbation = multiply(signed, weight.probe)
    for group in outer:
        axes = [to_output[axis] for axis in group.axes]
        perturbation *= along(group.values, axes, out.ndim).astype(out.dtype)
    return [weight.move(out, perturbation, moments and moments())]


def _one_row(
    weight: Perturbed,
    activation: jax.Array,
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    free: int,
) -> list[jax.Array] | None:
    """``h W + t |h| s_out``: of the same mean as `_product`, without the noise of s_in and V.

    With G the second derivative by the outputs, trace(H) = |h|^2 trace(G) = E[(|h| s)^T G (|h| s)].
    """
    outer = [group for group in weight.signs if group.axes == (free,)]
    # A loop's weights are parts of one leaf, which share s_out and are told apart by V.
    if not (weight.is_single and outer) or weight.uses.in_loop or weight.scale.ndim:
        return None
    weight.uses.add(weight.leaf)
    out = multiply(activation, weight.value)
    h = jax.lax.stop_gradient(activation)
    square = jnp.sum(jnp.square(h.astype(wide_dtype(h))))
    perturbation = (jnp.sqrt(square) * outer[0].values).astype(out.dtype)
    moments = Moments(square, frozenset({weight.leaf}), frozenset({0}))
    return [weight.move(out, perturbation, moments)]


def _tapped(
    weight: Perturbed,
    rows: jax.Array,
    out: jax.Array,
    axes: Sequence[int],
) -> list[jax.Array]:
    """``out`` with the move of `Taps`; ``axes`` are those of ``out`` that the weight brought."""
    assert isinstance(weight.uses, Taps)
    rest = [axis for axis in range(out.ndim) if axis not in axes]
    order = (*rest, *axes)
    laid = jnp.transpose(out, order)
    moved = weight.uses.tap(weight.leaf, rows, laid.reshape(rows.shape[0], -1)).reshape(laid.shape)
    return [jnp.transpose(moved, sorted(range(out.ndim), key=order.__getitem__))]


def _dot_general(params: dict[str, Any], lhs: Value, rhs: Value) -> list[jax.Array] | None:
    if isinstance(lhs, Perturbed) and isinstance(rhs, Perturbed):
        lhs = formed(lhs)
    side = 0 if isinstance(lhs, Perturbed) else 1
    weight, activation = (lhs, rhs) if side == 0 else (rhs, lhs)
    assert isinstance(weight, Perturbed)
    assert not isinstance(activation, Perturbed)
    (contract, batch) = params["dimension_numbers"]
    w_met = (*contract[side], *batch[side])
    h_met = (*contract[1 - side], *batch[1 - side])
    free = [axis for axis in range(weight.value.ndim) if axis not in w_met]
    before = len(batch[0]) + (0 if side == 0 else activation.ndim - len(h_met))

    def multiply(h: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.dot_general_p.bind(*((w, h) if side == 0 else (h, w)), **params)

    if isinstance(weight.uses, Taps) and not batch[0]:
        kept = [axis for axis in range(activation.ndim) if axis not in h_met]
        rows = jnp.transpose(activation, (*kept, *h_met))
        rows = rows.reshape(math.prod(activation.shape[axis] for axis in kept), -1)
        own = range(before, before + len(free))
        return _tapped(weight, rows, multiply(activation, weight.value), own)
    if activation.ndim == len(contract[0]) and len(free) == 1 and not batch[0]:
        outs = _one_row(weight, activation, multiply, free[0])
        if outs is not None:
            return outs

    def moments() -> Moments:
        wide = activation.astype(wide_dtype(activation))
        squares = jnp.sum(jnp.square(wide), axis=h_met)
        if side == 1:
            squares = jnp.expand_dims(squares, tuple(range(-len(free), 0)))
        own = frozenset(range(before, before + len(free)))
        kept = [axis for axis in range(activation.ndim) if axis not in h_met]
        if len(kept) != 1:
            return Moments(squares, frozenset({weight.leaf}), own)
        rows = jnp.moveaxis(wide, kept[0], 0).reshape(wide.shape[kept[0]], -1)
        axis = len(free) if side == 0 else 0
        return Moments(squares, frozenset({weight.leaf}), own, axis, rows)

    return _product(
        weight,
        activation,
        multiply,
        dict(zip(w_met, h_met, strict=True)),
        {axis: before + i for i, axis in enumerate(free)},
        None if batch[0] else moments,
    )


def _conv(params: dict[str, Any], lhs: Value, rhs: Value) -> list[jax.Array] | None:
    groups = params["feature_group_count"], params["batch_group_count"]
    if isinstance(lhs, Perturbed) or not isinstance(rhs, Perturbed) or groups != (1, 1):
        return None
    spec = params["dimension_numbers"]
    if isinstance(rhs.uses, Taps):
        patches = jax.lax.conv_general_dilated_patches(
            lhs,
            [rhs.value.shape[axis] for axis in spec.rhs_spec[2:]],
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            spec,
        )
        feature = spec.out_spec[1]
        rows = jnp.moveaxis(patches, feature, -1).reshape(-1, patches.shape[feature])
        out = jax.lax.conv_general_dilated_p.bind(lhs, rhs.value, **params)
        return _tapped(rhs, rows, out, [feature])
    one_channel = [1 if axis == spec.rhs_spec[0] else n for axis, n in enumerate(rhs.value.shape)]

    def multiply(h: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated_p.bind(h, w, **params)

    def moments() -> Moments:
        wide = lhs.astype(wide_dtype(lhs))
        ones = jnp.ones(one_channel, wide.dtype)
        own_dtype = params | {"preferred_element_type": None}
        squares = jax.lax.conv_general_dilated_p.bind(jnp.square(wide), ones, **own_dtype)
        return Moments(squares, frozenset({rhs.leaf}), frozenset({spec.out_spec[1]}))

    return _product(
        rhs,
        lhs,
        multiply,
        {spec.rhs_spec[1]: spec.lhs_spec[1]},
        {spec.rhs_spec[0]: spec.out_spec[1]},
        moments,
    )


def _gather(params: dict[str, Any], operand: Value, indices: Value) -> list[jax.Array] | None:
    """Embedding look-ups: whole rows, so that signs along a row's axes stay on the result."""
    if isinstance(indices, Perturbed) or not isinstance(operand, Perturbed) or operand.scale.ndim:
        return None
    numbers = params["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    rest = [axis for axis in range(operand.value.ndim) if axis not in gone]
    whole = {
        axis: numbers.offset_dims[i]
        for i, axis in enumerate(rest)
        if params["slice_sizes"][axis] == operand.value.shape[axis]
    }
    return _product(operand, indices, lambda i, w: jax.lax.gather_p.bind(w, i, **params), {}, whole)


def _restructured(
    weight: Perturbed,
    change: Callable[[jax.Array], jax.Array],
    signs: Sequence[Signs] | None = None,
) -> list[Value]:
    new_signs = weight.signs if signs is None else tuple(signs)
    return [
        weight._replace(value=change(weight.value), probe=change(weight.probe), signs=new_signs)
    ]


def _convert(params: dict[str, Any], weight: Perturbed) -> list[Value]:
    return _restructured(weight, lambda x: x.astype(params["new_dtype"]))


def _transpose(params: dict[str, Any], weight: Perturbed) -> list[Value] | None:
    if weight.scale.ndim:
        return None
    permutation = params["permutation"]
    signs = [
        group._replace(axes=tuple(permutation.index(axis) for axis in group.axes))
        for group in weight.signs
    ]
    return _restructured(weight, lambda x: jnp.transpose(x, permutation), signs)


def _slice(params: dict[str, Any], weight: Perturbed) -> list[Value] | None:
    if weight.scale.ndim:
        return None
    strides = params["strides"] or (1,) * weight.value.ndim
    window = [
        slice(*s)
        for s in zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    ]
    signs = [
        group._replace(values=group.values[tuple(window[axis] for axis in group.axes)])
        for group in weight.signs
    ]
    return _restructured(weight, lambda x: x[tuple(window)], signs)


def _reshape(params: dict[str, Any], weight: Perturbed) -> list[Value] | None:
    """Follows the signs through merged and split axes; squeezed and new axes are cases of it."""
    if weight.scale.ndim or params.get("dimensions") is not None:
        return None
    old, new = weight.value.shape, tuple(params["new_sizes"])
    signs = []
    for old_axes, new_axes in segments(old, new):
        groups = [group for group in weight.signs if set(group.axes) & set(old_axes)]
        if not groups:
            continue
        if any(not set(group.axes) <= set(old_axes) for group in groups):
            raise DropSigns(weight, groups)
        values = jnp.ones([old[axis] for axis in old_axes], groups[0].values.dtype)
        for group in groups:
            axes = [old_axes.index(axis) for axis in group.axes]
            values = values * along(group.values, axes, len(old_axes))
        origins = frozenset[int]().union(*(group.origins for group in groups))
        shape = [new[axis] for axis in new_axes]
        signs.append(Signs(origins, tuple(new_axes), values.reshape(shape)))
    return _restructured(weight, lambda x: x.reshape(new), signs)


def _squeeze(params: dict[str, Any], weight: Perturbed) -> list[Value] | None:
    gone = {axis % weight.value.ndim for axis in params["dimensions"]}
    new = [n for axis, n in enumerate(weight.value.shape) if axis not in gone]
    return _reshape({"new_sizes": new}, weight)


RULES: dict[str, Callable[..., Any]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "convert_element_type": _convert,
    "transpose": _transpose,
    "slice": _slice,
    "reshape": _reshape,
    "squeeze": _squeeze,
}
