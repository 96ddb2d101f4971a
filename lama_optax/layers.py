"""Which parameter belongs to which layer: from a leaf's path to a layer's number and name.

Every array of shape ``(L,)`` in this library is in the order of `layer_names`: layers stand
in the order in which their first leaf appears in the flattened parameters.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lama_optax._checks import check_floating, check_word, wide_dtype

PyTree = Any
#: ``"module"``, ``"leaf"``, a params-shaped tree (or prefix) of labels, a function of params that
#: returns one, or `stacked`.
LayerSpec = str | PyTree | Callable[[PyTree], PyTree]


@dataclasses.dataclass(frozen=True)
class Layers:
    """The partition of a parameter tree's leaves into L layers: static, hashable, no pytree."""

    names: tuple[str, ...]  #: length L, unique
    sizes: tuple[int, ...]  #: length L, number of parameters
    leaf_layer: tuple[int, ...]  #: of each leaf, in the tree's order: number of its (first) layer
    leaf_depth: tuple[int | None, ...]  #: of each leaf: layers along its leading axis, None: one
    dtype: np.dtype  #: of every (L,) array: float32, or float64 where a leaf is

    def sum(self, tree: PyTree) -> jax.Array:
        """Sums all entries of ``tree`` (shaped like the parameters) per layer, shape (L,)."""
        # Leaf by leaf: a scatter refuses what is sharded over a mesh with explicit axes.
        totals: dict[int, jax.Array] = {}
        for layer, depth, leaf in zip(
            self.leaf_layer, self.leaf_depth, jax.tree.leaves(tree), strict=True
        ):
            axes = None if depth is None else tuple(range(1, leaf.ndim))
            total = jnp.atleast_1d(jnp.sum(leaf, axis=axes, dtype=self.dtype))
            totals[layer] = totals[layer] + total if layer in totals else total
        parts = [totals[layer] for layer in sorted(totals)]
        return jnp.concatenate(parts) if parts else jnp.zeros((0,), self.dtype)

    def spread(self, values: Sequence[jax.Array] | jax.Array, tree: PyTree) -> PyTree:
        """Gives each leaf of ``tree`` its layer's entry of ``values`` (L,), as a scalar.

        A leaf of several layers gets an array of shape (depth, 1, ...). The dtype is that of the
        leaf's arithmetic; booleans stay so.
        """
        leaves, treedef = jax.tree.flatten(tree)

        def entry(layer: int, depth: int | None, leaf: jax.Array) -> jax.Array:
            own = jnp.asarray(values[layer])
            if depth is not None:
                own = jnp.asarray(values[layer : layer + depth])
                own = own.reshape(depth, *[1] * (leaf.ndim - 1))
            return own if own.dtype == jnp.bool_ else own.astype(wide_dtype(leaf))

        entries = map(entry, self.leaf_layer, self.leaf_depth, leaves)
        return jax.tree.unflatten(treedef, list(entries))

    def average(self, traces: jax.Array) -> jax.Array:
        """Eq. (8): ``H_l = trace_l / N_l``, shape (L,); 0 for a layer without parameters."""
        return traces / jnp.maximum(self.size_array(), 1)

    def size_array(self) -> jax.Array:
        """The number of parameters of each layer, shape (L,), in `dtype`."""
        return jnp.asarray(self.sizes, self.dtype).reshape(len(self.sizes))


class _Stacked(NamedTuple):
    """Settings of `stacked`."""

    modules: tuple[str, ...]
    layers: LayerSpec


def stacked(*modules: str, layers: LayerSpec = "module") -> _Stacked:
    """Counts parameters that a scan stacked along their leading axis as one layer a slice.

    Args:
      *modules: names in a leaf's path, such as ``"blocks"``; every leaf below one of them has
        the depth as its leading axis (`flax.linen.scan`, `flax.nnx.vmap`, `jax.lax.scan`).
      layers: what one layer is apart from that, see `layer_names`.

    Returns:
      A value for every ``layers`` argument of this library.

    Raises:
      ValueError: if ``modules`` is empty or holds something else than strings.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lama_optax import layer_names, stacked
      >>> dense = {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}
      >>> layer_names({"blocks": dense, "head": {"kernel": jnp.ones((3, 1))}}, stacked("blocks"))
      ('blocks[0]', 'blocks[1]', 'head')
    """
    if not modules or not all(isinstance(module, str) for module in modules):
        raise ValueError(f"modules must be one or more names, such as 'blocks'; got {modules!r}.")
    check_layers(layers)
    return _Stacked(modules, layers)


def check_layers(layers: LayerSpec) -> None:
    """Raises `ValueError` for a word that names no partition."""
    if isinstance(layers, str):
        check_word("layers", layers, ("module", "leaf"))


