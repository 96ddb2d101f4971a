"""What is known of second moments, against the covariance of all entries, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lama_optax._jaxpr.curvature.moments import MOVES_DATA, Moments, of_sum

pytestmark = pytest.mark.usefixtures("x64")

ROWS = np.random.default_rng(0).normal(size=(3, 2))


def dense():
    """A dense layer's perturbation: 3 places, outputs of shape (2, 4)."""
    root = jnp.einsum("sf,or->sofr", ROWS, jnp.eye(8)).reshape(3, 2, 4, 16)
    square = jnp.sum(ROWS**2, axis=1)[:, None, None]
    return root, Moments(square, frozenset({0}), frozenset({1, 2}), 0, jnp.asarray(ROWS))


def bias(leaf=1):
    """A vector's."""
    moments = Moments(jnp.ones(()), frozenset({leaf}), frozenset({0, 1}))
    return jnp.eye(8).reshape(2, 4, 8), moments


def places():
    """One whose entries' mean squares differ."""
    scale = 1.0 + jnp.arange(8.0)
    moments = Moments(scale.reshape(2, 4) ** 2, frozenset({2}), frozenset({0, 1}))
    return jnp.diag(scale).reshape(2, 4, 8), moments


def moved(entered, move):
    """A perturbation ``root @ noise`` and its moments, after operations that move data."""
    root, moments = entered()
    jaxpr = jax.make_jaxpr(move)(jnp.zeros(root.shape[:-1])).jaxpr
    root = jax.vmap(move, -1, -1)(root)
    for eqn in jaxpr.eqns:
        assert eqn.primitive.name in MOVES_DATA
        moments = moments.laid_out(eqn)
    return root, moments


def check(root, moments):
    """Every claim about two entries."""
    shape = root.shape[:-1]
    assert jnp.broadcast_shapes(moments.square.shape, shape) == shape
    square = np.broadcast_to(moments.square, shape)
    for x, y in itertools.product(np.ndindex(*shape), repeat=2):
        mean = float(np.dot(root[x], root[y]))
        differ = {i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b}
        if not differ:
            np.testing.assert_allclose(mean, square[x], rtol=1e-12)
        if differ & moments.own:
            assert mean == 0
        elif differ == {moments.axis}:
            rows = np.asarray(moments.rows)
            of_rows = np.dot(rows[x[moments.axis]], rows[y[moments.axis]])
            np.testing.assert_allclose(mean, of_rows, rtol=1e-12)


@st.composite
def moves(draw):
    """One to three operations, as functions of an array of any shape."""

    def move(x):
        for kind, seed in steps:
            rng = np.random.default_rng(seed)
            if kind == "transpose":
                x = jnp.transpose(x, rng.permutation(x.ndim))
            elif kind == "insert":
                x = jnp.expand_dims(x, rng.integers(x.ndim + 1))
            elif kind == "copy":
                axis = rng.integers(x.ndim + 1)
                x = jnp.expand_dims(x, axis)
                x = jnp.broadcast_to(x, (*x.shape[:axis], 2, *x.shape[axis + 1 :]))
            else:
                start, stop = np.sort(rng.integers(x.ndim + 1, size=2))
                x = x.reshape(*x.shape[:start], -1, *x.shape[stop:])
                if kind == "split" and x.shape[start] % 2 == 0:
                    x = x.reshape(*x.shape[:start], 2, -1, *x.shape[start + 1 :])
        return x

    kinds = st.sampled_from(["transpose", "insert", "copy", "merge", "split"])
    steps = draw(st.lists(st.tuples(kinds, st.integers(0, 999)), min_size=1, max_size=3))
    return move


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from([dense, bias, places]), moves())
def test_moving_data_keeps_them(entered, move):
    check(*moved(entered, move))


def test_places_keep_their_rows_where_outputs_are_split():
    root, moments = moved(dense, lambda x: x.transpose(1, 0, 2).reshape(2, 3, 2, 2))
    assert (moments.axis, moments.own) == (1, {0, 2, 3})
    check(root, moments)


def test_a_bias_adds_to_every_place_alike():
    root, of_dense = dense()
    of_bias, moments = moved(bias, lambda x: x[None])
    found = of_sum([of_dense, moments.copied((1, 2, 4), (3, 2, 4))])
    both = jnp.concatenate([root, jnp.broadcast_to(of_bias, (3, 2, 4, 8))], axis=-1)
    assert (found.axis, found.own) == (0, {1, 2})
    check(both, found)


def test_a_number_that_is_added_everywhere():
    number = Moments(jnp.asarray(4.0), frozenset({0}), frozenset())
    check(jnp.full((3, 1), 2.0), number.copied((), (3,)))
    check(jnp.full((3, 2, 1), 2.0), number.copied((), (3, 2)))


def test_of_one_leaf_twice_nothing_is_known():
    assert of_sum([bias()[1], bias()[1]]) is None
    check(jnp.concatenate([bias()[0], bias()[0]], -1), of_sum([bias()[1], bias(2)[1]]))
