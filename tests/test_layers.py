"""From a leaf's path to its layer: names, numbers, sizes, and the sums over them."""

import collections
import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lama_optax import layer_names
from lama_optax.layers import resolve_layers


def ones(*shape):
    return np.ones(shape, np.float32)


def dense(inputs, outputs):
    return {"kernel": ones(inputs, outputs), "bias": ones(outputs)}


MLP = {"Dense_0": dense(2, 3), "Dense_1": dense(3, 1)}


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    scale: Any
    inner: Any


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.relu(nn.Dense(3)(x)))


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(2, 3, rngs=rngs)
        self.out = nnx.Linear(3, 1, rngs=rngs)
        self.temperature = nnx.Param(jnp.ones(()))


# -- names -----------------------------------------------------------------------------------


@pytest.mark.standard_promotion
@pytest.mark.parametrize("collection", [False, True], ids=["params", "variables"])
@pytest.mark.parametrize("frozen", [False, True], ids=["dict", "FrozenDict"])
def test_linen_names_are_those_of_its_modules(collection, frozen):
    variables = jax.eval_shape(LinenMLP().init, jax.random.key(0), ones(1, 2))
    params = variables if collection else variables["params"]
    params = flax.core.freeze(params) if frozen else params
    assert layer_names(params) == ("Dense_0", "Dense_1")
    assert layer_names(params, "leaf") == (
        "Dense_0/bias",
        "Dense_0/kernel",
        "Dense_1/bias",
        "Dense_1/kernel",
    )


@pytest.mark.standard_promotion
def test_a_single_linen_module_is_one_layer():
    variables = jax.eval_shape(nn.Dense(3).init, jax.random.key(0), ones(1, 2))
    assert layer_names(variables) == ("params",)
    # Without the collection each leaf stands at the root and is a layer of its own.
    assert layer_names(variables["params"]) == ("bias", "kernel")


@pytest.mark.standard_promotion
def test_linen_boxes_are_no_modules():
    """`nn.Partitioned` wraps each array; the kernel and its bias are still one layer."""
    boxed = {
        name: {leaf: nn.Partitioned(x, names=(None,) * x.ndim) for leaf, x in module.items()}
        for name, module in MLP.items()
    }
    assert layer_names({"params": boxed}) == ("Dense_0", "Dense_1")
    assert layer_names(boxed, "leaf") == layer_names(MLP, "leaf")


@pytest.mark.standard_promotion
def test_nnx_state():
    state = nnx.state(NnxMLP(nnx.Rngs(0)), nnx.Param)
    assert layer_names(state) == ("hidden", "out", "temperature")
    assert resolve_layers("module", state).sizes == (9, 4, 1)
    assert layer_names(state, "leaf") == (
        "hidden/bias",
        "hidden/kernel",
        "out/bias",
        "out/kernel",
        "temperature",
    )


