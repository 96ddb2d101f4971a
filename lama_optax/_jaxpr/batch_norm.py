"""Finds BatchNorm in the function of one example, where its statistics are the example's own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex

from lama_optax._jaxpr import operations
from lama_optax._jaxpr.interpret import source


class _Known(NamedTuple):
    """What is known of a variable."""

    of_example: bool = False  # whether it is computed from the example
    value: Any = None  # the variable whose value it has, perhaps in another dtype
    means: frozenset = frozenset()  # variables whose sum over a leading axis of length 1 is in it


def find_batch_norm(closed: Any, num_params: int) -> str | None:
    """Where ``x - mean(x)`` is taken over a leading axis of length 1, or None.

    ``closed`` is the jaxpr of a function whose first inputs are parameters, and whose others are
    one example. What does not depend on the example, such as standardised weights, is no BatchNorm.
    """
    jaxpr = closed.jaxpr
    inputs = [_Known(i >= num_params) for i in range(len(jaxpr.invars))]
    found: list[str] = []
    _follow(jaxpr, inputs, found)
    return found[0] if found else None


def _follow(jaxpr: Any, inputs: Sequence[_Known], found: list[str]) -> list[_Known]:
    env = dict(zip(jaxpr.invars, inputs, strict=True))

    def known(v: Any) -> _Known:
        if isinstance(v, jex.Literal):
            return _Known()
        own = env.get(v, _Known())
        return own if own.value is not None else own._replace(value=v)

    for eqn in jaxpr.eqns:
        ins = [known(v) for v in eqn.invars]
        of_example = any(x.of_example for x in ins)
        outs = [_Known(of_example) for _ in eqn.outvars]
        for inner in operations.inner_jaxprs(eqn):
            inner = getattr(inner, "jaxpr", inner)
            if len(inner.invars) <= len(ins):
                # The inputs of a call, a scan and a branch are the last ones of the equation's.
                inside = _follow(inner, ins[len(ins) - len(inner.invars) :], found)
                if len(inside) == len(outs):
                    outs = inside
        name = eqn.primitive.name
        if name == "sub" and (ins[0].value in ins[1].means or ins[1].value in ins[0].means):
            found.append(source(eqn))
        if name in operations.ELEMENTWISE | operations.LAYOUTS:
            means = frozenset[Any]().union(*(x.means for x in ins))
            same = ins[0].value if name in {"convert_element_type", "copy"} else None
            outs = [_Known(of_example, same, means)]
        if 0 in operations.summed_axes(eqn) and of_example:
            shape, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval
            if shape[0] == 1 and out.ndim > 0:
                outs = [_Known(of_example, None, frozenset({ins[0].value}))]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [known(v) for v in jaxpr.outvars]
