"""The loss of one example at weights that carry signs of its own, as a function of their scale."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lama_optax._jaxpr.interpret import names_in
from lama_optax._jaxpr.weights import Record, Weight, evaluate
from lama_optax.curvature.examples import trace_checked
from lama_optax.curvature.probes import along_examples
from lama_optax.curvature.protocol import (
    check_batch,
    check_visible,
    of_each_device,
    scalar_objective,
)
from lama_optax.layers import Layers

PyTree = Any


class SignedLoss:
    """The loss of one example at perturbed params, as a function of the layers' scales t."""

    def __init__(
        self,
        example_value_fn: Callable[[PyTree, PyTree], jax.Array] | None,
        params: PyTree,
        batch: PyTree,
        layers: Layers,
    ):
        """Traces the loss once and finds, on shapes alone, which signs each weight can carry."""
        if example_value_fn is None or batch is None:
            raise ValueError(
                "example_value_fn and batch are needed by flipout: tx.update(grads, state, params,"
                " example_value_fn=lambda p, example: loss of one example, batch=batch), where the"
                " arrays of batch have the examples along their leading axis. Flax's own TrainState"
                " passes none on: take lama_optax.flax.TrainState."
            )
        check_batch(batch)
        check_visible("example_value_fn", params)

        def value(p: PyTree, example: PyTree) -> jax.Array:
            objective = scalar_objective(
                lambda p: example_value_fn(p, example), p, has_aux=False, name="example_value_fn"
            )
            return objective(p).astype(layers.dtype)

        self._value = value
        self.layers = layers
        self.closed = trace_checked("example_value_fn", value, params, batch)
        self.primitives = names_in(self.closed)
        self.unknown: str | None = None  # what kept block scope from its fast path
        paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(params)
        self._names = [jax.tree_util.keystr(path) for path, _ in paths_and_leaves]
        self._shapes = [leaf.shape for _, leaf in paths_and_leaves]
        self._signed = [tuple(range(len(shape))) for shape in self._shapes]
        self._single = frozenset[int]()
        found = Record()

        def find(params: PyTree, batch: PyTree) -> jax.Array:
            def one(own: jax.Array, example: PyTree) -> jax.Array:
                t = self.zeros(params, example)
                return self(t, params, params, own, example, found)

            own = example_signs(jax.random.key(0), batch, self.num_signs)
            return jax.vmap(one)(own, batch)

        jax.eval_shape(find, params, batch)
        self.lost = [found.lost.get(i, {}) for i in range(len(self._shapes))]
        self._signed = [
            tuple(axis for axis in axes if axis not in lost)
            for axes, lost in zip(self._signed, self.lost, strict=True)
        ]
        self._single = frozenset(leaf for leaf, count in found.uses.items() if count == 1)

    def mean(self, batch: PyTree) -> Callable[[PyTree], jax.Array]:
        """The mean loss of the examples as a function of params."""
        return lambda p: jnp.mean(jax.vmap(self._value, (None, 0))(p, batch))

    @property
    def independent(self) -> list[bool]:
        """Of each layer: whether an example's sample is independent of the others'.

        Given the shared probe it is unbiased on its own where no leaf lost the signs of an axis.
        """
        return [not any(self.lost_signs(layer)) for layer in range(len(self.layers.names))]

    def lost_signs(self, layer: int) -> list[str]:
        """The axes of a layer's leaves along which examples share their signs, and why."""
        return [
            f"{name}, axis {axis}: {why}"
            for name, first, depth, lost in zip(
                self._names, self.layers.leaf_layer, self.layers.leaf_depth, self.lost, strict=True
            )
            if first <= layer < first + (depth or 1)
            for axis, why in sorted(lost.items())
        ]

    def zeros(self, params: PyTree, example: PyTree) -> jax.Array:
        """The point t at which the loss is differentiated, shape (L,)."""
        zeros = jnp.zeros(len(self.layers.names), self.layers.dtype)
        return of_each_device(zeros, (params, example, self.closed.consts))

    @property
    def num_signs(self) -> int:
        """How many signs one example needs: one for each place along each axis that has any."""
        return sum(self._lengths())

    def _lengths(self) -> Iterator[int]:
        for shape, axes in zip(self._shapes, self._signed, strict=True):
            # A scalar has no axis, but a sign.
            yield from (shape[axis] for axis in axes) if shape else (1,)

    def __call__(
        self,
        t: Any,
        params: PyTree,
        probe: PyTree,
        own: jax.Array,
        example: PyTree,
        record: Record | None = None,
    ) -> jax.Array:
        """The loss where layer l's weights are moved by ``t[l]``.

        ``own``, of shape (num_signs,), are the example's signs.
        """
        record = record or Record(self._single)
        like = (params, example, self.closed.consts)
        leaves, probes = (jax.tree.leaves(of_each_device(tree, like)) for tree in (params, probe))
        scales = jax.tree.leaves(self.layers.spread(t, params))
        signs = iter(jnp.split(own, list(itertools.accumulate(self._lengths()))))
        weights = []
        for i, (leaf, v, scale, axes) in enumerate(
            zip(leaves, probes, scales, self._signed, strict=True)
        ):
            own_signs = {}
            for axis in axes if leaf.ndim else (0,):
                shape = [n if j == axis else 1 for j, n in enumerate(leaf.shape)]
                own_signs[axis] = next(signs).reshape(shape).astype(leaf.dtype)
            has_mean = len(own_signs) >= leaf.ndim  # no signs were lost
            weights.append(Weight(i, leaf, v, scale, own_signs, record, has_mean))
        (value,) = evaluate(self.closed, [*weights, *jax.tree.leaves(example)])
        return value


def example_signs(key: jax.Array, batch: PyTree, num_signs: int) -> jax.Array:
    """Rademacher numbers as `signs` draws them, shape (batch_size, num_signs), int8.

    They are unpacked in a loop, which XLA does not fuse: else each use of a sign would do it anew.
    """
    batch_size = check_batch(batch)
    words = jax.random.bits(key, (batch_size, -(-num_signs // 32)), jnp.uint32)

    def unpacked(place: jax.Array) -> jax.Array:
        return 1 - 2 * (jnp.right_shift(words, place) & 1).astype(jnp.int8)

    bits = jax.lax.map(unpacked, jnp.arange(32, dtype=words.dtype))
    own = jnp.moveaxis(bits, 0, 1).reshape(batch_size, -1)[:, :num_signs]
    return along_examples(own, batch)
