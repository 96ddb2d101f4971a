"""Evaluates a function at perturbed parameters without forming one perturbed copy an example.

A weight W of several axes is perturbed by ``t s V``, V drawn once for all examples and s a sign for
each example: the outer product of one sign vector for each of W's axes. Where the weight meets an
activation h in a product, the signs move to the activation and the result,

    h (W + t s V) = h W + t ((h * s_in) V) * s_out        (Flipout, Wen et al. 2018)

which under `jax.vmap` over examples stays one matrix product. This file interprets the jaxpr of
the function of one example, follows each weight through transpose, reshape, convert, scan and
nested calls to the products that use it, and perturbs there. A use without a rule gets the
perturbed weight itself if it is small; a large one loses its signs, in all its uses alike.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

PyTree = Any
# Up to this size a weight is perturbed for each example itself where no rule applies.
_SMALL = 4096


class Signs(NamedTuple):
    """Signs that vary along some axes of a weight and are constant along the others."""

    origins: frozenset[int]  # axes of the leaf that the signs were drawn for
    axes: tuple[int, ...]  # axes of the weight as it is now
    values: jax.Array  # one dimension for each of `axes`


class Perturbed(NamedTuple):
    """A weight ``value + scale * signs * probe``."""

    leaf: int  # number among the flattened parameters
    value: jax.Array
    probe: jax.Array  # shape and dtype of value
    scale: jax.Array  # t; a scalar, or shape=(depth, 1, ...) for stacked layers
    signs: tuple[Signs, ...]  # their axes are disjoint
    add: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # `added` or `shifted`


class DropSigns(Exception):
    """A use cannot carry the signs that were drawn for some axes of a leaf."""

    def __init__(self, weight: Perturbed, signs: Sequence[Signs]):
        """Names the leaf and the axes of it whose signs must go."""
        self.leaf = weight.leaf
        self.origins = frozenset[int]().union(*(group.origins for group in signs))
        super().__init__(self.leaf, self.origins)


Value = jax.Array | Perturbed


def evaluate(closed: Any, args: Sequence[Value]) -> list[jax.Array]:
    """Evaluates a jaxpr whose inputs may be perturbed weights; its outputs are arrays."""
    return [_formed(out) for out in _interpret(closed, args)]


def _interpret(closed: Any, args: Sequence[Value]) -> list[Value]:
    jaxpr = getattr(closed, "jaxpr", closed)
    env: dict[Any, Value] = dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Value:
        return jnp.asarray(atom.val) if isinstance(atom, jex.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        outs = _equation(jaxpr, eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(jaxpr: Any, eqn: Any, ins: Sequence[Value]) -> Sequence[Value]:
    if any(isinstance(x, Perturbed) for x in ins):
        if eqn.primitive.name in _INLINED:
            return _interpret(eqn.params["jaxpr"], ins)
        rule = _RULES.get(eqn.primitive.name)
        outs = rule(eqn.params, *ins) if rule else None
        if outs is not None:
            return outs
    return _apply(jaxpr, eqn, [_formed(x) for x in ins])


def _apply(jaxpr: Any, eqn: Any, ins: Sequence[jax.Array]) -> list[Any]:
    """Evaluates one equation by public means: binding a primitive has changed between versions."""
    variables = {
        atom: x
        for atom, x in zip(eqn.invars, ins, strict=True)
        if not isinstance(atom, jex.Literal)
    }
    kept = [v for v in eqn.outvars if not isinstance(v, jex.DropVar)]
    alone = jaxpr.replace(
        constvars=[],
        invars=list(variables),
        outvars=kept,
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    results = iter(jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ()))(*variables.values()))
    return [None if isinstance(v, jex.DropVar) else next(results) for v in eqn.outvars]


def added(value: jax.Array, scale: jax.Array, perturbation: jax.Array) -> jax.Array:
    """``value + t perturbation``."""
    return value + scale * perturbation


@jax.custom_jvp
def shifted(value: jax.Array, scale: jax.Array, perturbation: jax.Array) -> jax.Array:
    """``value + t perturbation`` at the point t = 0, for forward derivatives alone.

    Its derivatives are those of the sum; its value does not read the perturbation. So every layer's
    second derivative has one and the same unperturbed forward pass, which is compiled once. Not
    for `jax.grad`, which forgets within loops that the value has a rule of its own.
    """
    del scale, perturbation
    return value


@functools.partial(shifted.defjvp, symbolic_zeros=True)
def _shifted_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    _, scale, perturbation = primals
    value_dot, scale_dot, perturbation_dot = tangents
    terms = [
        a * b
        for a, b in ((scale_dot, perturbation), (scale, perturbation_dot))
        if not (_is_zero(a) or _is_zero(b))
    ]
    if not _is_zero(value_dot):
        terms.append(value_dot)
    # Once more `shifted`, for a derivative of this derivative. Without terms, `value_dot` is the
    # symbolic zero of the right shape.
    return shifted(*primals), functools.reduce(jnp.add, terms) if terms else value_dot


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _formed(x: Value) -> jax.Array:
    """The perturbed weight itself."""
    if not isinstance(x, Perturbed):
        return x
    # A bias or a scale is no larger than the activation that it meets.
    is_vector = x.value.ndim == 0 or x.value.size == max(x.value.shape)
    if x.signs and x.value.size > _SMALL and not is_vector:
        raise DropSigns(x, x.signs)
    perturbation = x.probe
    for group in x.signs:
        perturbation = perturbation * _along(group.values, group.axes, x.value.ndim)
    return x.add(x.value, x.scale.astype(x.value.dtype), perturbation)


def _along(values: jax.Array, axes: Sequence[int], ndim: int) -> jax.Array:
    """Lays the dimensions of ``values`` along ``axes`` of an array of ``ndim`` dimensions."""
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    shape = [1] * ndim
    for i in order:
        shape[axes[i]] = values.shape[i]
    return jnp.transpose(values, order).reshape(shape)


def _product(
    weight: Perturbed,
    activation: jax.Array,
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    to_activation: dict[int, int],
    to_output: dict[int, int],
) -> list[jax.Array] | None:
    """``h W + t ((h * s_in) V) * s_out`` for any product that is linear in both.

    ``to_activation`` and ``to_output`` say which axis of the activation or of the output an
    axis of the weight meets.
    """
    if weight.scale.ndim:
        return None
    signed = activation
    outer: list[Signs] = []
    for group in weight.signs:
        if all(axis in to_activation for axis in group.axes):
            axes = [to_activation[axis] for axis in group.axes]
            signed = signed * _along(group.values, axes, activation.ndim).astype(signed.dtype)
        elif all(axis in to_output for axis in group.axes):
            outer.append(group)
        else:
            raise DropSigns(weight, [group])
    out = multiply(activation, weight.value)
    perturbation = multiply(signed, weight.probe)
    for group in outer:
        axes = [to_output[axis] for axis in group.axes]
        perturbation *= _along(group.values, axes, out.ndim).astype(out.dtype)
    return [weight.add(out, weight.scale.astype(out.dtype), perturbation)]


def _dot_general(params: dict[str, Any], lhs: Value, rhs: Value) -> list[jax.Array] | None:
    if isinstance(lhs, Perturbed) and isinstance(rhs, Perturbed):
        lhs = _formed(lhs)
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

    return _product(
        weight,
        activation,
        multiply,
        dict(zip(w_met, h_met, strict=True)),
        {axis: before + i for i, axis in enumerate(free)},
    )


def _conv(params: dict[str, Any], lhs: Value, rhs: Value) -> list[jax.Array] | None:
    groups = params["feature_group_count"], params["batch_group_count"]
    if isinstance(lhs, Perturbed) or not isinstance(rhs, Perturbed) or groups != (1, 1):
        return None
    spec = params["dimension_numbers"]
    return _product(
        rhs,
        lhs,
        lambda h, w: jax.lax.conv_general_dilated_p.bind(h, w, **params),
        {spec.rhs_spec[1]: spec.lhs_spec[1]},
        {spec.rhs_spec[0]: spec.out_spec[1]},
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
    for old_axes, new_axes in _segments(old, new):
        groups = [group for group in weight.signs if set(group.axes) & set(old_axes)]
        if not groups:
            continue
        if any(not set(group.axes) <= set(old_axes) for group in groups):
            raise DropSigns(weight, groups)
        values = jnp.ones([old[axis] for axis in old_axes], groups[0].values.dtype)
        for group in groups:
            axes = [old_axes.index(axis) for axis in group.axes]
            values = values * _along(group.values, axes, len(old_axes))
        origins = frozenset[int]().union(*(group.origins for group in groups))
        shape = [new[axis] for axis in new_axes]
        signs.append(Signs(origins, tuple(new_axes), values.reshape(shape)))
    return _restructured(weight, lambda x: x.reshape(new), signs)


def _segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Splits two shapes of equal size into the shortest runs of axes of equal size."""
    segments = []
    i = j = 0
    while i < len(old) or j < len(new):
        old_axes: list[int] = []
        new_axes: list[int] = []
        m = n = 1
        while True:
            if i < len(old) and (m < n or not old_axes):
                m, i = m * old[i], i + 1
                old_axes.append(i - 1)
            elif j < len(new) and (n < m or not new_axes):
                n, j = n * new[j], j + 1
                new_axes.append(j - 1)
            if m == n and (old_axes or i == len(old)) and (new_axes or j == len(new)):
                break
        segments.append((old_axes, new_axes))
    return segments


