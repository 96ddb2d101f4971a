"""Second derivatives of one function along several directions, each by one pass forwards.

With x_j the values that a function L is evaluated through, x_j = f_j(x), along one direction

    x_j' = D f_j x',    x_j'' = D^2 f_j [x', x'] + D f_j x'',

and x_j'' may end at any cut through the evaluation: its share of L'' is (dL/dx_j) . x_j''. Here it
ends before every product, so that a product that follows is evaluated for x' alone and not for x''
too, as forward over forward does. The cotangents dL/dx_j are of one gradient for all directions.

Directions may be random, with x' = e of mean 0 where they enter and E[e^2] known. An elementwise
f of x alone, which is what a product uses, then gets x'' = f''(x) E[e^2] instead of f''(x) e^2: the
same mean without its noise. So does softmax(x y^T) where one factor moves (`_softmax`).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lama_optax._jaxpr.curvature.derivative_rule import DerivativeRule, Derivatives
from lama_optax._jaxpr.curvature.moments import MOVES_DATA, Moments, of_sum
from lama_optax._jaxpr.curvature.softmax import Found, Softmax, find_softmaxes, softmax_at
from lama_optax._jaxpr.interpret import (
    CALLS,
    apply,
    following,
    interpret,
    is_in,
    is_real,
    names_in,
    places,
)
from lama_optax._jaxpr.weights.perturbed import Entry

_PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
# fmt: off
_ELEMENTWISE = frozenset({
    "abs", "add", "convert_element_type", "copy", "cos", "div", "erf", "exp", "exp2", "expm1",
    "integer_pow", "log", "log1p", "logistic", "max", "min", "mul", "neg", "pow", "rsqrt",
    "select_n", "sin", "sqrt", "square", "sub", "tanh",
})
# fmt: on


def second_derivatives(
    fn: Callable[..., tuple[jax.Array, list[Entry]]], zeros: Sequence[jax.Array]
) -> list[jax.Array]:
    """``d^2 fn / d t_i^2`` for each argument of a function of scalars t, which are ``zeros``.

    With its value ``fn`` returns where random directions enter; the means over them are then those
    of the second derivatives.
    """
    evaluation = _Evaluation(fn, zeros)
    one = jnp.ones_like(zeros[0])
    found: list[jax.Array] = []
    for i in range(len(zeros)):
        found.append(evaluation.second_derivative(i, one))
        # Always 1, but XLA does not know: else it holds the values of all directions at once.
        one = jnp.where(found[-1] > jnp.inf, 0, one)
    return found


class _Chain(NamedTuple):
    """An elementwise function of one value, by its first and its second derivative."""

    root: Any  # the variable of that value
    slope: jax.Array
    bend: jax.Array | None  # None: 0


Known = dict[Any, Moments]  # of variables' first derivatives; those that are not there are not


class _Evaluation:
    """One evaluation of a function: what all directions have in common."""

    def __init__(
        self,
        fn: Callable[..., tuple[jax.Array, list[Entry]]],
        args: Sequence[jax.Array],
    ):
        """``fn``: a function of scalars, whose values are ``args``."""

        def inlined(*t: jax.Array) -> tuple[jax.Array, list[Entry]]:
            closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*t)
            return jax.tree.unflatten(jax.tree.structure(shapes), interpret(closed, t, _inline))

        closed, shapes = jax.make_jaxpr(inlined, return_shape=True)(*args)
        self._jaxpr = closed.jaxpr
        result_var, entries = jax.tree.unflatten(jax.tree.structure(shapes), self._jaxpr.outvars)
        self._rules: dict[Any, DerivativeRule] = {}
        moving = {v for v in following(self._jaxpr, self._jaxpr.invars) if is_real(v)}
        factors = [v for eqn in self._jaxpr.eqns if _multiplies(eqn) for v in eqn.invars]
        softmaxes = find_softmaxes(self._jaxpr)
        ends = [*factors, *(softmax.weights for softmax in softmaxes), result_var]
        ends = [*dict.fromkeys(v for v in ends if is_in(v, moving))]
        place = {v: i for i, v in enumerate(ends)}

        def value(moves: dict[int, jax.Array]) -> tuple[jax.Array, Any]:
            inputs, at_ends = [], {}

            def equation(jaxpr: Any, eqn: Any, ins: list[Any]) -> list[Any]:
                inputs.append(ins)
                outs = apply(jaxpr, eqn, ins)
                for i, v in enumerate(eqn.outvars):
                    if v in place:
                        at_ends[place[v]] = outs[i]
                        outs[i] += moves.get(place[v], 0)
                return outs

            result, *at_entries = interpret(closed, args, equation)
            return result, (inputs, at_ends, at_entries)

        moves = jax.tree.map(jnp.zeros_like, value({})[1][1])
        result, pull_back, (self._inputs, _, at_entries) = jax.vjp(value, moves, has_aux=True)
        (cotangents,) = pull_back(jnp.ones_like(result))
        self._cotangents = {ends[i]: x.astype(args[0].dtype) for i, x in cotangents.items()}
        self._chains = self._find_chains(moving)
        found = jax.tree.unflatten(jax.tree.structure(shapes[1]), at_entries)
        self._entries = {
            entry.after: (entry.before, at.moments)
            for entry, at in zip(entries, found, strict=True)
        }
        self._softmaxes = self._find_softmaxes(softmaxes)
        self._near = self._find_near(moving, {v for v in ends if v in factors})

    def _find_chains(self, moving: set[Any]) -> dict[Any, _Chain]:
        chains: dict[Any, _Chain] = {}

        def chain_to(v: Any, x: jax.Array) -> _Chain:
            # Where x'' ends another chain begins.
            is_root = v not in chains or v in self._cotangents
            return _Chain(v, jnp.ones_like(x), None) if is_root else chains[v]

        for eqn, ins in zip(self._jaxpr.eqns, self._inputs, strict=True):
            moved = places(eqn, moving)
            if not moved or eqn.primitive.name not in _ELEMENTWISE:
                continue
            before = {eqn.invars[i]: chain_to(eqn.invars[i], ins[i]) for i in moved}
            root, *others = {chain.root for chain in before.values()}
            if not others:
                slopes = {v: chain.slope for v, chain in before.items()}
                bends = {v: chain.bend for v, chain in before.items() if chain.bend is not None}
                first, second = DerivativeRule(self._jaxpr, eqn, ins, slopes, bends)(
                    ins, slopes, bends
                )
                chains |= {v: _Chain(root, slope, second.get(v)) for v, slope in first.items()}
        return chains

    def _find_softmaxes(self, found: Sequence[Found]) -> dict[Any, Softmax]:
        made = {
            v: (eqn, ins)
            for eqn, ins in zip(self._jaxpr.eqns, self._inputs, strict=True)
            for v in eqn.outvars
        }

        def linear(v: Any) -> tuple[Any, jax.Array] | None:
            chain = self._chains.get(v, _Chain(v, jnp.ones((), v.aval.dtype), None))
            return (chain.root, chain.slope) if chain.bend is None else None

        return {
            softmax.weights: softmax_at(
                softmax, self._cotangents[softmax.weights], self._jaxpr, made, linear
            )
            for softmax in found
            if softmax.weights in self._cotangents
        }

    def _find_near(self, moving: set[Any], factors: set[Any]) -> set[Any]:
        """What enters products and nothing else, its entries each for itself.

        Elsewhere squares may cancel with other terms: softmax has sum p x'^2 - (sum p x')^2, of
        which the mean of the first alone would be the noisier.
        """
        near, far = set(factors), set[Any]()
        for eqn in reversed(self._jaxpr.eqns):
            outs = [v for v in eqn.outvars if v in moving]
            is_near = eqn.primitive.name in _ELEMENTWISE | MOVES_DATA and near.issuperset(outs)
            for i in places(eqn, moving - self._cotangents.keys()) if outs else ():
                if is_near and eqn.invars[i] not in far:
                    near.add(eqn.invars[i])
                else:
                    near.discard(eqn.invars[i])
                    far.add(eqn.invars[i])
        return near

    def second_derivative(self, i: int, one: jax.Array) -> jax.Array:
        """Along argument ``i``; ``one`` is 1."""
        first: Derivatives = {self._jaxpr.invars[i]: one}
        second: Derivatives = {}
        known: Known = {}
        ended = []
        for number, (eqn, ins) in enumerate(zip(self._jaxpr.eqns, self._inputs, strict=True)):
            moved, bent = places(eqn, first), places(eqn, second)
            if not (moved and eqn.outvars):
                continue
            v = eqn.outvars[0]
            if v in self._chains:
                new_first, new_second = self._along_chain(v, first, second, known)
            elif v in self._softmaxes and self._softmaxes[v].scores in first:
                new_first, new_second = self._along_softmax(v, first, second, known)
            else:
                case = number, moved, bent
                if case not in self._rules:
                    self._rules[case] = DerivativeRule(self._jaxpr, eqn, ins, first, second)
                new_first, new_second = self._rules[case](ins, first, second)
                for out in new_second.keys() & self._cotangents.keys():
                    new_second[out] = self._weighted(out, new_second[out])
            first |= new_first
            known |= self._moments_of(eqn, moved, first, known)
            for out, x in new_second.items():
                if out in self._cotangents:
                    ended.append(jnp.sum(x))
                else:
                    second[out] = x
        return sum(ended, jnp.zeros_like(one))

    def _moments_of(
        self, eqn: Any, moved: tuple[int, ...], first: Derivatives, known: Known
    ) -> Known:
        """Of what an equation gives; in chains the root's are enough."""
        v, name = eqn.outvars[0], eqn.primitive.name
        if v in self._entries:
            before, entered = self._entries[v]
            return {} if is_in(before, first) else {v: entered}
        if v not in first or name not in MOVES_DATA | {"add", "sub"}:
            return {}
        parts = [(eqn.invars[i], self._moments(eqn.invars[i], known)) for i in moved]
        if name in MOVES_DATA:
            moments = parts[0][1] and parts[0][1].laid_out(eqn)
        else:
            copies = [m.copied(x.aval.shape, v.aval.shape) for x, m in parts if m is not None]
            moments = of_sum(copies) if len(copies) == len(parts) else None
        return {} if moments is None else {v: moments}

    def _moments(self, v: Any, known: Known) -> Moments | None:
        if v in known or v not in self._chains:
            return known.get(v)
        root, slope, _ = self._chains[v]
        found = known.get(root)
        return found and found.scaled(slope)

    def _along_chain(
        self, v: Any, first: Derivatives, second: Derivatives, known: Known
    ) -> tuple[Derivatives, Derivatives]:
        """The derivatives of ``v``, the second one times its cotangent if it ends there."""
        root, slope, bend = self._chains[v]
        along_root = first[root].astype(slope.dtype)
        new_first = {v: slope * along_root}
        if v in self._cotangents:
            # First what all directions have in common: XLA multiplies it once.
            slope = self._weighted(v, slope)
            bend = None if bend is None else self._weighted(v, bend)
        terms = []
        if bend is not None:
            is_known = root in known and root in self._near
            x = known[root].square if is_known else along_root
            x = x.astype(bend.dtype)
            terms.append(bend * (x if is_known else jnp.square(x)))
        if root in second:
            terms.append(slope * second[root].astype(slope.dtype))
        return new_first, {v: sum(terms[1:], terms[0])} if terms else {}

    def _along_softmax(
        self, v: Any, first: Derivatives, second: Derivatives, known: Known
    ) -> tuple[Derivatives, Derivatives]:
        """Like `_along_chain`."""
        softmax = self._softmaxes[v]
        z1, z2 = first[softmax.scores], second.get(softmax.scores)
        share = None
        if softmax.product is not None and z2 is None:
            eqn = softmax.product.eqn
            place, *others = places(eqn, first)
            moments = self._moments(eqn.invars[place], known)
            if not others and moments is not None:
                share = softmax.product.mean(place, moments)
        if share is None:
            share = softmax.second(z1, z2)
        return {v: softmax.first(z1)}, {v: share.astype(self._cotangents[v].dtype)}

    def _weighted(self, v: Any, x: jax.Array) -> jax.Array:
        cotangent = self._cotangents[v]
        return cotangent * x.astype(cotangent.dtype)


def _inline(jaxpr: Any, eqn: Any, ins: list[Any]) -> Sequence[Any]:
    if eqn.primitive.name in CALLS:
        return interpret(eqn.params["jaxpr"], ins, _inline)
    return apply(jaxpr, eqn, ins)


def _multiplies(eqn: Any) -> bool:
    """Whether an equation is a product, or holds one."""
    inner = [names_in(jaxpr) for jaxpr in jex.jaxprs_in_params(eqn.params)]
    return not _PRODUCTS.isdisjoint([eqn.primitive.name, *itertools.chain(*inner)])
