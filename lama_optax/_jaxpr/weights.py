"""Evaluates a function whose weights are moved by ``t s V``, with signs s of each example's own.

V is one random array of signs for all examples. The signs s of an example are the outer product of
one sign vector for each of the weight's axes, so that they can be followed through reshapes and
moved to what the weight is multiplied with: of an activation h the product is

    h (W + t s V) = h W + t ((h * s_in) V) * s_out        (Flipout, Wen et al. 2018)

Where a dense layer has one row of outputs for each example, and the weight has no other use,
(h * s_in) V is replaced by |h|: with G the second derivative by the outputs,
trace(H) = |h|^2 trace(G) = E[(|h| s_out)^T G (|h| s_out)].

Every use of a weight without a rule here gets the moved weight as an array.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lama_optax._checks import wide_dtype
from lama_optax._jaxpr import operations
from lama_optax._jaxpr.interpret import apply, interpret, source
from lama_optax._jaxpr.operations import Product, Scan

# Up to this size a weight is moved for each example itself where no rule applies.
_SMALL = 4096


@dataclasses.dataclass(eq=False)
class Record:
    """What is known of the weights' uses, and what one evaluation finds out about them.

    An evaluation on shapes alone fills ``uses``, ``lost`` and ``rows``. The one that counts is
    given ``single``, which follows from them, and weights without the signs that were lost.
    """

    single: frozenset[int] = frozenset()  # the leaves that are used once, here or in a loop's turn
    # Of leaves of `rows`: what to add to the outputs times |h|, instead of signs.
    moves: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
    uses: dict[int, int] = dataclasses.field(default_factory=dict)  # of each leaf
    # Of each leaf: the axes whose signs some use cannot carry, and that use.
    lost: dict[int, dict[int, str]] = dataclasses.field(default_factory=dict)
    rows: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # outputs' shapes

    def use(self, leaf: int, times: int = 1) -> None:
        """Counts a use."""
        self.uses[leaf] = self.uses.get(leaf, 0) + times


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "probe", "scale", "signs"],
    meta_fields=["leaf", "record", "has_mean"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A weight ``value + scale * signs * probe`` on its way to where it is used."""

    leaf: int  # number among the flattened parameters
    value: jax.Array
    probe: jax.Array  # shape and dtype of value
    scale: jax.Array  # t; a scalar, or broadcasts to the weight
    signs: dict[int, jax.Array]  # of axes of the leaf; each broadcasts to the weight as it is now
    record: Record
    has_mean: bool = True  # whether |h| may stand for what the probe gives

    def formed(self, why: str) -> jax.Array:
        """The weight as an array, for the use that ``why`` describes: large ones lose signs."""
        self.record.use(self.leaf)
        # A bias or a scale is no larger than the activation that it meets.
        is_small = self.value.size <= max((_SMALL, *self.value.shape))
        moved = self.probe
        for axis, signs in self.signs.items():
            if is_small:
                moved = moved * signs.astype(moved.dtype)
            else:
                self._drop(axis, why)
        return self.value + self.scale.astype(moved.dtype) * moved

    def multiplied(self, product: Product, h: jax.Array, why: str) -> jax.Array | None:
        """``h W + t ((h * s_in) V) * s_out``, or ``h W + t |h| s_out``; None: it must be formed."""
        if self.scale.size > 1:
            return None
        self.record.use(self.leaf)
        out = product.multiply(h, self.value)
        if self.leaf in self.record.single:
            # What the weight meets depends on other weights alone. To let the move follow it would
            # add products, and noise of mean 0, since the weights' signs are independent.
            h = jax.lax.stop_gradient(h)
        length = None
        if product.is_row and self.has_mean:
            self.record.rows[self.leaf] = out.shape
            length = jnp.sqrt(jnp.sum(jnp.square(h.astype(wide_dtype(h))))).astype(out.dtype)
            if self.leaf in self.record.moves:
                # A move is 0: the length's own derivative, which h = 0 has none of, adds nothing.
                length = jax.lax.stop_gradient(length)
                return out + length * self.record.moves[self.leaf].astype(out.dtype)
        after = []
        for axis, signs in self.signs.items():
            if (own := _laid_out(signs, product.to_activation, h)) is not None:
                h = h * own
            elif (own := _laid_out(signs, product.to_output, out)) is not None:
                after.append(own)
            else:
                self._drop(axis, why)
        if length is None or self.leaf not in self.record.single:
            moved = product.perturb(h, self.probe)
        else:
            moved = jnp.broadcast_to(length, out.shape)
        moved = functools.reduce(jnp.multiply, after, moved)
        return out + self.scale.reshape(()).astype(out.dtype) * moved

    def moved(
        self, change: Callable[[jax.Array], jax.Array], move: Callable[[jax.Array], jax.Array]
    ) -> "Weight":
        """The weight after ``change``, which lays it out as ``move`` does what broadcasts to it."""
        return dataclasses.replace(
            self,
            value=change(self.value),
            probe=change(self.probe),
            scale=move(self.scale) if self.scale.ndim else self.scale,
            signs={axis: move(signs) for axis, signs in self.signs.items()},
        )

    def scaled(self, change: Callable[[jax.Array], jax.Array]) -> "Weight | None":
        """The weight with its entries multiplied by another array's; None: it must be formed."""
        value = change(self.value)
        # A vector is no larger than what it scales.
        if self.value.size <= max(self.value.shape, default=1) or value.shape != self.value.shape:
            return None
        return dataclasses.replace(self, value=value, probe=change(self.probe), has_mean=False)

    def slices(self) -> "Weight":
        """For `jax.lax.scan`: all arrays have the weight's leading axis."""
        depth = self.value.shape[0]

        def stacked(x: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x, (depth, *x.shape[1:]))

        # Slices share the signs of the other axes, and are told apart by V: no means of V.
        return dataclasses.replace(
            self,
            scale=stacked(self.scale),
            signs={axis: stacked(signs) for axis, signs in self.signs.items()},
            has_mean=False,
        )

    def _drop(self, axis: int, why: str) -> None:
        self.record.lost.setdefault(self.leaf, {}).setdefault(axis, why)


