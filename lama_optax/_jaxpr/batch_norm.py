"""Finds BatchNorm in the function of one example, where its statistics are the example's own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lama_optax._jaxpr import operations
from lama_optax._jaxpr.interpret import interpret, source


class _OfExample(NamedTuple):
    """What is known of an array that is computed from the example."""

    value: object  # tells arrays apart; one in another dtype is the same
    means: frozenset[object] = frozenset()  # whose sum over a leading axis of length 1 is in it


def find_batch_norm(closed: Any, num_params: int) -> str | None:
    """Where ``x - mean(x)`` is taken over a leading axis of length 1, or None.

    ``closed`` is the jaxpr of a function whose first inputs are parameters, and whose others are
    one example. What does not depend on the example, such as standardised weights, is no BatchNorm.
    """
    found: list[str] = []

    def equation(jaxpr: Any, eqn: Any, ins: Sequence[Any]) -> Sequence[Any]:
        known = [x for x in ins if isinstance(x, _OfExample)]
        if not known:
            return [None] * len(eqn.outvars)
        outs = [_OfExample(object()) for _ in eqn.outvars]
        for inner in operations.inner_jaxprs(eqn):
            # The inputs of a call, a scan and a branch are the last ones of the equation's.
            num_inputs = len(getattr(inner, "jaxpr", inner).invars)
            if num_inputs <= len(ins):
                inside = interpret(inner, ins[len(ins) - num_inputs :], equation)
                outs = inside if len(inside) == len(outs) else outs
        name, first = eqn.primitive.name, known[0]
        if name == "sub" and any(a.value in b.means for a in known for b in known):
            found.append(source(eqn))
        if name in operations.ELEMENTWISE | operations.LAYOUTS:
            value = first.value if name in {"convert_element_type", "copy"} else object()
            outs = [_OfExample(value, frozenset().union(*(x.means for x in known)))]
        shape, axes = eqn.invars[0].aval.shape, operations.summed_axes(eqn)
        if 0 in axes and shape[0] == 1 and len(axes) < len(shape):
            outs = [_OfExample(object(), frozenset({first.value}))]
        return outs

    example = [_OfExample(object()) for _ in closed.jaxpr.invars[num_params:]]
    interpret(closed, [*[None] * num_params, *example], equation)
    return found[0] if found else None
