"""What holds for all numbers: hypothesis draws them, over a fixed set of trees and dtypes.

Each (tree, dtype) is compiled once, with the hyper-parameters as traced arguments, so that an
example costs milliseconds.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lama_optax import exact_trace, lam_scale, lama_scale, layer_names

common = settings(
    deadline=None,  # the first example of each tree compiles
    max_examples=25,
    derandomize=True,  # the same examples on every machine
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


class Pair(NamedTuple):
    """A NamedTuple as a container of parameters."""

    left: jax.Array
    right: jax.Array


# Shapes of: a bare array, nested modules, lists and tuples; a NamedTuple with a scalar, empty
# subtrees, a leaf of size 0 and leaves at the root.
SHAPES = {
    "array": (3,),
    "modules": {"net": {"a": {"kernel": (2, 3), "bias": (3,)}, "b": {"kernel": (3, 1)}}},
    "list": [(2,), {"w": (1, 2, 2)}, ((2, 1), ())],
    "odd": {"none": {}, "zero": {"w": (0, 3)}, "list": [], "pair": Pair((), (4,)), "w": (2,)},
}


def is_shape(x):
    return isinstance(x, tuple) and not hasattr(x, "_fields") and all(type(i) is int for i in x)


def fill(shapes, dtype, make):
    dtype = jnp.dtype(dtype)
    return jax.tree.map(lambda s: np.asarray(make(s)).astype(dtype), shapes, is_leaf=is_shape)


def params_of(tree, dtype):
    return fill(SHAPES[tree], dtype, np.ones)


@functools.cache
def compiled_update(tree, dtype, momentum):
    """One update with every number traced; the trees' layers are those of "module"."""

    @jax.jit
    def update(numbers, grads, state, curvature):
        tx = lama_scale(momentum=momentum, **numbers)
        return tx.update(grads, state, params_of(tree, dtype), curvature=curvature)

    return update


# Tree, dtype, form of the momentum, granularity: some of all, for each combination is compiled.
COMBINATIONS = [
    ("array", "float32", "paper", "weight"),
    ("modules", "bfloat16", "paper", "layer"),
    ("list", "float16", "ema", "weight"),
    ("odd", "float32", "ema", "layer"),
]
combinations = st.sampled_from(COMBINATIONS)
# Finite of every size up to one rounding below the largest, subnormal, zero, and not finite.
LARGEST = 1.75 * 2.0**127
wild = st.one_of(
    st.floats(-LARGEST, LARGEST, width=32),
    st.sampled_from([np.nan, np.inf, -np.inf, LARGEST, -LARGEST, 1e-45, 0.0, -0.0, 1.0]),
)
decays = st.floats(0, 0.9990234375, width=32, allow_subnormal=False)


@st.composite
def hyperparameters(draw):
    low, high = sorted(draw(st.tuples(*[st.floats(0, 4, width=32, allow_subnormal=False)] * 2)))
    return {
        "b1": draw(decays),
        "b2": draw(decays),
        "alpha_min": low,
        "alpha_max": high,
        "sensitivity": draw(st.floats(-(2.0**100), 2.0**100, width=32)),
        "curvature_decay": draw(decays),
        "max_momentum": draw(decays),
    }


def draw_grads(data, tree, dtype):
    entries = data.draw(st.lists(wild, min_size=6, max_size=6))
    return fill(SHAPES[tree], dtype, lambda shape: np.resize(entries, shape))


def is_finite(tree):
    return all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(tree))


@common
@given(st.data(), combinations, hyperparameters())
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_state_stays_finite_and_alpha_and_momentum_in_range(data, combination, numbers):
    tree, dtype, momentum, _ = combination
    numbers = {name: np.float32(value) for name, value in numbers.items()}
    params = params_of(tree, dtype)
    num_layers = len(layer_names(params))
    update = compiled_update(tree, dtype, momentum)
    state = jax.device_get(lama_scale(momentum=momentum, **numbers).init(params))
    rejected = 0
    for _ in range(3):
        before = state
        means = data.draw(st.lists(wild, min_size=num_layers, max_size=num_layers))
        curvature = np.asarray(means, np.float32)
        grads = draw_grads(data, tree, dtype)
        updates, state = jax.device_get(update(numbers, grads, before, curvature))

        assert is_finite(updates)
        assert is_finite(state)
        assert (state.alpha >= numbers["alpha_min"]).all()
        assert (state.alpha <= numbers["alpha_max"]).all()
        assert (state.momentum <= numbers["max_momentum"]).all()
        assert (state.momentum >= 0).all()
        # A layer is counted, and keeps what it had, just where its estimate is not finite.
        bad = ~np.isfinite(curvature)
        rejected += bad.sum()
        assert int(state.rejected) == rejected
        np.testing.assert_array_equal(state.curvature[bad], before.curvature[bad])
        np.testing.assert_array_equal(state.tracker.std_error[bad], before.tracker.std_error[bad])
        # An entry whose gradient is not finite stays.
        for g, u, m, old in zip(
            *map(jax.tree.leaves, (grads, updates, state.mu, before.mu)), strict=True
        ):
            spoilt = ~np.isfinite(np.asarray(g, np.float32))
            assert (np.asarray(u)[spoilt] == 0).all()
            np.testing.assert_array_equal(np.asarray(m)[spoilt], np.asarray(old)[spoilt])


