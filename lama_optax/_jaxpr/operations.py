"""What the equations of a jaxpr mean. No other file reads an equation's params.

Each reader returns None for an equation that is not of its kind, so that what a new version of JAX
adds, or what nobody has thought of, is left to the general path.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

Runs = list[tuple[list[int], list[int]]]  # of axes: before and after
# fmt: off
_SAME_LAYOUT = frozenset({
    "convert_element_type", "copy", "copy_p", "name", "neg", "reshard", "sharding_constraint",
})
#: Functions of single entries, which have derivatives of single entries.
ELEMENTWISE = frozenset({
    "abs", "add", "convert_element_type", "copy", "cos", "div", "erf", "exp", "exp2", "expm1",
    "integer_pow", "log", "log1p", "logistic", "max", "min", "mul", "neg", "pow", "rsqrt",
    "select_n", "sin", "sqrt", "square", "sub", "tanh",
})
#: Operations that lay entries out anew, and copy some.
LAYOUTS = frozenset({"broadcast_in_dim", "reshape", "squeeze", "transpose"})
#: What has the derivative 0, whatever it gets.
FLAT = frozenset({"bitcast_convert_type", "ceil", "floor", "round", "sign", "stop_gradient"})
_KNOWN = ELEMENTWISE | LAYOUTS | FLAT | frozenset({
    "acos", "acosh", "add_any", "argmax", "argmin", "asin", "asinh", "atan", "atan2", "atanh",
    "cbrt", "checkpoint", "clamp", "closed_call", "concatenate", "cond", "conv_general_dilated",
    "copy_p", "cosh", "cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum",
    "custom_jvp_call", "digamma", "dot_general", "dynamic_slice", "dynamic_update_slice", "eq",
    "erf_inv", "erfc", "gather", "ge", "gt", "iota", "is_finite", "jit", "le", "lgamma", "lt",
    "name", "ne", "pad", "pjit", "reduce_max", "reduce_min", "reduce_precision", "reduce_prod",
    "reduce_sum", "reduce_window_max", "reduce_window_min", "reduce_window_sum", "rem",
    "remat2", "reshard", "rev", "scan", "scatter", "scatter-add", "scatter_add",
    "select_and_gather_add", "select_and_scatter_add", "sharding_constraint", "sinh", "slice",
    "sort", "split", "stack", "tan", "top_k", "unstack",
})
# fmt: on


def is_known(eqn: Any) -> bool:
    """Whether forward over forward differentiation is known to be right for an equation.

    It is for the operations of a list on real numbers, and for those that meet no real number.
    """
    arrays = (*eqn.invars, *eqn.outvars)
    return all(map(is_constant, arrays)) or (
        eqn.primitive.name in _KNOWN and not any(map(is_complex, arrays))
    )


def is_constant(v: Any) -> bool:
    """Whether a variable has no derivative: an integer, a boolean or a key."""
    return not jnp.issubdtype(getattr(v.aval, "dtype", bool), jnp.inexact)


def called(eqn: Any) -> Any:
    """The jaxpr of an equation that evaluates that jaxpr and does no more."""
    if eqn.primitive.name not in {"jit", "pjit", "closed_call", "core_call"}:
        return None
    return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))


def inner_jaxprs(eqn: Any) -> list[Any]:
    """All jaxprs that an equation holds."""
    return list(jex.jaxprs_in_params(eqn.params))


def rematerialised(eqn: Any) -> tuple[Any, Callable[..., Any]] | None:
    """The jaxpr of a `jax.checkpoint`, and the transformation with its settings."""
    if eqn.primitive.name not in {"remat2", "checkpoint", "remat"}:
        return None
    settings = {name: eqn.params[name] for name in ("policy", "prevent_cse")}
    return eqn.params["jaxpr"], functools.partial(jax.checkpoint, **settings)


def varies_already(eqn: Any, x: jax.Array) -> bool:
    """Whether an equation lets an array differ between devices that does so already.

    In `jax.shard_map` parameters are alike on all devices when a loss is traced, and may differ
    when it is evaluated.
    """
    if eqn.primitive.name != "pvary":
        return False
    return jax.typeof(x).manual_axis_type.varying.issuperset(eqn.params["axes"])


class Scan(NamedTuple):
    """A `jax.lax.scan`: its inputs are constants, first carry and what is scanned over."""

    jaxpr: Any
    num_consts: int
    num_carry: int
    settings: dict[str, Any]


def scan(eqn: Any) -> Scan | None:
    """Reads one."""
    if eqn.primitive.name != "scan":
        return None
    params = eqn.params
    if "num_consts" in params:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    else:
        num_consts, num_carry = (len(part) for part in params["ft_in"].unpack()[:2])
    settings = {name: params[name] for name in ("length", "reverse", "unroll")}
    return Scan(params["jaxpr"], num_consts, num_carry, settings)


def is_float(v: Any) -> bool:
    """Whether a variable has a real floating-point dtype."""
    return jnp.issubdtype(getattr(v.aval, "dtype", bool), jnp.floating)


def is_complex(v: Any) -> bool:
    """Whether a variable has a complex dtype."""
    return jnp.issubdtype(getattr(v.aval, "dtype", bool), jnp.complexfloating)


def is_plain(eqn: Any) -> bool:
    """Whether the rules below hold: for different real inputs and one such output with entries."""
    arrays = (*eqn.invars, *eqn.outvars)
    variables = [v for v in eqn.invars if not isinstance(v, jex.Literal)]
    return (
        len(eqn.outvars) == 1
        and is_float(eqn.outvars[0])
        and len(set(variables)) == len(variables)
        and not any(is_complex(v) or 0 in v.aval.shape for v in arrays)
    )


def movement(eqn: Any) -> Callable[[jax.Array], jax.Array] | None:
    """How an equation with one input moves entries, if it copies none and at most negates.

    The function does the same to what broadcasts to the input: the result does to the output.
    """
    name, params = eqn.primitive.name, eqn.params
    if len(eqn.invars) != 1:
        return None
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if name in _SAME_LAYOUT:
        return lambda x: x
    if name == "transpose":
        return lambda x: jnp.transpose(x, params["permutation"])
    if name == "reshape" and params["dimensions"] is not None:
        return None  # the axes are to be laid out in another order first
    if name in {"broadcast_in_dim", "reshape", "squeeze"} and math.prod(old) == math.prod(new):
        return functools.partial(_reshaped, old, new)
    if name == "slice":
        strides = params["strides"] or (1,) * len(old)
        limits = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        cuts = [slice(*limit) for limit in limits]
        return lambda x: x[
            tuple(c if n > 1 else slice(1) for c, n in zip(cuts, x.shape, strict=True))
        ]
    return None


def _reshaped(old: Sequence[int], new: Sequence[int], x: jax.Array) -> jax.Array:
    """Reshapes what broadcasts to ``old``; axes that ``x`` is not copied along stay of length 1."""
    full, shape = [1] * len(old), [1] * len(new)
    for before, after in _segments(old, new):
        if any(x.shape[axis] > 1 for axis in before):
            for axis in before:
                full[axis] = old[axis]
            for axis in after:
                shape[axis] = new[axis]
    return jnp.broadcast_to(x, full).reshape(shape)


def scales(eqn: Any, place: int) -> bool:
    """Whether an equation multiplies the entries of one input by the other's."""
    return eqn.primitive.name == "mul" or (eqn.primitive.name == "div" and place == 0)


