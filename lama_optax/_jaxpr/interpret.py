"""Evaluates a jaxpr equation by equation, so that some of them can be evaluated differently."""

import pathlib
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lama_optax._jaxpr import operations

_PACKAGES = tuple(
    str(pathlib.Path(file).parent) for file in (jax.__file__, pathlib.Path(__file__).parent)
)


def interpret(
    closed: Any, args: Sequence[Any], equation: Callable[[Any, Any, list[Any]], Sequence[Any]]
) -> list[Any]:
    """Evaluates ``closed``; ``equation(jaxpr, eqn, inputs)`` returns an equation's outputs.

    What is called is evaluated in the same way. A value is let go after its last use. An error gets
    a note that says which line of the user's program the equation came from.
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    last_use = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in _variables(eqn.invars)}
    kept = set(_variables(jaxpr.outvars))

    def read(atom: Any) -> Any:
        return jnp.asarray(atom.val) if isinstance(atom, jex.Literal) else env[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        inner, ins = operations.called(eqn), [read(atom) for atom in eqn.invars]
        try:
            outs = interpret(inner, ins, equation) if inner else equation(jaxpr, eqn, ins)
        except Exception as error:
            if not any("lama_optax" in note for note in getattr(error, "__notes__", ())):
                error.add_note(f"lama_optax: raised at {source(eqn)}.")
            raise
        env.update(zip(eqn.outvars, outs, strict=True))
        for v in {*_variables(eqn.invars), *eqn.outvars} - kept:
            if last_use.get(v, i) == i:
                env.pop(v, None)
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


def inlined(fn: Callable[..., Any], args: Sequence[Any]) -> Any:
    """The jaxpr of ``fn`` without calls of other jaxprs."""
    closed = jax.make_jaxpr(fn)(*args)
    return jax.make_jaxpr(lambda *args: interpret(closed, args, apply))(*args)


def source(eqn: Any) -> str:
    """The operation and the line of the user's program that it comes from."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if not frame.file_name.startswith(_PACKAGES):
            place = f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
            return f"{eqn.primitive.name} at {place}"
    return eqn.primitive.name


def names_in(closed: Any) -> frozenset[str]:
    """The names of all operations in a jaxpr and in those that it calls."""
    return frozenset(eqn.primitive.name for eqn in equations_in(closed))


def equations_in(closed: Any) -> Iterator[Any]:
    """All equations of a jaxpr and of those inside of it."""
    jaxpr = getattr(closed, "jaxpr", closed)
    yield from jaxpr.eqns
    for inner in jex.subjaxprs(jaxpr):
        yield from equations_in(inner)


def is_in(v: Any, known: Container[Any]) -> bool:
    """Whether what an equation gets or gives is among known variables."""
    return not isinstance(v, jex.Literal) and v in known


def places(eqn: Any, known: Container[Any]) -> tuple[int, ...]:
    """Which of an equation's inputs are ``known``."""
    return tuple(i for i, v in enumerate(eqn.invars) if is_in(v, known))


def following(jaxpr: Any, sources: Sequence[Any]) -> set[Any]:
    """``sources`` and all variables of a jaxpr that are computed from them."""
    found = set(sources)
    for eqn in jaxpr.eqns:
        if places(eqn, found):
            found.update(eqn.outvars)
    return found


def _variables(atoms: Sequence[Any]) -> Iterator[Any]:
    return (atom for atom in atoms if not isinstance(atom, jex.Literal))


def narrowest_dtype(closed: Any) -> Any:
    """The real dtype with the fewest digits that a jaxpr computes in."""
    dtypes = [
        v.aval.dtype for eqn in equations_in(closed) for v in eqn.outvars if operations.is_float(v)
    ]
    return max(dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps), default=jnp.float32)