def resolve_layers(layers: LayerSpec, params: PyTree) -> Layers:
    """Assigns each leaf of ``params`` to a layer; those hidden by optax (`MaskedNode`) to none."""
    paths_and_leaves = jax.tree.leaves_with_path(params)
    leaves = [leaf for _, leaf in paths_and_leaves]
    check_floating(paths_and_leaves)
    modules, layers = layers if isinstance(layers, _Stacked) else ((), layers)
    check_layers(layers)
    groups: Sequence[Hashable] = []
    if isinstance(layers, str):
        # A leaf at the root has no module: it is a layer of its own.
        paths = _open_boxes([path for path, _ in paths_and_leaves])
        groups = [path[:-1] if layers == "module" and len(path) > 1 else path for path in paths]
        titles = [_name(path) for path in groups]
        if all(title.startswith("params/") for title in titles):  # a collection of Flax
            titles = [title.removeprefix("params/") for title in titles]
    else:
        # `optax.tree.map_params` calls `init` without leaves.
        groups = _labels(layers, params) if leaves else []
        titles = [str(label) for label in groups]

    depths = [_depth(path, leaf, modules) for path, leaf in paths_and_leaves]
    if leaves and modules and not any(depth is not None for depth in depths):
        raise ValueError(f"layers=stacked{modules} names no module of params.")
    names: list[str] = []
    sizes: list[int] = []
    first: dict[Hashable, tuple[int, int | None]] = {}  # a group's first layer and its depth
    for (path, leaf), group, title, depth in zip(
        paths_and_leaves, groups, titles, depths, strict=True
    ):
        if group not in first:
            first[group] = len(names), depth
            names += [title] if depth is None else [f"{title}[{i}]" for i in range(depth)]
            sizes += [0] * (len(names) - len(sizes))
        start, expected = first[group]
        if depth != expected:
            raise ValueError(
                "layers=stacked(...): leaves of one layer must have the same leading axis; the leaf"
                f" params{jax.tree_util.keystr(path)} has {depth}, another {expected}."
            )
        for layer in range(start, start + (1 if depth is None else depth)):
            sizes[layer] += math.prod(jnp.shape(leaf)[depth is not None :])
    is_double = any(wide_dtype(leaf) == jnp.float64 for leaf in leaves)
    return Layers(
        names=unique_names(names),
        sizes=tuple(sizes),
        leaf_layer=tuple(first[group][0] for group in groups),
        leaf_depth=tuple(depths),
        dtype=jnp.dtype(jnp.float64 if is_double else jnp.float32),
    )


def layer_names(params: PyTree, layers: LayerSpec = "module") -> tuple[str, ...]:
    """Names the L layers of ``params``, in the order of every ``(L,)`` array.

    Args:
      params: any pytree of floating-point arrays.
      layers: what one layer is: ``"module"`` (leaves that share a parent: a kernel and its
        bias; a leaf at the root is its own layer), ``"leaf"``, a tree of labels shaped like
        ``params`` or a prefix of it, a function of ``params`` that returns one, as in
        `optax.partition`, or `stacked`, for parameters stacked by a scan. To
        `optax.inject_hyperparams` say ``static_args="layers"`` of a function.

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
    """The entry of ``tree``, shaped like ``params`` or a prefix of it, for each leaf of these."""
    slots = jax.tree.leaves_with_path(params, is_leaf=is_masked)
    hidden = {path for path, slot in slots if is_masked(slot)}
    try:
        # What optax hid of params is hidden in the tree too, whole subtrees of it.
        visible = jax.tree_util.tree_map_with_path(
            lambda path, entry: optax.MaskedNode() if path in hidden else entry,
            tree,
            is_leaf=lambda path, _: path in hidden,
            is_leaf_takes_path=True,
        )
        return jax.tree.leaves(jax.tree.broadcast(visible, params))
    except ValueError as error:
        raise ValueError(
            f"{name} must be shaped like params, or a prefix of it; got"
            f" {jax.tree.structure(tree)} for params {jax.tree.structure(params)}."
        ) from error


def check_structure(name: str, tree: PyTree, expected: PyTree) -> None:
    """Raises `ValueError` unless ``tree`` has the structure and the shapes of ``expected``."""

    def described(tree: PyTree) -> tuple[Any, list[tuple[int, ...]]]:
        return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]

    if described(tree) == described(expected):
        return
    if tree is None:
        raise ValueError(f"{name} is missing: call tx.update(grads, state, params, value_fn=...).")
    raise ValueError(
        f"{name} must have the structure and the shapes that `init` saw, {described(expected)};"
        f" got {described(tree)}. Call tx.init(params) again when the model changes."
    )


def _labels(layers: LayerSpec, params: PyTree) -> Sequence[Hashable]:
    labels = layers(params) if callable(layers) else layers
    if isinstance(labels, str | int | np.integer | jax.Array):
        raise ValueError(
            f"layers must return a tree of labels shaped like params; it returned {labels!r}."
            " optax.inject_hyperparams calls functions as schedules: let it be static,"
            " optax.inject_hyperparams(lama_adam, static_args='layers')(..., layers=function)."
        )
    matched = match_to_params("layers", labels, params)
    wrong = [label for label in matched if not isinstance(label, str | int | np.integer)]
    if wrong:
        raise ValueError(f"layers must hold strings or integers as labels; got {wrong[0]!r}.")
    return matched


def _open_boxes(paths: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Drops the last key, ``value``, where it unwraps a box (`nnx.Variable`, `nn.Partitioned`)."""
    siblings = collections.Counter(path[:-1] for path in paths)
    box = jax.tree_util.GetAttrKey("value")
    return [
        path[:-1] if len(path) > 1 and path[-1] == box and siblings[path[:-1]] == 1 else path
        for path in paths
    ]


def _depth(path: tuple[Any, ...], leaf: Any, stacked_modules: Sequence[str]) -> int | None:
    """The length of the leading axis where ``path`` runs through a stacked module."""
    if not any(_name((key,)) in stacked_modules for key in path):
        return None
    if jnp.ndim(leaf) == 0:
        raise ValueError(
            f"layers=stacked(...): the leaf params{jax.tree_util.keystr(path)} is a scalar; a"
            " stacked leaf has the depth as its leading axis."
        )
    return int(jnp.shape(leaf)[0])


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "params"


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """Numbers repeated names (``{"a/b": ...}`` beside ``{"a": {"b": ...}}``), the first kept."""
    taken, unique = set(names), dict[str, None]()
    for name in names:
        candidate, n = name, 1
        while candidate in unique or (n > 1 and candidate in taken):
            n += 1
            candidate = f"{name}#{n}"
        unique[candidate] = None
    return tuple(unique)
