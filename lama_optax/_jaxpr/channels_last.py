"""Convolutions' derivatives that are as fast in loops and conditions on a CPU as outside of them.

XLA's CPU compiler has fast code for convolutions whose axes are in one order. It brings others
into that order, the derivatives by kernels among them, but not within loops and conditions
(jax 0.10 and 0.12): there they take many times as long.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lama_optax._jaxpr import operations
from lama_optax._jaxpr.interpret import apply, interpret


def channels_last(fn: Callable[..., Any], primitives: frozenset[str]) -> Callable[..., Any]:
    """``fn`` with its convolutions' axes in the order that XLA's CPU compiler has fast code for.

    ``primitives``: what the loss is made of; ``fn`` itself is returned without convolutions among
    them, or where JAX does not run on a CPU. What is in scans or rematerialised stays as it is.
    """
    if "conv_general_dilated" not in primitives or jax.default_backend() != "cpu":
        return fn

    def evaluated(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        outs = interpret(closed, jax.tree.leaves(args), _equation)
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    return evaluated


def _equation(jaxpr: Any, eqn: Any, ins: list[Any]) -> Sequence[Any]:
    convolution = operations.convolution(eqn)
    return apply(jaxpr, eqn, ins) if convolution is None else [_convolve(*convolution, *ins)]


def _convolve(
    numbers: Any, convolve: Callable[..., jax.Array], lhs: jax.Array, rhs: jax.Array
) -> jax.Array:
    """The same with axes (batch, ..., channels) and, of the kernel, (..., in, out)."""
    lhs_spec, rhs_spec, out_spec = numbers
    num_spatial = lhs.ndim - 2
    last, spatial = num_spatial + 1, range(num_spatial)
    outer = (0, last, *(axis + 1 for axis in spatial))
    out = convolve(
        jnp.transpose(lhs, (lhs_spec[0], *lhs_spec[2:], lhs_spec[1])),
        jnp.transpose(rhs, (*rhs_spec[2:], rhs_spec[1], rhs_spec[0])),
        jax.lax.ConvDimensionNumbers(outer, (last, num_spatial, *spatial), outer),
    )
    order = (out_spec[0], *out_spec[2:], out_spec[1])
    return jnp.transpose(out, sorted(range(out.ndim), key=order.__getitem__))
