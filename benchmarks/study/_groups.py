"""Layers by module for the candidate rules, in the order of `lama_optax.layer_names`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lama_optax import layer_names

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Groups:
    """Which layer every leaf of the parameters belongs to; static."""

    leaf_group: tuple[int, ...]
    sizes: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def count(self) -> int:
        """L, the number of layers."""
        return len(self.sizes)

    def sum(self, tree: PyTree) -> jax.Array:
        """Sums every layer's entries, shape (L,)."""
        totals: list[Any] = [0.0] * self.count
        for group, leaf in zip(self.leaf_group, jax.tree.leaves(tree), strict=True):
            totals[group] += jnp.sum(leaf)
        return jnp.stack(totals)

    def mean(self, tree: PyTree) -> jax.Array:
        """Averages every layer's entries, shape (L,)."""
        return self.sum(tree) / jnp.asarray(self.sizes, float)

    def spread(self, values: jax.Array, tree: PyTree) -> PyTree:
        """A tree like ``tree`` with every leaf its layer's entry of ``values``, a scalar."""
        treedef = jax.tree.structure(tree)
        return jax.tree.unflatten(treedef, [values[group] for group in self.leaf_group])


def group_layers(params: PyTree) -> Groups:
    """Leaves that share a parent are one layer."""
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    number: dict[Any, int] = {}
    leaf_group = []
    sizes: list[int] = []
    for path, leaf in paths:
        parent = path[:-1] if len(path) > 1 else path
        group = number.setdefault(parent, len(number))
        leaf_group.append(group)
        sizes += [0] * (group + 1 - len(sizes))
        sizes[group] += jnp.size(leaf)
    return Groups(tuple(leaf_group), tuple(sizes), layer_names(params))
