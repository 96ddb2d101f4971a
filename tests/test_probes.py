"""The three distributions of probes: mean 0, covariance I, one leaf independent of another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lama_optax.curvature.probes import PROBES
from lama_optax.layers import resolve_layers

# `jax.random.normal` in bfloat16 has a mean of -0.012; with 400 000 draws the standard error is
# 0.0016, so that probes made that way fail.
DRAWS = {"float32": 40_000, "float64": 40_000, "float16": 40_000, "bfloat16": 400_000}


def tree(dtype=jnp.float32):
    """Layers of 6 and 3 entries; two leaves of equal shape, where shared bits would show."""
    return {
        "a": {"kernel": jnp.zeros((2, 2), dtype), "bias": jnp.zeros(2, dtype)},
        "b": {"first": jnp.zeros(2, dtype), "second": jnp.zeros((), dtype)},
    }


SIZES = np.array([6, 6, 6, 6, 6, 6, 3, 3, 3])  # N_l of the layer of each of the 9 entries


@functools.cache
def _draws(name, dtype):
    params = tree(dtype)
    layers = resolve_layers("module", params)
    keys = jax.random.split(jax.random.key(1), DRAWS[dtype])
    probes = jax.jit(jax.vmap(lambda key: PROBES[name](key, params, layers)))(keys)
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(probes)]
    return np.concatenate([leaf.reshape(len(keys), -1) for leaf in leaves], axis=1)


# Both half precisions are drawn in float32.
@pytest.fixture(
    params=["float32", "float64", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
def dtype(request):
    if request.param == "float64":
        request.getfixturevalue("x64")
    return request.param


def fourth_moment(name):
    """E[v_i^4] in theory: 1, 3, and 3 N/(N+2) on a sphere of radius sqrt(N)."""
    return {"rademacher": 1.0, "gaussian": 3.0, "sphere": 3 * SIZES / (SIZES + 2)}[name]


@pytest.mark.parametrize("name", PROBES)
def test_moments(name, dtype):
    probes = _draws(name, dtype)
    assert probes.shape == (DRAWS[dtype], 9)

    # 5 standard errors. Var[v_i] = 1; Var[v_i v_j] is 1, or N/(N+2) < 1 on a sphere;
    # Var[v_i^2] = E[v_i^4] - 1 is at most 2. Rounding to bfloat16 changes a square by at most
    # 2^-8 in relative size, of either sign alike: below 1e-5 on average.
    standard_error = 1 / np.sqrt(len(probes))
    np.testing.assert_allclose(probes.mean(axis=0), 0, atol=5 * standard_error)
    covariance = probes.T @ probes / len(probes)
    off_diagonal = covariance - np.diag(np.diag(covariance))
    np.testing.assert_allclose(off_diagonal, 0, atol=5 * standard_error)
    spread = np.sqrt(fourth_moment(name) - 1)
    assert (abs(np.diag(covariance) - 1) <= 5 * spread * standard_error + 1e-5).all()
    # Var[v_i^4] is at most that of a Gaussian, 105 - 9 = 96; it tells the three apart.
    fourth = np.mean(probes**4, axis=0)
    atol = 1e-12 if name == "rademacher" else 5 * np.sqrt(96) * standard_error
    assert (abs(fourth - fourth_moment(name)) <= atol).all()


def test_rademacher_is_plus_or_minus_one(dtype):
    assert set(np.unique(_draws("rademacher", dtype))) == {-1.0, 1.0}


def test_each_layers_block_lies_on_its_sphere(dtype):
    probes = _draws("sphere", dtype)
    # Rounding changes each entry by eps/2 of itself, hence the norm by as much at most; the
    # arithmetic in float32 or float64 (a sum of 6 squares, a root, a product) adds its own.
    arithmetic = np.finfo("float64" if dtype == "float64" else "float32").eps
    rtol = float(jnp.finfo(dtype).eps) / 2 + 6 * arithmetic
    np.testing.assert_allclose(np.linalg.norm(probes[:, :6], axis=1), np.sqrt(6), rtol=rtol)
    np.testing.assert_allclose(np.linalg.norm(probes[:, 6:], axis=1), np.sqrt(3), rtol=rtol)


@pytest.mark.parametrize("name", PROBES)
def test_each_leaf_keeps_its_dtype_and_shape(name):
    params = {
        "half": {"w": jnp.zeros((3, 2), jnp.bfloat16), "b": jnp.zeros(2, jnp.float32)},
        "other": jnp.zeros(3, jnp.float16),
        "empty": jnp.zeros((0, 4)),
    }
    probe = PROBES[name](jax.random.key(0), params, resolve_layers("module", params))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), probe) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(probe))


@pytest.mark.parametrize("name", PROBES)
def test_leaves_of_equal_shape_get_different_bits(name):
    params = {"a": jnp.zeros(64), "b": jnp.zeros(64)}
    probe = PROBES[name](jax.random.key(0), params, resolve_layers("module", params))
    agreement = float(jnp.mean(jnp.sign(probe["a"]) == jnp.sign(probe["b"])))
    # Signs of independent probes agree in 32 of 64 places, standard deviation 4.
    assert abs(64 * agreement - 32) <= 5 * 4


@pytest.mark.parametrize("name", PROBES)
def test_the_key_fixes_the_bits(name):
    params = tree()
    layers = resolve_layers("module", params)

    def leaves(seed):
        return [np.asarray(x) for x in jax.tree.leaves(PROBES[name](seed, params, layers))]

    first, again, other = (leaves(jax.random.key(seed)) for seed in (3, 3, 4))
    assert all((x == y).all() for x, y in zip(first, again, strict=True))
    assert any((x != y).any() for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("name", PROBES)
def test_no_parameters(name):
    for params in ({}, {"a": jnp.zeros((0, 3))}):
        probe = PROBES[name](jax.random.key(0), params, resolve_layers("module", params))
        assert jax.tree.structure(probe) == jax.tree.structure(params)