class Product(NamedTuple):
    """A product of a weight and an activation, linear in the weight."""

    multiply: Callable[[jax.Array, jax.Array], jax.Array]  # of activation and weight
    perturb: Callable[[jax.Array, jax.Array], jax.Array]  # the derivative by the weight
    to_activation: dict[int, int]  # axis of the weight -> axis of the activation that it meets
    to_output: dict[int, int]  # axis of the weight -> axis of the output
    is_row: bool = False  # whether the output is h W in some layout, with one row h


def product(eqn: Any, place: int) -> Product | None:
    """Reads a product whose ``place``-th input is the weight."""
    reader = {"dot_general": _dot, "conv_general_dilated": _convolution, "gather": _lookup}
    found = reader.get(eqn.primitive.name)
    return None if found is None else found(eqn, place)


def _dot(eqn: Any, place: int) -> Product:
    (contract, batch) = eqn.params["dimension_numbers"]
    h_shape, w_ndim = eqn.invars[1 - place].aval.shape, eqn.invars[place].aval.ndim
    w_met = (*contract[place], *batch[place])
    h_met = (*contract[1 - place], *batch[1 - place])
    free = [axis for axis in range(w_ndim) if axis not in w_met]
    kept = [n for axis, n in enumerate(h_shape) if axis not in h_met]
    before = len(batch[0]) + (0 if place == 0 else len(kept))

    def multiply(h: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.dot_general(*((w, h) if place == 0 else (h, w)), **eqn.params)

    return Product(
        multiply,
        multiply,
        dict(zip(w_met, h_met, strict=True)),
        {axis: before + i for i, axis in enumerate(free)},
        is_row=math.prod(kept) == 1 and not batch[0],
    )


def _convolution(eqn: Any, place: int) -> Product | None:
    params = eqn.params
    if place == 0 or (params["feature_group_count"], params["batch_group_count"]) != (1, 1):
        return None
    numbers = params["dimension_numbers"]

    def multiply(h: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(h, w, **params)

    to_activation = {numbers.rhs_spec[1]: numbers.lhs_spec[1]}
    return Product(multiply, multiply, to_activation, {numbers.rhs_spec[0]: numbers.out_spec[1]})


def _lookup(eqn: Any, place: int) -> Product | None:
    """An embedding's: the signs along the axes of whole rows stay on the result."""
    if place != 0:
        return None
    params, shape = eqn.params, eqn.invars[0].aval.shape
    numbers = params["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    rest = [axis for axis in range(len(shape)) if axis not in gone]
    whole = {
        axis: numbers.offset_dims[i]
        for i, axis in enumerate(rest)
        if params["slice_sizes"][axis] == shape[axis]
    }

    def look_up(indices: jax.Array, w: jax.Array, **changed: Any) -> jax.Array:
        return jax.lax.gather(w, indices, **params | changed)

    # What fills the places beyond the table is a constant.
    return Product(look_up, functools.partial(look_up, fill_value=0), {}, whole)


def convolution(eqn: Any) -> tuple[Any, Callable[..., jax.Array]] | None:
    """The order of a convolution's axes, and the convolution as a function of it."""
    if eqn.primitive.name != "conv_general_dilated":
        return None

    def convolve(lhs: jax.Array, rhs: jax.Array, numbers: Any) -> jax.Array:
        return jax.lax.conv_general_dilated(lhs, rhs, **eqn.params | {"dimension_numbers": numbers})

    return eqn.params["dimension_numbers"], convolve


def summed_axes(eqn: Any) -> Sequence[int]:
    """The axes that an equation sums over."""
    return eqn.params["axes"] if eqn.primitive.name == "reduce_sum" else ()


def _segments(old: Sequence[int], new: Sequence[int]) -> Runs:
    """Splits two shapes of equal size into the shortest runs of axes of equal size.

    Axes of length 1 are in none. The size is not 0.
    """
    starts = [list(itertools.accumulate(shape, operator.mul, initial=1)) for shape in (old, new)]
    common = set(starts[0]).intersection(starts[1])
    runs: dict[int, tuple[list[int], list[int]]] = {}
    for side, shape in enumerate((old, new)):
        for axis, n in enumerate(shape):
            if n > 1:
                begin = max(start for start in common if start <= starts[side][axis])
                runs.setdefault(begin, ([], []))[side].append(axis)
    return list(runs.values())
