"""The first and second derivative of one equation along one direction."""

from typing import Any

import jax
import jax.extend.core as jex

from lama_optax._jaxpr import operations
from lama_optax._jaxpr.interpret import apply, following, is_in, places

Arrays = dict[Any, jax.Array]  # of variables


class OneEquation:
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


class DerivativeRule:
    """``D f x'`` and ``D^2 f [x', x']`` of one equation ``f``, traced once for many directions."""

    def __init__(self, jaxpr: Any, eqn: Any, ins: list[Any], slopes: Arrays):
        """For inputs and directions like these."""
        self._equation = equation = OneEquation(jaxpr, eqn, slopes)

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