@pytest.mark.standard_promotion
def test_equinox_module():
    model = eqx.nn.MLP(2, 1, width_size=3, depth=1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    assert layer_names(params) == ("layers/0", "layers/1")
    assert resolve_layers("module", params).sizes == (9, 4)
    assert layer_names(params, "leaf")[0] == "layers/0/weight"


@pytest.mark.parametrize(
    ("params", "names", "sizes"),
    [
        (ones(2, 3), ("params",), (6,)),
        (ones(), ("params",), (1,)),
        (None, (), ()),
        ({}, (), ()),
        ({"a": {}, "b": [], "c": None}, (), ()),
        ({"a": {}, "b": {"w": ones(2)}, "c": None}, ("b",), (2,)),
        ({"w": ones(2), "b": ones(3)}, ("b", "w"), (3, 2)),
        ([ones(2), ones(3)], ("0", "1"), (2, 3)),
        ([dense(2, 3), dense(3, 1)], ("0", "1"), (9, 4)),
        ((ones(2), {"w": ones(3), "b": ones(1)}), ("0", "1"), (2, 4)),
        (Pair(dense(2, 3), ones(5)), ("left", "right"), (9, 5)),
        (Block(ones(2), {"x": dense(2, 2)}), ("scale", "inner/x"), (2, 6)),
        (Block(None, Pair(ones(2), ones(3))), ("inner",), (5,)),
        (collections.OrderedDict(z=dense(1, 1), a=dense(2, 2)), ("z", "a"), (2, 6)),
        # A module's own leaf and its submodule are two layers.
        ({"m": {"w": ones(2), "sub": dense(2, 3)}}, ("m/sub", "m"), (9, 2)),
        # Only the first "params" goes, and only where all leaves are below it.
        ({"params": {"params": dense(1, 1)}}, ("params",), (2,)),
        ({"params": dense(1, 1), "other": dense(1, 1)}, ("other", "params"), (2, 2)),
        ({"params": {"x": dense(1, 1)}, "y": dense(1, 1)}, ("params/x", "y"), (2, 2)),
        # Layers without parameters keep their place.
        ({"a": {"w": ones(0, 3)}, "b": {"w": ones(2)}}, ("a", "b"), (0, 2)),
        ({"a": {"w": ones(0, 3), "b": ones(3)}}, ("a",), (3,)),
    ],
)
def test_every_kind_of_tree(params, names, sizes):
    layers = resolve_layers("module", params)
    assert layer_names(params) == layers.names == names
    assert layers.sizes == sizes
    assert len(layers.leaf_layer) == len(jax.tree.leaves(params))


def test_the_order_is_that_of_the_first_leaf():
    params = [{"w": ones(1)}, {"w": ones(2)}, {"w": ones(3)}]
    layers = resolve_layers([{"w": "z"}, {"w": "a"}, {"w": "z"}], params)
    assert layers.names == ("z", "a")
    assert layers.leaf_layer == (0, 1, 0)
    assert layers.sizes == (4, 2)


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ({"a": {"b": dense(1, 1)}, "a/b": dense(1, 1)}, ("a/b", "a/b#2")),
        # The number that would come next is another layer's own name.
        (
            {"a": {"b": dense(1, 1)}, "a/b": dense(1, 1), "a/b#2": dense(1, 1)},
            ("a/b", "a/b#3", "a/b#2"),
        ),
        ({"m": {1: dense(1, 1)}, "m/1": dense(1, 1)}, ("m/1", "m/1#2")),
        (
            [[ones(1)], {"x": {0: ones(1)}, "x/0": {"y": ones(1)}}],
            ("0", "1/x", "1/x/0"),
        ),
    ],
)
def test_equal_paths_get_a_number(params, names):
    assert layer_names(params) == names


_KEYS = st.one_of(
    st.dictionaries(st.text("ab/#2", min_size=1, max_size=3), st.none(), max_size=3),
    st.dictionaries(st.sampled_from(["params", "params/a", "value", "a#2"]), st.none()),
    st.dictionaries(st.integers(-1, 2), st.none(), max_size=3),
)
_SHAPES = st.sampled_from([(), (1,), (2, 3), (0, 2)])


def _trees(children):
    def fill(keys):
        return st.fixed_dictionaries(dict.fromkeys(keys, children))

    lists = st.lists(children, max_size=3)
    return st.one_of(_KEYS.flatmap(fill), lists, lists.map(tuple))


_TREES = st.recursive(
    st.one_of(_SHAPES.map(lambda shape: np.zeros(shape, np.float32)), st.none()),
    _trees,
    max_leaves=8,
)


def _walk(tree, path=()):
    """The leaves with their paths in jax's order, by a recursion of our own."""
    if isinstance(tree, dict):
        for key in sorted(tree):
            yield from _walk(tree[key], (*path, ("key", key)))
    elif isinstance(tree, list | tuple):
        for i, child in enumerate(tree):
            yield from _walk(child, (*path, ("item", i)))
    elif tree is not None:
        yield path, tree


@settings(max_examples=200, deadline=None, derandomize=True)
@given(tree=_TREES, word=st.sampled_from(["module", "leaf"]))
def test_any_tree_is_partitioned_by_parents_with_unique_names(tree, word):
    paths_and_leaves = list(_walk(tree))
    groups = [
        path[:-1] if word == "module" and len(path) > 1 else path for path, _ in paths_and_leaves
    ]
    order = list(dict.fromkeys(groups))
    sizes = [0] * len(order)
    for group, (_, leaf) in zip(groups, paths_and_leaves, strict=True):
        sizes[order.index(group)] += leaf.size

    layers = resolve_layers(word, tree)
    assert layers.leaf_layer == tuple(order.index(group) for group in groups)
    assert layers.sizes == tuple(sizes)
    assert len(layers.names) == len(order)
    assert len(set(layers.names)) == len(layers.names), layers.names
    assert layers == resolve_layers(word, tree)


# -- labels ----------------------------------------------------------------------------------


def test_leaf():
    layers = resolve_layers("leaf", MLP)
    assert layers.sizes == (3, 6, 1, 3)
    assert layers.leaf_layer == (0, 1, 2, 3)


