"""Which parameter belongs to which layer: from a leaf's path to a layer's number and name.

Every array of shape ``(L,)`` in this library is in the order of `layer_names`: layers stand
in the order in which their first leaf appears in the flattened parameters.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lama_optax._numbers import check_word, wide_dtype

PyTree = Any
#: ``"module"``, ``"leaf"``, a params-shaped tree (or prefix) of labels, or a function of
#: params that returns one.
LayerSpec = str | PyTree | Callable[[PyTree], PyTree]


class Layers(NamedTuple):
    """The partition of a parameter tree's leaves into L layers; static, made while tracing."""

    names: tuple[str, ...]  # length L, unique
    sizes: tuple[int, ...]  # length L, number of parameters
    leaf_layer: tuple[int, ...]  # the layer's number of each leaf, in the tree's order
    dtype: np.dtype  # of every (L,) array: float32, or float64 where a leaf is

    def sum(self, tree: PyTree) -> jax.Array:
        """Sums all entries of ``tree`` (shaped like the parameters) per layer, shape (L,).

        Leaf by leaf instead of one scatter: scatters refuse operands sharded over a mesh with
        explicit axis types, and sums of half-precision leaves are taken in `dtype`.
        """
        totals: list[Any] = [jnp.zeros((), self.dtype) for _ in self.names]
        for layer, leaf in zip(self.leaf_layer, jax.tree.leaves(tree), strict=True):
            totals[layer] += jnp.sum(leaf, dtype=self.dtype)
        return jnp.stack(totals) if totals else jnp.zeros((0,), self.dtype)

    def spread(self, values: jax.Array, tree: PyTree) -> PyTree:
        """Gives each leaf of ``tree`` its layer's entry of ``values`` (L,), as a scalar.

        The scalar has the dtype of the leaf's arithmetic, or is a boolean if ``values`` are.
        """
        leaves, treedef = jax.tree.flatten(tree)
        is_bool = values.dtype == jnp.bool_
        return jax.tree.unflatten(
            treedef,
            [
                values[layer].astype(values.dtype if is_bool else wide_dtype(leaf))
                for layer, leaf in zip(self.leaf_layer, leaves, strict=True)
            ],
        )

    def size_array(self) -> jax.Array:
        """The number of parameters of each layer, shape (L,), in `dtype`."""
        return jnp.asarray(self.sizes, self.dtype).reshape(len(self.sizes))


def check_layers(layers: LayerSpec) -> None:
    """Raises `ValueError` for a word that names no partition."""
    if isinstance(layers, str):
        check_word("layers", layers, ("module", "leaf"))


def resolve_layers(layers: LayerSpec, params: PyTree) -> Layers:
    """Assigns each leaf of ``params`` to a layer.

    Leaves hidden by `optax.masked` or `optax.partition` (`optax.MaskedNode`) are in no layer.

    Raises:
      ValueError: if a leaf is not real floating point, or if the labels do not fit ``params``.
    """
    check_layers(layers)
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    paths = [path for path, _ in paths_and_leaves]
    leaves = [leaf for _, leaf in paths_and_leaves]
    _check_floating(paths, leaves)

    paths = _open_boxes(paths)
    groups: Sequence[Hashable]
    if not leaves:  # also what `optax.tree.map_params` calls `init` with
        groups = group_names = []
    elif isinstance(layers, str):
        # A leaf at the root has no module: it is a layer of its own.
        groups = [path[:-1] if layers == "module" and len(path) > 1 else path for path in paths]
        group_names = [_name(path) for path in dict.fromkeys(groups)]
    else:
        groups = _labels(layers, params)
        group_names = [str(label) for label in dict.fromkeys(groups)]

    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    sizes = [0] * len(number)
    for group, leaf in zip(groups, leaves, strict=True):
        sizes[number[group]] += int(np.prod(jnp.shape(leaf)))
    is_double = any(wide_dtype(leaf) == jnp.float64 for leaf in leaves)
    return Layers(
        names=_unique(_drop_root(group_names)),
        sizes=tuple(sizes),
        leaf_layer=tuple(number[group] for group in groups),
        dtype=jnp.dtype(jnp.float64 if is_double else jnp.float32),
    )


