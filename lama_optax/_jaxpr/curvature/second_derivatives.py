"""Second derivatives of one function along several directions, each by one pass forwards.

With x_j = f_j(x) the values that a function L is evaluated through, and x_j' = D f_j x' their first
derivatives along a direction, its second derivative along that direction is

    L'' = sum_j (dL/dx_j) . D^2 f_j [x', x'].

The gradient dL/dx_j is one for all directions. Products have no second derivative by one factor, so
each direction costs one product where the function has one.

Elementwise functions of one value r are taken together: their x' is a multiple of r', and their
share of L'' is sum_i w_i r_i'^2 with weights w that all directions share. Where r' is random, of
mean 0 and with a known mean square, that mean replaces r_i'^2, on the way to a product: the
expectation of L'' stays the same, and has less noise.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lama_optax._jaxpr import operations
from lama_optax._jaxpr.curvature.derivative_rule import Arrays, DerivativeRule, OneEquation
from lama_optax._jaxpr.interpret import (
    apply,
    equations_in,
    inlined,
    interpret,
    is_in,
    places,
    source,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["before", "after", "square"],
    meta_fields=["leaf"],
)
@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a random perturbation of mean 0 enters a value: ``after = before + t perturbation``."""

    leaf: int  # perturbations of different leaves are independent
    before: Any
    after: Any
    square: Any  # the mean square of each entry of the perturbation


Function = Callable[..., tuple[jax.Array, list[Entry]]]


class SecondDerivatives(NamedTuple):
    """The value of a function of scalars, and its second derivative by each of them."""

    value: jax.Array
    derivatives: jax.Array
    unknown: str | None  # the operation for which one pass forwards is not known to be right


def second_derivatives(fn: Function, zeros: Sequence[jax.Array]) -> SecondDerivatives:
    """``d^2 fn / d t_i^2`` for each argument of a function of scalars t, which are ``zeros``.

    With its value ``fn`` returns where random directions enter; the means over them are those of
    the second derivatives. Where a pass forwards is not known to be right, each is a derivative of
    the gradient.
    """
    closed, structure = inlined(fn, zeros)
    result, entries = jax.tree.unflatten(structure, closed.jaxpr.outvars)
    moving = _moving(closed.jaxpr)
    unknown = _unknown(closed.jaxpr, moving)
    if unknown is not None:
        return SecondDerivatives(*_by_gradient(fn, jnp.stack(zeros)), unknown)
    evaluation = _Evaluation(closed, zeros, result, entries, moving)
    one = jnp.ones_like(zeros[0])
    found: list[jax.Array] = []
    for i in range(len(zeros)):
        found.append(evaluation.second_derivative(i, one))
        # Always 1, but XLA does not know: else it holds the values of all directions at once.
        one = jnp.where(found[-1] > jnp.inf, 0, one)
    return SecondDerivatives(evaluation.value, jnp.stack(found), None)


def _by_gradient(fn: Function, zeros: jax.Array) -> tuple[jax.Array, jax.Array]:
    def along(t: jax.Array) -> jax.Array:
        return fn(*t)[0]

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


# An elementwise function of the value of a variable, the root, by its first derivative.
_Chain = tuple[Any, jax.Array]
# The mean square of a first derivative, and the leaves whose perturbations it is made of.
_Square = tuple[jax.Array, frozenset[int]]


