"""Weights that are perturbed by ``t s V`` and, for each example, by signs s of its own.

V is one random array of signs for all examples. The signs s of an example are the outer product of
one sign vector for each of the weight's axes, so that they can be followed through reshapes and
moved to what the weight is multiplied with: of an activation h the product is

    h (W + t s V) = h W + t ((h * s_in) V) * s_out        (Flipout, Wen et al. 2018)

Where a dense layer has one row of outputs for each example, and the weight has no other use,
(h * s_in) V is replaced by |h|: with G the second derivative by the outputs,
trace(H) = |h|^2 trace(G) = E[(|h| s_out)^T G (|h| s_out)].
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lama_optax._checks import wide_dtype
from lama_optax._jaxpr.curvature.second_derivatives import Entry
from lama_optax._jaxpr.operations import Movement, Product, Scan
from lama_optax._jaxpr.weights.follow import Followed, Value, evaluate, formed

# Up to this size a weight is perturbed for each example itself where no rule applies.
_SMALL = 4096


class Signs(NamedTuple):
    """Signs that vary along some axes of a weight and are constant along the others."""

    origins: frozenset[int]  # axes of the leaf that the signs were drawn for
    axes: tuple[int, ...]  # axes of the weight as it is now
    values: jax.Array  # one dimension for each of `axes`

    def along(self, axes: Sequence[int], like: jax.Array) -> jax.Array:
        """The values along these axes of an array, whose dtype they get."""
        order = sorted(range(len(axes)), key=lambda i: axes[i])
        shape = [1] * like.ndim
        for i in order:
            shape[axes[i]] = self.values.shape[i]
        return jnp.transpose(self.values, order).reshape(shape).astype(like.dtype)


@dataclasses.dataclass
class Record:
    """What one evaluation finds out about the weights' uses.

    An evaluation on shapes alone fills ``uses`` and ``lost``. The evaluation that counts is given
    ``single``, which follows from them, and weights without the signs that were lost.
    """

    single: frozenset[int] = frozenset()  # the leaves that are used once, here or in a loop's turn
    entries: list[Entry] | None = None  # where perturbations enter, if someone wants to know
    uses: dict[int, int] = dataclasses.field(default_factory=dict)  # of each leaf
    # Of each leaf: the axes whose signs some use cannot carry, and that use.
    lost: dict[int, dict[int, str]] = dataclasses.field(default_factory=dict)

    def use(self, leaf: int, times: int = 1) -> None:
        """Counts a use."""
        self.uses[leaf] = self.uses.get(leaf, 0) + times

    def drop(self, leaf: int, signs: Signs, why: str) -> None:
        """Notes signs that a use cannot carry."""
        for axis in signs.origins:
            self.lost.setdefault(leaf, {}).setdefault(axis, why)


@dataclasses.dataclass(frozen=True, eq=False)
class Perturbed(Followed):
    """A weight ``value + scale * signs * probe``."""

    leaf: int  # number among the flattened parameters
    value: jax.Array
    probe: jax.Array  # shape and dtype of value
    scale: jax.Array  # t; a scalar, or shape=(depth, 1, ...) for stacked layers
    signs: tuple[Signs, ...]  # their axes are disjoint
    record: Record
    is_unit: bool = True  # whether the probe's entries are independent and +1 or -1
    in_loop: bool = False

    def formed(self, why: str) -> jax.Array:
        """The perturbed weight itself: without signs if it is large."""
        self.record.use(self.leaf)
        # A bias or a scale is no larger than the activation that it meets.
        is_vector = self.value.ndim == 0 or self.value.size == max(self.value.shape)
        perturbation = self.probe
        for signs in self.signs:
            if self.value.size > _SMALL and not is_vector:
                self.record.drop(self.leaf, signs, why)
            else:
                perturbation = perturbation * signs.along(signs.axes, self.value)
        square = jnp.ones(self.value.shape, wide_dtype(self.value)) if self.is_unit else None
        return self._perturb(self.value, perturbation, square)

    def multiplied(self, product: Product, activation: jax.Array, why: str) -> jax.Array | None:
        """``h W + t ((h * s_in) V) * s_out``, or ``h W + t |h| s_out``."""
        if self.scale.ndim:
            return None
        self.record.use(self.leaf)
        out = product.multiply(activation, self.value)
        h = activation
        if self.leaf in self.record.single:
            # What the weight meets depends on other weights alone. To let the perturbation follow
            # it would add products, and noise of mean 0, since the weights' signs are independent.
            h = jax.lax.stop_gradient(h)
        square = None
        if product.squares is not None and self.is_unit:
            square = product.squares(h)
        free = [signs for signs in self.signs if [*signs.axes] == [*product.to_output]]
        # The slices of a loop's weights share s_out, and are told apart by V.
        is_known = self.leaf in self.record.single and not self.in_loop
        if product.is_row and square is not None and free and out.ndim == 1 and is_known:
            along = free[0].along([0], out).astype(square.dtype)
            return self._perturb(out, (jnp.sqrt(square) * along).astype(out.dtype), square)
        after = []
        for signs in self.signs:
            if all(axis in product.to_activation for axis in signs.axes):
                h = h * signs.along([product.to_activation[axis] for axis in signs.axes], h)
            elif all(axis in product.to_output for axis in signs.axes):
                after.append(signs)
            else:
                self.record.drop(self.leaf, signs, why)
        perturbation = product.perturb(h, self.probe)
        for signs in after:
            to = [product.to_output[axis] for axis in signs.axes]
            perturbation = perturbation * signs.along(to, out)
        return self._perturb(out, perturbation, square)

    def _perturb(
        self, value: jax.Array, perturbation: jax.Array, square: jax.Array | None
    ) -> jax.Array:
        """``value + t perturbation``; ``square`` is the mean square of the perturbation."""
        moved = value + self.scale.astype(value.dtype) * perturbation
        if self.record.entries is not None and square is not None and not self.scale.ndim:
            square = jnp.broadcast_to(square, moved.shape)
            self.record.entries.append(Entry(self.leaf, value, moved, square))
        return moved

    def moved(
        self, movement: Movement, change: Callable[[jax.Array], jax.Array], why: str
    ) -> "Perturbed | None":
        """Follows the signs through permuted, merged, split and cut axes."""
        if self.scale.ndim and not movement.is_none:
            return None
        value = change(self.value)
        return dataclasses.replace(
            self,
            value=value,
            probe=change(self.probe),
            signs=tuple(self._moved_signs(movement, value.shape, why)),
        )

    def _moved_signs(self, movement: Movement, new: Sequence[int], why: str) -> Iterator[Signs]:
        old = self.value.shape
        cut = movement.window or [slice(None)] * len(old)
        place = {axes[0]: to[0] for axes, to in movement.runs if len(axes) == len(to) == 1}
        merged: dict[int, Signs] = {}
        for signs in self.signs:
            axes = [axis for axis in signs.axes if axis in place or old[axis] > 1]
            values = signs.values[tuple(cut[axis] for axis in signs.axes)]
            values = values.squeeze(tuple(i for i, a in enumerate(signs.axes) if a not in axes))
            runs = [i for i, (run, _) in enumerate(movement.runs) if set(axes) <= set(run)]
            if all(axis in place for axis in axes):
                yield Signs(signs.origins, tuple(place[axis] for axis in axes), values)
            elif runs:
                run, to = movement.runs[runs[0]]
                like = jnp.ones([old[axis] for axis in run], values.dtype)
                laid = Signs(signs.origins, tuple(axes), values).along(
                    [run.index(axis) for axis in axes], like
                )
                laid = jnp.broadcast_to(laid, like.shape).reshape([new[axis] for axis in to])
                before = merged.get(runs[0], Signs(frozenset(), tuple(to), jnp.ones_like(laid)))
                merged[runs[0]] = Signs(
                    before.origins | signs.origins, before.axes, before.values * laid
                )
            else:
                self.record.drop(self.leaf, signs, why)
        yield from merged.values()

    def scaled(self, change: Callable[[jax.Array], jax.Array]) -> "Perturbed | None":
        """A vector is formed instead: it is no larger than what it scales."""
        value = change(self.value)
        if self.value.size <= max(self.value.shape, default=1) or value.shape != self.value.shape:
            return None
        return dataclasses.replace(self, value=value, probe=change(self.probe), is_unit=False)

    def in_checkpoint(self) -> "Perturbed":
        """The same, whose entries are not those of the evaluation outside."""
        return dataclasses.replace(self, record=dataclasses.replace(self.record, entries=None))

    def scanned(self, scan: Scan, ins: Sequence[Value], why: str) -> list[jax.Array]:
        """Scans over slices of weights and of what else there is; a carry is formed."""
        stop = scan.num_consts + scan.num_carry
        consts, xs = ins[: scan.num_consts], ins[stop:]
        carry = [formed(x, why) for x in ins[scan.num_consts : stop]]
        for x in consts:
            if isinstance(x, Perturbed):
                self.record.use(x.leaf, times=2)

        def body(carry: list[jax.Array], slices: list[Any]) -> tuple[list[jax.Array], Any]:
            shared = [x._in_loop() if isinstance(x, Perturbed) else x for x in consts]
            rows = [
                x._row(part) if isinstance(x, Perturbed) else part
                for x, part in zip(xs, slices, strict=True)
            ]
            outs = evaluate(scan.jaxpr, [*shared, *carry, *rows])
            return outs[: scan.num_carry], outs[scan.num_carry :]

        slices = [x._slices() if isinstance(x, Perturbed) else x for x in xs]
        carry, ys = jax.lax.scan(body, carry, slices, **scan.settings)
        return [*carry, *ys]

    def _in_loop(self) -> "Perturbed":
        return dataclasses.replace(self.in_checkpoint(), in_loop=True)

    def _slices(self) -> Any:
        """What `jax.lax.scan` slices along the leading axis; None where that has nothing."""
        moved = [
            jnp.moveaxis(signs.values, signs.axes.index(0), 0) if 0 in signs.axes else None
            for signs in self.signs
        ]
        return self.value, self.probe, self.scale if self.scale.ndim else None, moved

    def _row(self, part: Any) -> "Perturbed":
        """One slice, rebuilt from one of `_slices`."""
        value, probe, scale, moved = part
        signs = tuple(
            Signs(
                signs.origins,
                tuple(axis - 1 for axis in signs.axes if axis != 0),
                signs.values if own is None else own,
            )
            for signs, own in zip(self.signs, moved, strict=True)
        )
        scale = self.scale if scale is None else scale.reshape(())
        changes = {"value": value, "probe": probe, "scale": scale, "signs": signs}
        return dataclasses.replace(self._in_loop(), **changes)