@common
@given(st.lists(wild, min_size=1, max_size=5))
def test_curvature_is_the_last_finite_estimate(means):
    params = jnp.ones(3)
    update = compiled_update("array", "float32", "paper")
    numbers = {"curvature_decay": jnp.asarray(0.0)}
    state = lama_scale().init(params)
    for mean in means:
        _, state = update(numbers, params, state, np.asarray([mean], np.float32))
    finite = [mean for mean in means if np.isfinite(mean)]
    expected = np.float32(finite[-1] if finite else 0)
    # Equal, but for subnormals, which XLA may flush to 0.
    tiny = float(np.finfo(np.float32).tiny)
    np.testing.assert_allclose(state.curvature[0], expected, rtol=0, atol=tiny)
    assert int(state.rejected) == len(means) - len(finite)


@common
@given(st.data(), combinations, decays)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_lam_state_stays_finite(data, combination, decay):
    tree, dtype, _, granularity = combination
    params = params_of(tree, dtype)
    update = compiled_lam(tree, dtype, granularity)
    state = lam_scale(granularity=granularity).init(params)
    for _ in range(2):
        grads = draw_grads(data, tree, dtype)
        updates, state = jax.device_get(update(np.float32(decay), grads, state))
        assert is_finite(updates)
        assert is_finite(state)
        assert all((v >= 0).all() for v in jax.tree.leaves(state))


@functools.cache
def compiled_lam(tree, dtype, granularity):
    @jax.jit
    def update(decay, grads, state):
        return lam_scale(decay, granularity=granularity).update(
            grads, state, params_of(tree, dtype)
        )

    return update


# Scaling the loss by c and lambda by 1/c.


@functools.cache
def compiled_alpha():
    """Alpha after one step on ``factor * loss``."""
    params = {"a": {"w": jnp.asarray([0.5, -1.0]), "b": jnp.asarray(2.0)}, "c": jnp.asarray([1.5])}

    @jax.jit
    def alpha(factor, sensitivity):
        def value_fn(p):
            powers = [jnp.sum(leaf**4) for leaf in jax.tree.leaves(p)]
            return factor * functools.reduce(jnp.add, powers)

        tx = lama_scale(estimator=exact_trace(), sensitivity=sensitivity)
        _, state = tx.update(params, tx.init(params), params, value_fn=value_fn)
        return state.alpha

    return alpha


@common
@given(st.floats(-3, 3, width=32), st.floats(0.0009765625, 1024, width=32))
def test_loss_times_c_with_lambda_over_c_leaves_alpha_alone(sensitivity, factor):
    sensitivity = 0.02 * sensitivity
    plain = compiled_alpha()(1.0, sensitivity)
    scaled = compiled_alpha()(factor, np.float32(sensitivity) / np.float32(factor))
    # All terms of H are positive, some ten roundings: lambda H is good to 1e-6 relative, and
    # |x sigmoid'(x)| < 0.23 makes that less than 3e-7 of alpha.
    np.testing.assert_allclose(scaled, plain, rtol=0, atol=1e-6)


@common
@given(st.floats(-0.0625, 0.0625, width=32), st.integers(-10, 10))
def test_loss_times_a_power_of_two_leaves_alpha_alone_to_the_bit(sensitivity, exponent):
    plain = compiled_alpha()(1.0, sensitivity)
    scaled = compiled_alpha()(2.0**exponent, sensitivity / 2.0**exponent)
    np.testing.assert_array_equal(scaled, plain)


# Names and order of layers.


@common
@given(st.permutations(["a", "b", "c"]), st.integers(0, 2**32 - 1))
def test_names_and_order_of_layers_do_not_matter(names, seed):
    """Module i is called names[i], which moves it to another place of the flattened tree."""
    rng = np.random.default_rng(seed)
    modules, grads = (
        [
            {"w": rng.normal(size=2).astype(np.float32), "b": rng.normal(size=1).astype(np.float32)}
            for _ in range(3)
        ]
        for _ in range(2)
    )
    outcomes = []
    for labels in (["a", "b", "c"], names):
        params, updates, order = (
            dict(zip(labels, x, strict=True)) for x in (modules, grads, range(3))
        )
        mean, alpha, updates = compiled_renamed()(params, updates, order)
        place = [sorted(labels).index(label) for label in labels]
        outcomes.append(
            (mean[np.array(place)], alpha[np.array(place)], [updates[k] for k in labels])
        )
    # Bits: each layer's sums run over its own leaves in their own order.
    for actual, expected in zip(*map(jax.tree.leaves, outcomes), strict=True):
        np.testing.assert_array_equal(actual, expected)


@functools.cache
def compiled_renamed():
    @jax.jit
    def update(params, grads, order):
        def value_fn(p):
            # Another curvature for each module, by its number and not by its name.
            return functools.reduce(
                jnp.add,
                [(order[k] + 1.0) * (jnp.sum(p[k]["w"] ** 4) + jnp.sum(p[k]["b"] ** 2)) for k in p],
            )

        tx = lama_scale(estimator=exact_trace(), sensitivity=0.1)
        updates, state = tx.update(grads, tx.init(params), params, value_fn=value_fn)
        return state.curvature, state.alpha, updates

    return update
