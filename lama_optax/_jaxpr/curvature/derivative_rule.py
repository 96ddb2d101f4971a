"""How the derivatives of what one equation gives follow from those of what it gets."""

from typing import Any

import jax
import jax.extend.core as jex

from lama_optax._jaxpr.interpret import apply, following, is_in, is_real, places

Derivatives = dict[Any, jax.Array]  # of variables; those that are not there are 0


class DerivativeRule:
    """How what an equation gives follows the derivatives of what it gets."""

    def __init__(
        self, jaxpr: Any, eqn: Any, ins: list[Any], first: Derivatives, second: Derivatives
    ):
        """Of arrays like these."""
        moved, bent = (
            [*dict.fromkeys(eqn.invars[i] for i in places(eqn, known))] for known in (first, second)
        )
        outvars = [v for v in eqn.outvars if not isinstance(v, jex.DropVar) and is_real(v)]

        def derivatives(ins: list[Any], slopes: list[jax.Array], bends: list[jax.Array]) -> Any:
            def outs(at: list[jax.Array]) -> list[jax.Array]:
                new = dict(zip(moved, at, strict=True))
                full = [
                    new[v] if is_in(v, new) else x for v, x in zip(eqn.invars, ins, strict=True)
                ]
                results = zip(eqn.outvars, apply(jaxpr, eqn, full), strict=True)
                return [x for v, x in results if v in outvars]

            def along(at: list[jax.Array], bent_slopes: list[jax.Array]) -> list[jax.Array]:
                new = dict(zip([*moved, *bent], [*slopes, *bent_slopes], strict=True))
                return jax.jvp(outs, (at,), ([new[v] for v in moved],))[1]

            at = [ins[eqn.invars.index(v)] for v in moved]
            bent_slopes = [slopes[moved.index(v)] for v in bent]
            return jax.jvp(along, (at, bent_slopes), (slopes, bends))

        self._closed = jax.make_jaxpr(derivatives)(
            ins, [first[v] for v in moved], [second[v] for v in bent]
        )
        self._moved, self._bent, self._outvars = moved, bent, outvars
        # What reads no derivative is 0: D^2 f of a linear f, for one.
        inner = self._closed.jaxpr
        reading = following(inner, inner.invars[len(ins) :])
        self._is_zero = [not is_in(v, reading) for v in inner.outvars]

    def __call__(
        self, ins: list[Any], first: Derivatives, second: Derivatives
    ) -> tuple[Derivatives, Derivatives]:
        """The derivatives of the outputs, first and second."""
        slopes, bends = [first[v] for v in self._moved], [second[v] for v in self._bent]
        outs = jex.jaxpr_as_fun(self._closed)(*ins, *slopes, *bends)
        count = len(self._outvars)
        new_first, new_second = (
            {
                v: x
                for v, x, zero in zip(self._outvars, outs[part], self._is_zero[part], strict=True)
                if not zero
            }
            for part in (slice(count), slice(count, None))
        )
        return new_first, new_second
