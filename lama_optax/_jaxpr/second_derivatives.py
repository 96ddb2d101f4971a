"""Second derivatives of one function along several directions, each by one pass forwards.

With x_j = f_j(x) the values that a function L is evaluated through, and x_j' = D f_j x' their first
derivatives along a direction, its second derivative along that direction is

    L'' = sum_j (dL/dx_j) . D^2 f_j [x', x'].

The gradient dL/dx_j is one for all directions. Products have no second derivative by one factor, so
each direction costs one product where the function has one.

Elementwise functions of one value r are taken together: their x' is a multiple of r', and their
share of L'' is sum_i w_i r_i'^2 with weights w that all directions share.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lama_optax._jaxpr import operations
from lama_optax._jaxpr.interpret import (
    apply,
    equations_in,
    following,
    inlined,
    interpret,
    is_in,
    places,
    source,
)

Arrays = dict[Any, jax.Array]  # of variables
Step = tuple[Any, list[Any]]  # an equation and its inputs


class SecondDerivatives(NamedTuple):
    """The value of a function of scalars, and its second derivative by each of them."""

    value: jax.Array
    derivatives: jax.Array
    unknown: str | None  # the operation for which one pass forwards is not known to be right


def second_derivatives(
    fn: Callable[..., jax.Array], zeros: Sequence[jax.Array]
) -> SecondDerivatives:
    """``d^2 fn / d t_i^2`` for each argument of a function of scalars t, which are ``zeros``.

    Where a pass forwards is not known to be right, each is a derivative of the gradient.
    """
    closed = inlined(fn, zeros)
    moving = _moving(closed.jaxpr)
    unknown = _unknown(closed.jaxpr, moving)
    if unknown is not None:
        return SecondDerivatives(*_by_gradient(fn, jnp.stack(zeros)), unknown)
    value, gradient, steps = _evaluated(closed, zeros, moving)
    chains, weights = _chained(closed.jaxpr, gradient, steps, moving)
    rules: dict[Any, _DerivativeRule] = {}
    one = jnp.ones_like(value)
    found: list[jax.Array] = []
    for v in closed.jaxpr.invars:
        first: Arrays = {v: one}
        parts = []
        for number, (eqn, ins) in enumerate(steps):
            moved = places(eqn, first)
            if not moved or eqn.primitive.name in operations.FLAT:
                continue
            if eqn.outvars[0] in chains:
                root, slope = chains[eqn.outvars[0]]
                first[eqn.outvars[0]] = slope * first[root].astype(slope.dtype)
                continue
            if (number, moved) not in rules:
                rules[number, moved] = _DerivativeRule(closed.jaxpr, eqn, ins, first)
            new, second = rules[number, moved](ins, first)
            first |= new
            parts += [gradient[x] * second[x].astype(value.dtype) for x in second if x in gradient]
        parts += [
            weight * jnp.square(first[root].astype(value.dtype))
            for root, weight in weights.items()
            if root in first
        ]
        found.append(sum(map(jnp.sum, parts), jnp.zeros_like(value)))
        # Always 1, but XLA does not know: else it holds the values of all directions at once.
        one = jnp.where(found[-1] > jnp.inf, 0, one)
    return SecondDerivatives(value, jnp.stack(found), None)


def _by_gradient(fn: Callable[..., jax.Array], zeros: jax.Array) -> tuple[jax.Array, jax.Array]:
    def along(t: jax.Array) -> jax.Array:
        return fn(*t)

    def of_direction(i: jax.Array) -> jax.Array:
        is_own = jnp.arange(zeros.size) == i
        product = jax.jvp(jax.grad(along), (zeros,), (is_own.astype(zeros.dtype),))[1]
        return jnp.sum(jnp.where(is_own, product, 0))

    return along(zeros), jax.lax.map(of_direction, jnp.arange(zeros.size))


def _moving(jaxpr: Any) -> set[Any]:
    """The variables that may have a derivative by the arguments."""
    moving = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if places(eqn, moving) and eqn.primitive.name not in operations.FLAT:
            moving.update(v for v in eqn.outvars if not operations.is_constant(v))
    return moving


def _unknown(jaxpr: Any, moving: set[Any]) -> str | None:
    """The first operation on what moves that is not on the list of those that are known."""
    for eqn in jaxpr.eqns:
        if places(eqn, moving) and eqn.primitive.name not in operations.FLAT:
            inner = [e for closed in operations.inner_jaxprs(eqn) for e in equations_in(closed)]
            for e in (eqn, *inner):
                if not operations.is_known(e):
                    return source(e) if e is eqn else f"{e.primitive.name} in {source(eqn)}"
    return None


class _OneEquation:
    """An equation as a function of those of its inputs that move."""

    def __init__(self, jaxpr: Any, eqn: Any, moving: Any):
        """``moving``: variables, of which some are inputs; the others are constants."""
        self.inputs = [*dict.fromkeys(eqn.invars[i] for i in places(eqn, moving))]
        self.outputs = [
            v for v in eqn.outvars if not isinstance(v, jex.DropVar) and operations.is_float(v)
        ]
        self._jaxpr, self._eqn = jaxpr, eqn

    def at(self, ins: list[Any], moved: list[jax.Array]) -> tuple[list[jax.Array], list[Any]]:
        """The real outputs, and all of them, where the moving inputs are ``moved``."""
        eqn, new = self._eqn, dict(zip(self.inputs, moved, strict=True))
        full = [new[v] if is_in(v, new) else x for v, x in zip(eqn.invars, ins, strict=True)]
        outs = apply(self._jaxpr, eqn, full)
        found = dict(zip(eqn.outvars, outs, strict=True))
        return [found[v] for v in self.outputs], outs

    def moved(self, ins: list[Any]) -> list[jax.Array]:
        """The moving ones of all inputs."""
        return [ins[self._eqn.invars.index(v)] for v in self.inputs]


class _DerivativeRule:
    """``D f x'`` and ``D^2 f [x', x']`` of one equation ``f``, traced once for many directions."""

    def __init__(self, jaxpr: Any, eqn: Any, ins: list[Any], slopes: Arrays):
        """For inputs and directions like these."""
        self._equation = equation = _OneEquation(jaxpr, eqn, slopes)

        def derivatives(ins: list[Any], slopes: list[jax.Array]) -> Any:
            def along(at: list[jax.Array]) -> list[jax.Array]:
                return jax.jvp(lambda at: equation.at(ins, at)[0], (at,), (slopes,))[1]

            return jax.jvp(along, (equation.moved(ins),), (slopes,))

        directions = [slopes[v] for v in equation.inputs]
        self._closed = jax.make_jaxpr(derivatives)(ins, directions)
        # A derivative that reads no direction is 0: the second one of a linear f, for one.
        inner = self._closed.jaxpr
        reading = following(inner, inner.invars[len(ins) :])
        self._is_zero = [not is_in(v, reading) for v in inner.outvars]

    def __call__(self, ins: list[Any], slopes: Arrays) -> tuple[Arrays, Arrays]:
        """The outputs' first and second derivatives; those that are not there are 0."""
        directions = [slopes[v] for v in self._equation.inputs]
        outs = jex.jaxpr_as_fun(self._closed)(*ins, *directions)
        found: list[Arrays] = []
        for part in (slice(len(outs) // 2), slice(len(outs) // 2, None)):
            values = zip(self._equation.outputs, outs[part], self._is_zero[part], strict=True)
            found.append({v: x for v, x, zero in values if not zero})
        return found[0], found[1]


def _evaluated(
    closed: Any, args: Sequence[jax.Array], moving: set[Any]
) -> tuple[jax.Array, Arrays, list[Step]]:
    """The value, its derivatives by what moves, and all equations with their inputs."""
    steps: list[Step] = []
    backwards: list[tuple[_OneEquation, Callable[..., Any], list[jax.Array]]] = []

    def equation(jaxpr: Any, eqn: Any, ins: list[Any]) -> list[Any]:
        steps.append((eqn, ins))
        one = _OneEquation(jaxpr, eqn, moving)
        if not one.inputs or not moving.intersection(eqn.outvars):
            return apply(jaxpr, eqn, ins)
        values, pull_back, outs = jax.vjp(lambda at: one.at(ins, at), one.moved(ins), has_aux=True)
        backwards.append((one, pull_back, values))
        return outs

    (value,) = interpret(closed, args, equation)
    (result,) = closed.jaxpr.outvars
    found = {} if isinstance(result, jex.Literal) else {result: jnp.ones_like(value)}
    for one, pull_back, values in reversed(backwards):
        if any(v in found for v in one.outputs):
            pairs = zip(one.outputs, values, strict=True)
            (cotangents,) = pull_back([found.get(v, jnp.zeros_like(x)) for v, x in pairs])
            for v, x in zip(one.inputs, cotangents, strict=True):
                found[v] = found[v] + x if v in found else x
    return value, {v: x.astype(value.dtype) for v, x in found.items()}, steps


def _chained(
    jaxpr: Any, gradient: Arrays, steps: Sequence[Step], moving: set[Any]
) -> tuple[dict[Any, tuple[Any, jax.Array]], Arrays]:
    """What is an elementwise function of one variable, its root: the root and the derivative by it.

    And of each root the weights of the squares of its first derivative in the second one.
    """
    chains: dict[Any, tuple[Any, jax.Array]] = {}
    weights: Arrays = {}
    for eqn, ins in steps:
        inputs = {eqn.invars[i]: ins[i] for i in places(eqn, moving)}
        own = {v: chains.get(v, (v, jnp.ones_like(x))) for v, x in inputs.items()}
        roots = {root for root, _ in own.values()}
        if eqn.primitive.name not in operations.ELEMENTWISE or len(roots) != 1:
            continue
        (root,), (v,) = roots, eqn.outvars
        slopes = {v: slope for v, (_, slope) in own.items()}
        first, second = _DerivativeRule(jaxpr, eqn, ins, slopes)(ins, slopes)
        for slope in first.values():
            chains[v] = root, slope
        for bend in second.values() if v in gradient else ():
            share = gradient[v] * bend.astype(gradient[v].dtype)
            # Sums over the axes along which entries of the root were copied.
            shape = root.aval.shape or (1,) * share.ndim
            copied = [i for i, (m, n) in enumerate(zip(share.shape, shape, strict=True)) if m != n]
            share = jnp.sum(share, copied, keepdims=True)
            share = share if root.aval.shape else share.reshape(())
            weights[root] = weights[root] + share if root in weights else share
    return chains, weights