def layer_names(params: PyTree, layers: LayerSpec = "module") -> tuple[str, ...]:
    """Names the L layers of ``params``, in the order of every ``(L,)`` array.

    Args:
      params: any pytree of floating-point arrays.
      layers: what one layer is: ``"module"`` (leaves that share a parent: a kernel and its
        bias; a leaf at the root is its own layer), ``"leaf"``, a tree of labels shaped like
        ``params`` or a prefix of it, or a function of ``params`` that returns one, as in
        `optax.partition`.

    Returns:
      L unique names: the path of the module, joined by ``/``, without a leading ``params``
      that all share; or the labels.

    Raises:
      ValueError: if ``layers`` is an unknown word or labels that do not fit ``params``, or if
        ``params`` holds a leaf that is not real floating point.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lama_optax
      >>> dense = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
      >>> lama_optax.layer_names({"params": {"Dense_0": dense, "Dense_1": dense}})
      ('Dense_0', 'Dense_1')
      >>> lama_optax.layer_names({"Dense_0": dense}, "leaf")
      ('Dense_0/bias', 'Dense_0/kernel')
    """
    return resolve_layers(layers, params).names


def is_masked(node: Any) -> bool:
    """Whether ``node`` is optax's stand-in for a subtree hidden from a transformation."""
    return isinstance(node, optax.MaskedNode)


def match_to_params(name: str, tree: PyTree, params: PyTree) -> list[Any]:
    """Broadcasts ``tree``, shaped like ``params`` or a prefix of it, to the leaves of ``params``.

    Raises:
      ValueError: naming the argument ``name``, if the two do not fit.
    """
    try:
        full = jax.tree.broadcast(tree, params, is_leaf=is_masked)
        matched = jax.tree.leaves(full, is_leaf=is_masked)
        slots = jax.tree.leaves(params, is_leaf=is_masked)
        pairs = list(zip(matched, slots, strict=True))
    except ValueError as error:
        raise ValueError(
            f"{name} must be shaped like params, or a prefix of it; got"
            f" {jax.tree.structure(tree)} for params {jax.tree.structure(params)}."
        ) from error
    return [label for label, slot in pairs if not is_masked(slot)]


def _labels(layers: LayerSpec, params: PyTree) -> Sequence[Hashable]:
    labels = layers(params) if callable(layers) else layers
    if isinstance(labels, str):
        raise ValueError(
            f"layers must return a tree of labels shaped like params; it returned {labels!r}."
        )
    matched = match_to_params("layers", labels, params)
    for label in matched:
        if not isinstance(label, str | int | np.integer):
            raise ValueError(f"layers must hold strings or integers as labels; got {label!r}.")
    return matched


def _check_floating(paths: Sequence[tuple[Any, ...]], leaves: Sequence[Any]) -> None:
    for path, leaf in zip(paths, leaves, strict=True):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            remedy = (
                "wrap the optimizer in optax.contrib.split_real_and_imaginary"
                if jnp.issubdtype(dtype, jnp.complexfloating)
                else "leave it out of params, or mask it with optax.masked"
            )
            raise ValueError(
                "params must hold real floating-point arrays; the leaf"
                f" params{jax.tree_util.keystr(path)} is {dtype}: {remedy}."
            )


def _open_boxes(paths: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Drops the last key where it only unwraps a box (`nnx.Variable`, `nn.Partitioned`).

    Such a box has one child, the attribute ``value``; it is no module.
    """
    parents = [path[:-1] for path in paths]
    box = jax.tree_util.GetAttrKey("value")
    return [
        path[:-1] if len(path) > 1 and path[-1] == box and parents.count(path[:-1]) == 1 else path
        for path in paths
    ]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "params"


def _drop_root(names: Sequence[str]) -> list[str]:
    """Drops the collection name of Flax variables, ``params/``, where every name has it."""
    if all(name.startswith("params/") for name in names):
        return [name.removeprefix("params/") for name in names]
    return list(names)


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """Numbers repeated names (``{"a/b": ...}`` beside ``{"a": {"b": ...}}``), the first kept."""
    taken: set[str] = set(names)
    seen: set[str] = set()
    unique = []
    for name in names:
        candidate, n = name, 1
        while candidate in seen or (n > 1 and candidate in taken):
            n += 1
            candidate = f"{name}#{n}"
        seen.add(candidate)
        unique.append(candidate)
    return tuple(unique)
