"""Sums over the leaves of each layer, and one value a layer spread over its leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lama_optax.layers import resolve_layers


@pytest.mark.parametrize("word", ["module", "leaf"])
def test_sum_and_spread_are_numpys(x64, word):
    rng = np.random.default_rng(0)
    shapes = {"a": {"w": (3, 4), "b": (4,), "empty": (0, 2)}, "c": [(2,), ()]}
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    layers = resolve_layers(word, params)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    expected = np.zeros(len(layers.names))
    for layer, leaf in zip(layers.leaf_layer, leaves, strict=True):
        expected[layer] += leaf.sum()
    # At most 16 terms of size about 1 in double precision: 16 x 2.2e-16 < 1e-14.
    np.testing.assert_allclose(jax.jit(layers.sum)(params), expected, rtol=0, atol=1e-14)

    values = jnp.arange(1.0, len(layers.names) + 1)
    spread = jax.jit(layers.spread)(values, params)
    assert jax.tree.structure(spread) == jax.tree.structure(params)
    assert [float(x) for x in jax.tree.leaves(spread)] == [1.0 + i for i in layers.leaf_layer]
    assert layers.size_array().tolist() == list(layers.sizes)


def test_sums_of_half_precision_leaves_are_taken_in_single():
    """4097 ones: bfloat16 counts to 256 only, float16 to 2048."""
    params = {
        "a": {"half": jnp.ones(4097, jnp.bfloat16), "single": jnp.ones(1)},
        "b": {"half": jnp.ones(4097, jnp.float16)},
    }
    layers = resolve_layers("module", params)
    total = layers.sum(params)
    assert total.dtype == layers.dtype == jnp.float32
    assert total.tolist() == [4098.0, 4097.0]
    spread = layers.spread(jnp.asarray([0.1, 0.2]), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(spread)} == {jnp.dtype(jnp.float32)}
    is_set = layers.spread(jnp.asarray([True, False]), params)
    assert [bool(leaf) for leaf in jax.tree.leaves(is_set)] == [True, True, False]


def test_one_double_leaf_makes_the_sums_double(x64):
    params = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.float64)}
    layers = resolve_layers("module", params)
    assert layers.dtype == layers.sum(params).dtype == layers.size_array().dtype == jnp.float64
    assert [x.dtype for x in jax.tree.leaves(layers.spread(layers.size_array(), params))] == [
        jnp.float32,
        jnp.float64,
    ]


def test_no_layers_at_all():
    layers = resolve_layers("module", {})
    assert layers.sum({}).shape == layers.size_array().shape == (0,)
    assert layers.spread(jnp.zeros(0), {}) == {}


def test_a_tree_of_another_structure_is_refused():
    layers = resolve_layers("module", {"a": {"w": jnp.ones(2)}, "b": {"w": jnp.ones(2)}})
    with pytest.raises(ValueError, match="zip"):
        layers.sum({"a": {"w": jnp.ones(2)}})
