"""Derivatives of p = softmax(z), and their mean where z is a product with a random factor.

With c the derivative of the loss by p,

    p' = p (z' - sum_s p_s z'_s),
    c . p'' = sum_s w_s (z'_s^2 + z''_s) - 2 sum_{s r} w_s p_r z'_s z'_r,
    w = p (c - sum_s p_s c_s).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lama_optax._checks import wide_dtype
from lama_optax._jaxpr.curvature.moments import MOVES_DATA, Moments, axis_before
from lama_optax._jaxpr.interpret import apply


class Found(NamedTuple):
    """Variables of a jaxpr: ``weights = softmax(scores)`` along an axis."""

    scores: Any
    weights: Any
    axis: int


def find_softmaxes(jaxpr: Any) -> list[Found]:
    """All ``exp(z - m) / sum(exp(z - m))`` of a jaxpr, m constant along the axis."""
    made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}

    def source(v: Any, name: str, *through: str) -> Any:
        """The equation of that name which made ``v``, before those of other names."""
        while not isinstance(v, jex.Literal) and v in made:
            eqn = made[v]
            if eqn.primitive.name == name:
                return eqn
            if eqn.primitive.name not in through:
                return None
            v = eqn.invars[0]
        return None

    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name != "div":
            continue
        powers, total = eqn.invars
        exp = source(powers, "exp")
        add = source(total, "reduce_sum", "broadcast_in_dim", "convert_element_type", "reshape")
        if exp is None or add is None or len(add.params["axes"]) != 1:
            continue
        axis = int(add.params["axes"][0])
        shape = powers.aval.shape
        of_rows = (*shape[:axis], 1, *shape[axis + 1 :])
        is_total = source(add.invars[0], "exp", "convert_element_type") is exp
        if is_total and total.aval.shape == of_rows:
            scores = exp.invars[0]
            shift = source(scores, "sub")
            if shift is not None and shift.invars[1].aval.shape == of_rows:
                scores = shift.invars[0]
            found.append(Found(scores, eqn.outvars[0], axis))
    return found


@dataclasses.dataclass(frozen=True)
class Softmax:
    """A softmax where a jaxpr has been evaluated."""

    scores: Any  # the variable
    axis: int
    p: jax.Array
    w: jax.Array
    product: "Product | None"  # whose entries the scores are linear in

    def first(self, z1: jax.Array) -> jax.Array:
        """``p'``, given ``z'``."""
        return (self.p * (z1 - self._sum(self.p * z1))).astype(z1.dtype)

    def second(self, z1: jax.Array, z2: jax.Array | None) -> jax.Array:
        """``c . p''``, given ``z'`` and ``z''``, which may be 0."""
        z1 = z1.astype(self.w.dtype)
        squares = jnp.square(z1) if z2 is None else jnp.square(z1) + z2
        return self._sum(self.w * squares) - 2 * self._sum(self.w * z1) * self._sum(self.p * z1)

    def _sum(self, x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=self.axis, keepdims=True)


class Product(NamedTuple):
    """A product of two factors that ``softmax(z)`` is behind, by way of linear operations."""

    eqn: Any
    factors: list[jax.Array]
    axis: int  # the softmax's, among the product's
    # By the product's entries: z is L y, and these are w and p times L, and w times L^2.
    w: jax.Array
    p: jax.Array
    w_of_squares: jax.Array

    def mean(self, place: int, moments: Moments) -> jax.Array | None:
        """Of ``c . p''``, if known; the random factor is the ``place``-th.

        That of ``sum_s w_s z'_s^2 - 2 sum_{s r} w_s p_r z'_s z'_r``, with z' linear in the factor.
        """
        contract, batch = self.eqn.params["dimension_numbers"]
        if not moments.own.issuperset(contract[place]):
            return None
        other = self.factors[1 - place]
        other = other.astype(wide_dtype(other))
        shape = self.eqn.invars[place].aval.shape

        def product(x: jax.Array, y: jax.Array) -> jax.Array:
            factors = (x, y) if place == 0 else (y, x)
            numbers, precision = (self.eqn.params[n] for n in ("dimension_numbers", "precision"))
            return jax.lax.dot_general(*factors, numbers, precision)

        def transposed(y: jax.Array, z: jax.Array) -> jax.Array:
            x = jax.ShapeDtypeStruct(shape, y.dtype)
            return jax.linear_transpose(lambda x: product(x, y), x)(z.astype(y.dtype))[0]

        squares = jnp.sum(moments.square * transposed(jnp.square(other), self.w_of_squares))
        met = [{*contract[i], *batch[i]} for i in (0, 1)]
        free = [
            (i, axis) for i in (0, 1) for axis in range(self.factors[i].ndim) if axis not in met[i]
        ]
        in_product = self.axis - len(batch[0])
        if in_product < 0:
            return None
        side, axis = free[in_product]
        if side != place:
            # Of several free axes the others are scores with the same entries of x.
            if sum(i == side for i, _ in free) != 1:
                return None
            parts = [transposed(other, z) for z in (self.w, self.p)]
            return squares - 2 * jnp.sum(moments.square * parts[0] * parts[1])
        if moments.axis != axis or moments.rows is None:
            return None
        rows = moments.rows
        lengths = product(jnp.ones(shape, other.dtype), jnp.square(other))
        lengths = jax.lax.index_in_dim(lengths, 0, self.axis, keepdims=False)
        parts = [jnp.tensordot(z, rows, (self.axis, 0)) for z in (self.w, self.p)]
        return squares - 2 * jnp.sum(lengths * jnp.sum(parts[0] * parts[1], axis=-1))


Linear = Callable[[Any], tuple[Any, jax.Array] | None]


def softmax_at(
    found: Found, c: jax.Array, jaxpr: Any, made: dict[Any, tuple[Any, list[Any]]], linear: Linear
) -> Softmax:
    """Where the loss's derivative by the weights is ``c``.

    ``made`` gives the equation of a variable, and that one's inputs; ``linear(v)`` the variable
    that ``v`` is an elementwise linear function of, and the factors, or None.
    """
    axis, powers = found.axis, made[found.weights][1][0].astype(c.dtype)
    p = powers / jnp.sum(powers, axis, keepdims=True)
    w = p * (c - jnp.sum(p * c, axis, keepdims=True))
    product = _product_before(found.scores, axis, [w, p, w], jaxpr, made, linear)
    return Softmax(found.scores, axis, p, w, product)


def _product_before(
    z: Any,
    axis: int,
    parts: list[jax.Array],
    jaxpr: Any,
    made: dict[Any, tuple[Any, list[Any]]],
    linear: Linear,
) -> Product | None:
    """The one that z is linear in, if each entry of one is so in one of the other."""
    while (found := linear(z)) is not None:
        z, slope = found
        parts = [x * by for x, by in zip(parts, (slope, slope, jnp.square(slope)), strict=True)]
        eqn, ins = made.get(z, (None, []))
        if eqn is not None and eqn.primitive.name == "dot_general":
            return Product(eqn, ins, axis, *parts)
        if eqn is None or eqn.primitive.name not in MOVES_DATA or ins[0].size != z.aval.size:
            return None
        before = axis_before(eqn, axis)
        if before is None:
            return None
        axis = before
        shape = jax.ShapeDtypeStruct(ins[0].shape, parts[0].dtype)
        back = jax.linear_transpose(lambda x, eqn=eqn: apply(jaxpr, eqn, [x])[0], shape)
        parts = [back(x)[0] for x in parts]
        z = eqn.invars[0]
    return None