def _laid_out(signs: jax.Array, axes: dict[int, int], like: jax.Array) -> jax.Array | None:
    """Signs of a weight for an array whose axis ``axes[i]`` is the weight's i, or None."""
    own = [i for i, n in enumerate(signs.shape) if n > 1]
    if any(i not in axes for i in own):
        return None
    own.sort(key=axes.__getitem__)
    ones = [i for i in range(signs.ndim) if i not in own]
    sizes = {axes[i]: signs.shape[i] for i in own}
    shape = [sizes.get(i, 1) for i in range(like.ndim)]
    return jnp.transpose(signs, ones + own).reshape(shape).astype(like.dtype)


Value = jax.Array | Weight


def evaluate(closed: Any, args: Sequence[Value]) -> list[jax.Array]:
    """Evaluates a jaxpr some of whose inputs are weights; its outputs are arrays."""
    outs = interpret(closed, args, _equation)
    return [_formed(out, "the function returns it") for out in outs]


def _formed(x: Value, why: str) -> jax.Array:
    return x.formed(why) if isinstance(x, Weight) else x


def _equation(jaxpr: Any, eqn: Any, ins: Sequence[Value]) -> Sequence[Value]:
    weights = [i for i, x in enumerate(ins) if isinstance(x, Weight)]
    if any(operations.varies_already(eqn, x.value if isinstance(x, Weight) else x) for x in ins):
        return ins
    if not weights:
        return apply(jaxpr, eqn, ins)
    why = source(eqn)
    scan, checkpoint = operations.scan(eqn), operations.rematerialised(eqn)
    if checkpoint is not None:
        inner, rematerialise = checkpoint  # the user's `jax.checkpoint` stays in force
        return rematerialise(lambda: evaluate(inner, ins))()
    if scan is not None:
        return _scanned(scan, ins, why)
    if operations.is_plain(eqn):
        # Of two weights the smaller one is formed.
        place = max(weights, key=lambda i: eqn.invars[i].aval.size)
        ins = [x if i == place else _formed(x, why) for i, x in enumerate(ins)]
        out = _used(jaxpr, eqn, ins, place, why)
        if out is not None:
            return [out]
    return apply(jaxpr, eqn, [_formed(x, why) for x in ins])


def _used(jaxpr: Any, eqn: Any, ins: Sequence[Any], place: int, why: str) -> Value | None:
    """What the one output of an equation is that uses one weight, by the rule for it."""
    weight = ins[place]

    def change(x: jax.Array) -> jax.Array:
        return apply(jaxpr, eqn, [x if i == place else other for i, other in enumerate(ins)])[0]

    product, move = operations.product(eqn, place), operations.movement(eqn)
    if product is not None:
        return weight.multiplied(product, ins[1 - place], why)
    if move is not None:
        return weight.moved(change, move)
    return weight.scaled(change) if operations.scales(eqn, place) else None


def _scanned(scan: Scan, ins: Sequence[Value], why: str) -> list[jax.Array]:
    """Scans over slices of weights and of what else there is; a carry is formed."""
    stop = scan.num_consts + scan.num_carry
    consts, xs = ins[: scan.num_consts], ins[stop:]
    carry = [_formed(x, why) for x in ins[scan.num_consts : stop]]
    for x in consts:
        if isinstance(x, Weight):
            x.record.use(x.leaf, times=2)

    def body(carry: list[jax.Array], slices: list[Value]) -> tuple[list[jax.Array], Any]:
        outs = evaluate(scan.jaxpr, [*consts, *carry, *slices])
        return outs[: scan.num_carry], outs[scan.num_carry :]

    xs = [x.slices() if isinstance(x, Weight) else x for x in xs]
    carry, ys = jax.lax.scan(body, carry, xs, **scan.settings)
    return [*carry, *ys]
