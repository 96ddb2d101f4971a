"""Evaluates a jaxpr equation by equation, so that some of them can be evaluated differently."""

from collections.abc import Callable, Container, Sequence
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp

#: Primitives that evaluate the one jaxpr that they hold, and no more than that.
CALLS = ("jit", "pjit", "closed_call", "core_call")


def interpret(
    closed: Any, args: Sequence[Any], equation: Callable[[Any, Any, list[Any]], Sequence[Any]]
) -> list[Any]:
    """Evaluates ``closed``; ``equation(jaxpr, eqn, inputs)`` returns an equation's outputs."""
    jaxpr = getattr(closed, "jaxpr", closed)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return jnp.asarray(atom.val) if isinstance(atom, jex.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        outs = equation(jaxpr, eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def apply(jaxpr: Any, eqn: Any, ins: Sequence[Any]) -> list[Any]:
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


def names_in(closed: Any) -> frozenset[str]:
    """The names of all operations in a jaxpr and in those that it calls."""
    jaxpr = getattr(closed, "jaxpr", closed)
    names = frozenset(eqn.primitive.name for eqn in jaxpr.eqns)
    return names.union(*(names_in(inner) for inner in jex.subjaxprs(jaxpr)))


def is_in(v: Any, known: Container[Any]) -> bool:
    """Whether what an equation gets or gives is among known variables."""
    return not isinstance(v, jex.Literal) and v in known


def places(eqn: Any, known: Container[Any]) -> tuple[int, ...]:
    """Which of an equation's inputs are ``known``."""
    return tuple(i for i, v in enumerate(eqn.invars) if is_in(v, known))


def is_real(v: Any) -> bool:
    """Whether a variable has a real dtype."""
    return jnp.issubdtype(v.aval.dtype, jnp.floating)


def following(jaxpr: Any, sources: Sequence[Any]) -> set[Any]:
    """``sources`` and all variables of a jaxpr that are computed from them."""
    found = set(sources)
    for eqn in jaxpr.eqns:
        if places(eqn, found):
            found.update(eqn.outvars)
    return found
