"""Per-example probes: unbiased on whatever JAX traces, with a standard error that is right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from models import compiled_curvature
from per_example import batch_loss, cnn, mlp, normal, rnn, stacked_scan, tied, transformer

from lama_optax import (
    exact_trace,
    flipout,
    lama_adam,
    lama_scale,
    layer_curvature,
    layer_names,
)

# Flax's layers promote implicitly.
pytestmark = pytest.mark.standard_promotion

NUM_ESTIMATES = 2000
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


def _estimates(model, estimator, num_estimates=NUM_ESTIMATES, updates=None):
    params, loss, batch, layers = model()

    @jax.jit
    def run(keys):
        return jax.lax.map(
            lambda key: layer_curvature(
                params,
                key,
                estimator=estimator,
                layers=layers,
                example_value_fn=loss,
                batch=batch,
                updates=updates,
            ),
            keys,
            batch_size=250,
        )

    estimates = run(jax.random.split(jax.random.key(17), num_estimates))
    return tuple(np.asarray(x, np.float64) for x in (estimates.mean, estimates.std_error))


def _exact(model):
    params, loss, batch, layers = model()
    exact = compiled_curvature(
        params, 0, estimator=exact_trace(), layers=layers, value_fn=batch_loss(loss, batch)
    )
    assert exact.mean.shape == (len(layer_names(params, layers)),)
    return np.asarray(exact.mean, np.float64)


@pytest.mark.parametrize(
    # In block scope each layer is compiled by itself: the small models cover it.
    ("model", "scope"),
    [
        (tied, "joint"),
        (mlp, "joint"),
        (stacked_scan, "block"),
        *(SLOW(model, "joint") for model in (cnn, transformer, rnn, stacked_scan)),
        SLOW(mlp, "block"),
    ],
)
def test_unbiased_with_a_calibrated_standard_error(model, scope):
    mean, std_error = _estimates(model, flipout(2, scope=scope))
    exact = _exact(model)

    spread = mean.std(axis=0, ddof=1)
    # float32, for estimates that have no other error: a head with squared error has none.
    rounding = 1e-5 * np.abs(exact)
    # 4 standard errors of the mean of all estimates: one failure in 16,000 for each layer.
    error = np.abs(mean.mean(axis=0) - exact)
    assert np.all(error <= 4 * spread / np.sqrt(NUM_ESTIMATES) + rounding)
    # The mean of the reported variances is the variance. Their ratio has a relative error below
    # sqrt(2/N) times the kurtosis' root, 0.03 times 2 for sums of products of signs: 3 of these.
    variance = (std_error**2).mean(axis=0)
    assert np.all(np.abs(variance - spread**2) <= 0.2 * spread**2 + rounding**2)


class _EveryKind(nn.Module):
    """Attention, normalisation, a convolution and one row, in a dtype of its own."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(2, dtype=self.dtype)(x, x)
        x = jnp.tanh(nn.Conv(8, (3,), dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x)))
        return nn.Dense(3, dtype=self.dtype)(jnp.mean(x, axis=0))


@pytest.mark.parametrize(("scope", "dtype"), [("joint", jnp.bfloat16), ("block", jnp.float16)])
@pytest.mark.slow
def test_parameters_may_be_wider_than_the_arithmetic(scope, dtype):
    batch = normal(1, 8, 5, 4)
    params = jax.jit(_EveryKind(jnp.float32).init)(jax.random.key(0), batch[0])

    def loss_in(dtype):
        return lambda p, x: jnp.sum(_EveryKind(dtype).apply(p, x).astype(jnp.float32) ** 2)

    full, half = (
        compiled_curvature(
            params,
            estimator=flipout(20, scope=scope),
            example_value_fn=loss_in(dtype),
            batch=batch,
        )
        for dtype in (jnp.float32, dtype)
    )
    # The probes are the same: what differs are the roundings of some tens of operations in a row.
    difference = np.abs(half.mean - full.mean) / full.std_error
    assert np.max(difference) < 30 * jnp.finfo(dtype).eps


def test_one_probe_reports_an_upper_limit_where_signs_cover_every_axis():
    mean, std_error = _estimates(mlp, flipout())
    assert np.all((std_error**2).mean(axis=0) >= 0.9 * mean.var(axis=0))


def test_one_probe_has_no_standard_error_where_an_axis_has_no_signs():
    params = {"conv": normal(0, 2, 1, 3), "dense": normal(1, 8, 2)}

    def loss(p, x):
        maps = jax.lax.conv(x[None, None], p["conv"], (1,), "SAME")
        return jnp.sum((jnp.tanh(maps.reshape(-1)) @ p["dense"]) ** 2)

    found = compiled_curvature(
        params, estimator=flipout(), example_value_fn=loss, batch=normal(2, 3, 4)
    )
    assert np.isnan(found.std_error).tolist() == [True, False]


def test_variance_falls_with_the_batch_where_examples_are_alike():
    """Equal examples: per-example probes average, one shared probe would not."""
    params, loss, batch, _ = mlp()

    def variance(copies):
        repeated = jax.tree.map(lambda x: jnp.repeat(x[:1], copies, axis=0), batch)
        estimate = jax.jit(
            jax.vmap(
                lambda key: (
                    layer_curvature(
                        params, key, estimator=flipout(), example_value_fn=loss, batch=repeated
                    ).mean
                )
            )
        )
        return np.var(estimate(jax.random.split(jax.random.key(3), 500)), axis=0)

    # 64 copies: 64 times less, within the error of two variances from 500 heavy-tailed samples.
    np.testing.assert_allclose(variance(1) / variance(64), 64.0, rtol=0.5)


