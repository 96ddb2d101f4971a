"""Weights whose derivative is read off where a product uses them, for `gauss_newton`.

With rows p of shape (r, k) and a weight of shape (k, o) the derivative by the weight is p^T delta,
delta of shape (r, o) the derivative by a move of the product's outputs. Where an example has few
rows, p and delta are much smaller than the weight.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lama_optax._jaxpr.operations import Movement, Product
from lama_optax._jaxpr.weights.follow import Followed


@dataclasses.dataclass
class Taps:
    """Moves of the outputs of products, and what one evaluation finds out about the weights."""

    moves: dict[int, jax.Array]  # of some leaves: shape=(r, o)
    rows: dict[int, jax.Array] = dataclasses.field(default_factory=dict)  # shape=(r, k)
    shapes: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)  # of the moves
    lost: dict[int, str] = dataclasses.field(default_factory=dict)  # other uses, second ones


@dataclasses.dataclass(frozen=True, eq=False)
class Tapped(Followed):
    """A weight that is to be used once, in a product."""

    leaf: int  # number among the flattened parameters
    value: jax.Array
    taps: Taps

    def formed(self, why: str) -> jax.Array:
        """The weight itself."""
        self.taps.lost.setdefault(self.leaf, why)
        return self.value

    def moved(
        self, movement: Movement, change: Callable[[jax.Array], jax.Array], why: str
    ) -> "Tapped":
        """The weight in another layout: the norm of its derivative is the same."""
        return dataclasses.replace(self, value=change(self.value))

    def multiplied(self, product: Product, activation: jax.Array, why: str) -> jax.Array | None:
        """The product's outputs, moved."""
        if product.rows is None:
            return None
        taps = self.taps
        if self.leaf in taps.shapes:
            taps.lost.setdefault(self.leaf, f"a second use, {why}")
        out, rows = product.multiply(activation, self.value), product.rows(activation)
        own = tuple(product.to_output.values())
        order = (*(axis for axis in range(out.ndim) if axis not in own), *own)
        laid = jnp.transpose(out, order)
        taps.shapes[self.leaf] = (rows.shape[0], laid.size // rows.shape[0])
        if self.leaf in taps.moves:
            taps.rows[self.leaf] = rows
            laid = laid + taps.moves[self.leaf].astype(out.dtype).reshape(laid.shape)
        return jnp.transpose(laid, sorted(range(out.ndim), key=order.__getitem__))