def _squeeze(params: dict[str, Any], weight: Perturbed) -> list[Value] | None:
    gone = {axis % weight.value.ndim for axis in params["dimensions"]}
    new = [n for axis, n in enumerate(weight.value.shape) if axis not in gone]
    return _reshape({"new_sizes": new}, weight)


def _scan(params: dict[str, Any], *ins: Value) -> list[Value]:
    if "num_consts" in params:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    else:
        num_consts, num_carry = (len(part) for part in params["ft_in"].unpack()[:2])
    consts = ins[:num_consts]
    carry = [_formed(x) for x in ins[num_consts : num_consts + num_carry]]
    xs = ins[num_consts + num_carry :]

    def body(carry: list[jax.Array], slices: list[Any]) -> tuple[list[jax.Array], list[jax.Array]]:
        rows = [_row(x, part) for x, part in zip(xs, slices, strict=True)]
        outs = evaluate(params["jaxpr"], [*consts, *carry, *rows])
        return outs[:num_carry], outs[num_carry:]

    carry, ys = jax.lax.scan(
        body,
        carry,
        [_rows(x) for x in xs],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _rows(x: Value) -> Any:
    """What `jax.lax.scan` slices along the leading axis."""
    if not isinstance(x, Perturbed):
        return x
    moved = [
        jnp.moveaxis(group.values, group.axes.index(0), 0) for group in x.signs if 0 in group.axes
    ]
    return x.value, x.probe, x.scale if x.scale.ndim else None, moved


def _row(x: Value, part: Any) -> Value:
    """One slice of a perturbed weight, rebuilt from `_rows`."""
    if not isinstance(x, Perturbed):
        return part
    value, probe, scale, moved = part
    sliced = iter(moved)
    signs = tuple(
        Signs(
            group.origins,
            tuple(axis - 1 for axis in group.axes if axis != 0),
            next(sliced) if 0 in group.axes else group.values,
        )
        for group in x.signs
    )
    scale = x.scale if scale is None else scale.reshape(())
    return Perturbed(x.leaf, value, probe, scale, signs, x.add)


_INLINED = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat")
_RULES: dict[str, Callable[..., Any]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "convert_element_type": _convert,
    "transpose": _transpose,
    "slice": _slice,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "scan": _scan,
}