def small_and_large():
    """Two layers that share their Hessian's form; one trace is 2^10 times the other."""
    params = {"small": {"w": normal(0, 8)}, "large": {"w": normal(1, 8)}}

    def loss(p, x):
        return jnp.sum(x * (p["small"]["w"] + 32 * p["large"]["w"])) ** 2

    return params, loss, normal(2, 16, 8), "module"


@pytest.mark.usefixtures("x64")
def test_one_row_of_outputs_has_no_noise_of_its_inputs():
    """With |h| for what the probe gives, and a second derivative of each output by itself alone."""
    params = {"w": normal(0, 4, 6).astype(float)}
    batch = normal(1, 5, 1, 4).astype(float)

    def loss(p, x):
        return jnp.sum(jnp.sin(x @ p["w"].reshape(2, 2, 6).reshape(4, 6)))

    arguments = {"value_fn": batch_loss(loss, batch), "example_value_fn": loss, "batch": batch}
    exact = compiled_curvature(params, estimator=exact_trace(), **arguments)
    for scope in ("joint", "block"):
        found = compiled_curvature(params, estimator=flipout(scope=scope), **arguments)
        # Roundings of float64.
        np.testing.assert_allclose(found.mean, exact.mean, rtol=1e-12, atol=1e-14)


def test_the_gradient_keeps_a_small_layer_out_of_the_noise_of_a_large_one():
    exact = _exact(small_and_large)
    params = small_and_large()[0]

    def noise(updates):
        mean, _ = _estimates(small_and_large, flipout(scope="joint"), 500, updates)
        small, large = (mean.std(axis=0, ddof=1) / exact)[
            [layer_names(params).index(name) for name in ("small", "large")]
        ]
        return small / large

    # The cross term has the variance of the own one, times 2 times the ratio of traces if s = 1.
    assert noise(jax.tree.map(jnp.ones_like, params)) > 20
    # 500 estimates: the two standard deviations agree within a tenth.
    np.testing.assert_allclose(noise(None), 1, rtol=0.1)


def test_no_gradient_harms_the_estimate():
    params, loss, batch, _ = small_and_large()

    @jax.jit
    def found(updates):
        return layer_curvature(
            params,
            0,
            estimator=flipout(scope="joint"),
            example_value_fn=loss,
            batch=batch,
            updates=updates,
        ).mean

    ones = {"small": {"w": jnp.ones(8)}, "large": {"w": jnp.ones(8)}}
    for entry in (0.0, np.nan, np.inf, 1e30):
        alike = jax.tree.map(lambda p, entry=entry: jnp.full_like(p, entry), params)
        np.testing.assert_array_equal(found(alike), found(ones))
        assert np.isfinite(found(ones | {"small": {"w": jnp.full(8, entry)}})).all()


def test_an_optimizer_hands_the_gradient_on():
    params, loss, batch, _ = small_and_large()
    given = {"example_value_fn": loss, "batch": batch}
    tx = lama_scale(estimator=flipout(scope="joint"), key=3)
    other = {"small": {"w": jnp.ones(8)}, "large": {"w": jnp.full(8, 1e-3)}}

    @jax.jit
    def found(grads):
        _, state = tx.update(grads, tx.init(params), params, **given)
        key = jax.random.fold_in(jax.random.key(3), 0)
        direct = layer_curvature(
            params, key, estimator=flipout(scope="joint"), **given, updates=grads
        )
        return state.curvature, direct.mean

    tracked, direct = found(jax.grad(batch_loss(loss, batch))(params))
    np.testing.assert_allclose(tracked, direct, rtol=1e-6)  # roundings
    assert np.all(np.abs(tracked / found(other)[0] - 1) > 1e-3)


def test_trains_inside_an_optimizer():
    params, loss, batch, _ = mlp()
    tx = lama_adam(1e-2, estimator=flipout(), sensitivity=1.0, update_interval=1)
    state = tx.init(params)
    value_fn = batch_loss(loss, batch)

    @jax.jit
    def step(params, state):
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, example_value_fn=loss, batch=batch)
        return optax.apply_updates(params, updates), state

    start = value_fn(params)
    for _ in range(50):
        params, state = step(params, state)
    assert value_fn(params) < 0.5 * start
    assert np.all(np.asarray(state[0].curvature) != 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "example_value_fn and batch are needed"),
        ({"example_value_fn": lambda p, x: jnp.sum(p["w"] * x)}, "batch"),
        ({"example_value_fn": lambda p, x: p["w"] * x, "batch": jnp.ones((3, 2))}, "scalar"),
        (
            {"example_value_fn": lambda p, x: jnp.sum(x[0]), "batch": (jnp.ones(3), jnp.ones(2))},
            "same number of examples",
        ),
        ({"example_value_fn": lambda p, x: jnp.sum(x), "batch": jnp.ones(())}, "same number"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        layer_curvature({"w": jnp.ones(2)}, 0, estimator=flipout(), **arguments)


@pytest.mark.parametrize("arguments", [{"num_probes": 0}, {"scope": "layer"}])
def test_bad_settings(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        flipout(**arguments)
