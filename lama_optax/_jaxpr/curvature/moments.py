"""Second moments of a value's first derivative along a random direction of mean 0."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

MOVES_DATA = frozenset({"broadcast_in_dim", "reshape", "squeeze", "transpose"})
Runs = list[tuple[list[int], list[int]]]  # of axes: before and after


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["square", "rows"],
    meta_fields=["leaves", "own", "axis"],
)
@dataclasses.dataclass(frozen=True)
class Moments:
    """``E[e^2]`` of all entries e, and what is known of ``E[e f]`` of two."""

    square: jax.Array  # broadcasts to the value
    leaves: frozenset[int]  # whose perturbations it is made of; those of two are independent
    own: frozenset[int]  # axes: E[e f] = 0 of entries at different places along any of them
    axis: int | None = None  # along it E[e f] = rows[i] . rows[j] at places i and j, else alike
    rows: jax.Array | None = None  # shape (places along the axis, any)

    def scaled(self, slope: jax.Array) -> "Moments":
        """Of ``slope * x``."""
        return Moments(jnp.square(slope) * self.square, self.leaves, self.own)

    def copied(self, old: Sequence[int], new: Sequence[int]) -> "Moments":
        """Of copies along axes of length 1, or of a number; ``old`` and ``new`` are shapes."""
        old = old or [1] * len(new)
        axes = [i for i, (m, n) in enumerate(zip(old, new, strict=True)) if m != n]
        if not axes:
            return self
        own = self.own.difference(axes)
        if len(axes) > 1 or self.square.size > 1:
            return Moments(self.square, self.leaves, own)
        rows = jnp.full((new[axes[0]], 1), jnp.sqrt(self.square.reshape(())))
        return Moments(self.square, self.leaves, own, axes[0], rows)

    def laid_out(self, eqn: Any) -> "Moments":
        """Of what an equation of `MOVES_DATA` gives."""
        old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        order, before_copies = range(len(old)), list(new)
        if eqn.primitive.name == "transpose":
            order = eqn.params["permutation"]
        if eqn.primitive.name == "broadcast_in_dim":
            before_copies = [1] * len(new)
            for n, i in zip(old, eqn.params["broadcast_dimensions"], strict=True):
                before_copies[i] = n
        square = self.square
        if square.size > 1:
            square = jnp.transpose(jnp.broadcast_to(square, old), order).reshape(before_copies)
        else:
            square = square.reshape(())
        own, axis = set[int](), None
        for old_axes, new_axes in _axis_runs(eqn):
            if self.own.issuperset(i for i in old_axes if old[i] > 1):
                own.update(new_axes)
        if self.axis is not None:
            axis = _axis_after(eqn, self.axis)
        rows = None if axis is None else self.rows
        laid = Moments(square, self.leaves, frozenset(own), axis, rows)
        return laid.copied(before_copies, new)


def of_sum(parts: Sequence[Moments]) -> Moments | None:
    """Of a sum of values of one shape, or a difference, if they are independent."""
    leaves = frozenset[int]().union(*(part.leaves for part in parts))
    if len(leaves) < sum(len(part.leaves) for part in parts):
        return None
    axis = parts[0].axis
    rows = [part.rows for part in parts if part.rows is not None and part.axis == axis]
    alike = len(rows) == len(parts)
    return Moments(
        functools.reduce(jnp.add, [part.square for part in parts]),
        leaves,
        frozenset.intersection(*(part.own for part in parts)),
        axis if alike else None,
        jnp.concatenate(rows, axis=1) if alike else None,
    )


def axis_before(eqn: Any, axis: int) -> int | None:
    """Which axis becomes that one, and no more, in an equation of `MOVES_DATA`."""
    runs = [(new, old) for old, new in _axis_runs(eqn)]
    return _partner(runs, axis, eqn.outvars[0].aval.shape, eqn.invars[0].aval.shape)


def _axis_after(eqn: Any, axis: int) -> int | None:
    return _partner(_axis_runs(eqn), axis, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape)


def _partner(runs: Runs, axis: int, shape: Sequence[int], other: Sequence[int]) -> int | None:
    for axes, others in runs:
        long = [i for i in others if other[i] > 1]
        if [i for i in axes if shape[i] > 1] == [axis] and len(long) == 1:
            return long[0]
    return None


def _axis_runs(eqn: Any) -> Runs:
    if eqn.primitive.name == "transpose":
        return [([axis], [i]) for i, axis in enumerate(eqn.params["permutation"])]
    if eqn.primitive.name == "broadcast_in_dim":
        return [([axis], [int(i)]) for axis, i in enumerate(eqn.params["broadcast_dimensions"])]
    return segments(eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape)


def segments(old: Sequence[int], new: Sequence[int]) -> Runs:
    """Splits two shapes of equal size into the shortest runs of axes of equal size."""
    runs = []
    i = j = 0
    while i < len(old) or j < len(new):
        old_axes: list[int] = []
        new_axes: list[int] = []
        m = n = 1
        while True:
            if i < len(old) and (m < n or not old_axes):
                m, i = m * old[i], i + 1
                old_axes.append(i - 1)
            elif j < len(new) and (n < m or not new_axes):
                n, j = n * new[j], j + 1
                new_axes.append(j - 1)
            if m == n and (old_axes or i == len(old)) and (new_axes or j == len(new)):
                break
        runs.append((old_axes, new_axes))
    return runs