class _Evaluation:
    """One evaluation of a function: what all directions have in common."""

    def __init__(
        self,
        closed: Any,
        args: Sequence[jax.Array],
        result: Any,
        entries: Sequence[Entry],
        moving: set[Any],
    ):
        """``result`` and what is in ``entries`` are variables of the jaxpr."""
        self._jaxpr, self._dtype = closed.jaxpr, args[0].dtype
        self._rules: dict[Any, DerivativeRule] = {}
        self._near = _near_products(self._jaxpr, moving)
        self._inputs: list[list[Any]] = []
        befores = {entry.after: entry.before for entry in entries}
        backwards: list[tuple[OneEquation, Callable[..., Any], list[jax.Array]]] = []

        def equation(jaxpr: Any, eqn: Any, ins: list[Any]) -> list[Any]:
            self._inputs.append(ins)
            one = OneEquation(jaxpr, eqn, moving)
            if not one.inputs or not moving.intersection(eqn.outvars):
                return apply(jaxpr, eqn, ins)
            values, pull_back, outs = jax.vjp(
                lambda at: one.at(ins, at), one.moved(ins), has_aux=True
            )
            backwards.append((one, pull_back, values))
            entry = befores.get(eqn.outvars[0])
            # At t = 0 both have one value; this one does not wait for the perturbation.
            return outs if entry is None else [ins[eqn.invars.index(entry)]]

        self.value, *at_entries = interpret(closed, args, equation)
        self._entries = {
            entry.after: (entry, square.astype(self._dtype))
            for entry, square in zip(entries, at_entries[2::3], strict=True)
        }
        self._gradient = _gradient(result, self.value, backwards)
        self._chains: dict[Any, _Chain] = {}
        self._weights: Arrays = {}  # of roots: what multiplies the squares of their derivatives
        for eqn, ins in zip(self._jaxpr.eqns, self._inputs, strict=True):
            if places(eqn, moving) and eqn.primitive.name in operations.ELEMENTWISE:
                self._extend_chains(eqn, ins, moving)

    def _extend_chains(self, eqn: Any, ins: list[Any], moving: set[Any]) -> None:
        inputs = {eqn.invars[i]: ins[i] for i in places(eqn, moving)}
        chains = {v: self._chains.get(v, (v, jnp.ones_like(x))) for v, x in inputs.items()}
        root, *others = {root for root, _ in chains.values()}
        (v,) = eqn.outvars
        if others or v in self._entries:
            return
        slopes = {v: slope for v, (_, slope) in chains.items()}
        first, second = DerivativeRule(self._jaxpr, eqn, ins, slopes)(ins, slopes)
        for slope in first.values():
            self._chains[v] = root, slope
        for bend in second.values() if v in self._gradient else ():
            share = self._gradient[v] * bend.astype(self._dtype)
            share = _summed_like(share, root.aval.shape)
            self._weights[root] = self._weights[root] + share if root in self._weights else share

    def second_derivative(self, i: int, one: jax.Array) -> jax.Array:
        """Along argument ``i``; ``one`` is 1."""
        first: Arrays = {self._jaxpr.invars[i]: one}
        squares: dict[Any, _Square] = {}
        parts = []
        for number, (eqn, ins) in enumerate(zip(self._jaxpr.eqns, self._inputs, strict=True)):
            moved = places(eqn, first)
            if not moved or eqn.primitive.name in operations.FLAT:
                continue
            chain = self._chains.get(eqn.outvars[0]) if len(eqn.outvars) == 1 else None
            if chain is not None:
                root, slope = chain
                first[eqn.outvars[0]] = slope * first[root].astype(slope.dtype)
            else:
                if (number, moved) not in self._rules:
                    self._rules[number, moved] = DerivativeRule(self._jaxpr, eqn, ins, first)
                new, second = self._rules[number, moved](ins, first)
                first |= new
                parts += [
                    jnp.sum(self._gradient[v] * x.astype(self._dtype))
                    for v, x in second.items()
                    if v in self._gradient
                ]
            square = self._square_of(eqn, first, squares)
            if square is not None:
                squares[eqn.outvars[0]] = square
        for root, weight in self._weights.items():
            if root in first:
                is_known = root in squares and root in self._near
                square_of_root = squares[root][0] if is_known else jnp.square(first[root])
                parts.append(jnp.sum(weight * square_of_root.astype(self._dtype)))
        return sum(parts, jnp.zeros_like(one))

    def _square_of(self, eqn: Any, first: Arrays, squares: dict[Any, _Square]) -> _Square | None:
        """The mean square of an equation's one output, where it is known."""
        v = eqn.outvars[0]
        if v in self._entries:
            entry, square = self._entries[v]
            return None if is_in(entry.before, first) else (square, frozenset({entry.leaf}))
        if v in self._chains:
            root, slope = self._chains[v]
            if root not in squares:
                return None
            square, leaves = squares[root]
            return jnp.square(slope.astype(self._dtype)) * square, leaves
        moved = [eqn.invars[i] for i in places(eqn, first)]
        known = [squares[v] for v in moved if v in squares]
        if not known or len(known) < len(moved):
            return None
        values, sources = zip(*known, strict=True)
        leaves = frozenset[int]().union(*sources)
        if eqn.primitive.name in operations.LAYOUTS:
            return apply(self._jaxpr, eqn, values)[0], leaves
        is_sum = eqn.primitive.name in {"add", "sub"}
        are_independent = len(leaves) == sum(map(len, sources))
        return (functools.reduce(jnp.add, values), leaves) if is_sum and are_independent else None


def _summed_like(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums over the axes along which an operation has copied entries of an array of that shape."""
    if not shape:
        return jnp.sum(x)
    copied = tuple(i for i, (m, n) in enumerate(zip(x.shape, shape, strict=True)) if m != n)
    return jnp.sum(x, copied, keepdims=True)


def _gradient(
    result: Any,
    value: jax.Array,
    backwards: Sequence[tuple[OneEquation, Callable[..., Any], list[jax.Array]]],
) -> Arrays:
    """The derivatives of the result by every variable on the way to it."""
    found = {} if isinstance(result, jex.Literal) else {result: jnp.ones_like(value)}
    for one, pull_back, values in reversed(backwards):
        if not any(v in found for v in one.outputs):
            continue
        outs = [found.get(v, jnp.zeros_like(x)) for v, x in zip(one.outputs, values, strict=True)]
        (cotangents,) = pull_back(outs)
        for v, x in zip(one.inputs, cotangents, strict=True):
            found[v] = found[v] + x if v in found else x
    return {v: x.astype(value.dtype) for v, x in found.items()}


def _near_products(jaxpr: Any, moving: set[Any]) -> set[Any]:
    """What goes into products and nowhere else, each entry for itself.

    Elsewhere squares may cancel with other terms: softmax has sum p x'^2 - (sum p x')^2, of
    which the mean of the first alone would be the noisier.
    """
    near = moving.difference(v for v in jaxpr.outvars[:1] if is_in(v, moving))
    for eqn in reversed(jaxpr.eqns):
        outs, name = moving.intersection(eqn.outvars), eqn.primitive.name
        is_entrywise = name in operations.ELEMENTWISE | operations.LAYOUTS
        if outs and name not in operations.PRODUCTS and not (is_entrywise and near >= outs):
            near.difference_update(eqn.invars[i] for i in places(eqn, near))
    return near
