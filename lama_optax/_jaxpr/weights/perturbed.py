"""A weight that is perturbed by ``t s V``: a scale, a sign for each example, one shared probe.

The signs s of an example are the outer product of one sign vector for each of the weight's axes, so
that they can be followed through reshapes and moved to what the weight is multiplied with.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lama_optax._checks import wide_dtype
from lama_optax._jaxpr.curvature.moments import Moments

# Up to this size a weight is perturbed for each example itself where no rule applies.
_SMALL = 4096


class Signs(NamedTuple):
    """Signs that vary along some axes of a weight and are constant along the others."""

    origins: frozenset[int]  # axes of the leaf that the signs were drawn for
    axes: tuple[int, ...]  # axes of the weight as it is now
    values: jax.Array  # one dimension for each of `axes`


class Entry(NamedTuple):
    """Where a perturbation enters a value: ``after = before + t perturbation``."""

    before: Any
    after: Any
    moments: Any  # `Moments` of the perturbation, over signs and probes


class Uses:
    """Counts the uses of the leaves that are taken to have one; fresh for each evaluation."""

    def __init__(self, single: frozenset[int], in_loop: bool = False):
        """``single``: numbers of the leaves that may be used once, here or in a loop's turn."""
        self.single, self.in_loop = single, in_loop
        self.entries: list[Entry] = []  # those outside of loops
        self._seen: set[int] = set()

    def add(self, leaf: int, repeated: bool = False) -> None:
        """Raises `UsedAgain` at the second use of a leaf in ``single``, or a repeated one."""
        if leaf in self.single and (repeated or leaf in self._seen):
            raise UsedAgain(leaf)
        self._seen.add(leaf)


class Taps(Uses):
    """Adds a move to the outputs of products that use a leaf, and keeps the rows it is met by.

    With rows p of shape (r, k) and a weight of shape (k, o) the derivative by the weight is
    p^T delta, delta of shape (r, o) the derivative by the move. Any other use raises `UsedAgain`.
    """

    def __init__(self, moves: dict[int, jax.Array]):
        """``moves``, each of shape (r, o); a leaf without one is only recorded."""
        super().__init__(frozenset())
        self._moves = moves
        self.rows: dict[int, jax.Array] = {}  # of each leaf: shape=(r, k)
        self.shapes: dict[int, tuple[int, int]] = {}  # of each leaf's move

    def add(self, leaf: int, repeated: bool = False) -> None:
        """A use that is no product."""
        del repeated
        raise UsedAgain(leaf)

    def tap(self, leaf: int, rows: jax.Array, out: jax.Array) -> jax.Array:
        """Moves the outputs, shape (r, o), of a product."""
        if leaf in self.rows:
            raise UsedAgain(leaf)
        self.rows[leaf], self.shapes[leaf] = rows, (out.shape[0], out.shape[1])
        return out + self._moves[leaf].astype(out.dtype) if leaf in self._moves else out


class Perturbed(NamedTuple):
    """A weight ``value + scale * signs * probe``."""

    leaf: int  # number among the flattened parameters
    value: jax.Array
    probe: jax.Array  # shape and dtype of value
    scale: jax.Array  # t; a scalar, or shape=(depth, 1, ...) for stacked layers
    signs: tuple[Signs, ...]  # their axes are disjoint
    uses: Uses

    def move(self, value: jax.Array, perturbation: jax.Array, moments: Moments | None) -> jax.Array:
        """``value + t perturbation``, where a value is moved by this weight's perturbation."""
        scale = self.scale.astype(value.dtype)
        if self.uses.in_loop:  # where `jax.grad` forgets that `shifted` has a rule of its own
            return value + scale * perturbation
        moved = shifted(value, scale, perturbation)
        if moments is not None and not scale.ndim:
            self.uses.entries.append(Entry(value, moved, moments))
        return moved

    @property
    def is_single(self) -> bool:
        """Whether this is its leaf's only use.

        What the weight meets then depends on other weights alone. To let the perturbation follow
        it would add products, and noise of mean 0, since the weights' signs are independent.
        """
        return self.leaf in self.uses.single


class UsedAgain(Exception):
    """A leaf that was taken to have one use has more."""

    def __init__(self, leaf: int):
        """Names the leaf."""
        self.leaf = leaf
        super().__init__(leaf)


class DropSigns(Exception):
    """A use cannot carry the signs that were drawn for some axes of a leaf."""

    def __init__(self, weight: Perturbed, signs: Sequence[Signs]):
        """Names the leaf and the axes of it whose signs must go."""
        self.leaf = weight.leaf
        self.origins = frozenset[int]().union(*(group.origins for group in signs))
        super().__init__(self.leaf, self.origins)


Value = jax.Array | Perturbed


@jax.custom_jvp
def shifted(value: jax.Array, scale: jax.Array, perturbation: jax.Array) -> jax.Array:
    """``value + t perturbation`` at the point t = 0.

    Its derivatives are those of the sum; its value does not read the perturbation, which XLA would
    multiply by 0 wherever the value is read. So all layers' second derivatives have one and the
    same unperturbed forward pass, which is compiled once.
    """
    del scale, perturbation
    return value


@functools.partial(shifted.defjvp, symbolic_zeros=True)
def _shifted_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    _, scale, perturbation = primals
    value_dot, scale_dot, perturbation_dot = tangents
    terms = [
        a * b
        for a, b in ((scale_dot, perturbation), (scale, perturbation_dot))
        if not (_is_zero(a) or _is_zero(b))
    ]
    if not _is_zero(value_dot):
        terms.append(value_dot)
    # Once more `shifted`, for a derivative of this derivative. Without terms, `value_dot` is the
    # symbolic zero of the right shape.
    return shifted(*primals), functools.reduce(jnp.add, terms) if terms else value_dot


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def formed(x: Value) -> jax.Array:
    """The perturbed weight itself."""
    if not isinstance(x, Perturbed):
        return x
    x.uses.add(x.leaf)
    # A bias or a scale is no larger than the activation that it meets.
    is_vector = x.value.ndim == 0 or x.value.size == max(x.value.shape)
    if x.signs and x.value.size > _SMALL and not is_vector:
        raise DropSigns(x, x.signs)
    perturbation = x.probe
    for group in x.signs:
        values = along(group.values, group.axes, x.value.ndim)
        perturbation = perturbation * values.astype(perturbation.dtype)
    own = frozenset(range(x.value.ndim))
    moments = Moments(jnp.ones((), wide_dtype(x.value)), frozenset({x.leaf}), own)
    return x.move(x.value, perturbation, moments)


def along(values: jax.Array, axes: Sequence[int], ndim: int) -> jax.Array:
    """Lays the dimensions of ``values`` along ``axes`` of an array of ``ndim`` dimensions."""
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    shape = [1] * ndim
    for i in order:
        shape[axes[i]] = values.shape[i]
    return jnp.transpose(values, order).reshape(shape)