def test_a_tree_of_labels():
    labels = {
        "Dense_0": {"kernel": "weights", "bias": "biases"},
        "Dense_1": {"kernel": "weights", "bias": "biases"},
    }
    layers = resolve_layers(labels, MLP)
    assert layers.names == ("biases", "weights")
    assert layers.leaf_layer == (0, 1, 0, 1)
    assert layers.sizes == (4, 9)


def test_a_prefix_of_labels():
    assert resolve_layers({"Dense_0": "body", "Dense_1": "head"}, MLP).sizes == (9, 4)
    layers = resolve_layers({"Dense_0": 7, "Dense_1": {"kernel": 7, "bias": 3}}, MLP)
    assert layers.names == ("7", "3")
    assert layers.sizes == (12, 1)


def test_a_function_of_params():
    def by_rank(params):
        return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)

    assert layer_names(MLP, by_rank) == ("vector", "matrix")
    assert layer_names(MLP, by_rank) == layer_names(MLP, by_rank(MLP))


def test_labels_keep_their_spelling():
    """Only a path loses its leading ``params/``; a label is the user's own word."""
    params = {"a": ones(1), "b": ones(1)}
    assert layer_names(params, {"a": "params/x", "b": "params/y"}) == ("params/x", "params/y")


def test_the_label_1_is_not_the_label_one():
    params = {"a": ones(1), "b": ones(2), "c": ones(3)}
    layers = resolve_layers({"a": 1, "b": "1", "c": np.int64(1)}, params)
    assert layers.sizes == (4, 2)
    assert len(set(layers.names)) == 2


def test_masked_leaves_are_in_no_layer():
    params = {"Dense_0": optax.MaskedNode(), "Dense_1": dense(3, 1)}
    assert layer_names(params) == ("Dense_1",)
    # A tree of labels made for the whole parameters still fits, and so does a prefix.
    labels = {"Dense_0": "body", "Dense_1": "head"}
    assert layer_names(params, labels) == ("head",)
    half = {"Dense_0": {"kernel": ones(2, 3), "bias": optax.MaskedNode()}}
    assert resolve_layers("module", half).sizes == (6,)
    full_labels = {"Dense_0": {"kernel": "w", "bias": "b"}}
    assert layer_names(half, full_labels) == ("w",)
    everything = {"Dense_0": optax.MaskedNode()}
    assert layer_names(everything) == ()


@pytest.mark.parametrize(
    "labels",
    [
        {"Dense_0": "a"},
        {"Dense_0": "a", "Dense_1": "b", "Dense_2": "c"},
        {"Dense_0": {"kernel": "a"}, "Dense_1": "b"},
        ["a", "b"],
        {"Dense_0": {"kernel": {"deeper": "a"}, "bias": "b"}, "Dense_1": "b"},
    ],
)
def test_labels_that_do_not_fit(labels):
    with pytest.raises(ValueError, match="layers must be shaped like params"):
        layer_names(MLP, labels)
    with pytest.raises(ValueError, match="layers must be shaped like params"):
        layer_names(MLP, lambda params: labels)


@pytest.mark.parametrize("label", [1.5, (), object()])
def test_labels_are_words_or_integers(label):
    labels = {"Dense_0": "a", "Dense_1": {"kernel": "b", "bias": label}}
    with pytest.raises(ValueError, match="layers must"):
        layer_names(MLP, labels)


def test_unknown_word():
    with pytest.raises(ValueError, match=r"layers must be one of 'module', 'leaf'; got 'modules'"):
        layer_names(MLP, "modules")
    with pytest.raises(ValueError, match="layers must return a tree of labels"):
        layer_names(MLP, lambda params: "module")


@pytest.mark.parametrize(
    ("leaf", "dtype", "remedy"),
    [
        (jnp.ones(2, jnp.complex64), "complex64", "split_real_and_imaginary"),
        (jnp.ones(2, jnp.int32), "int32", "optax.masked"),
        (jnp.ones(2, jnp.bool_), "bool", "optax.masked"),
    ],
)
@pytest.mark.parametrize("layers", ["module", "leaf", {"ok": "a", "bad": "b"}])
def test_leaves_that_are_not_real_floating_point(leaf, dtype, remedy, layers):
    params = {"ok": ones(2), "bad": {"w": leaf}}
    with pytest.raises(ValueError, match=rf"params\['bad'\]\['w'\] is {dtype}.*{remedy}"):
        layer_names(params, layers)
