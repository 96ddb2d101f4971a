"""`supervised`: one dict that every estimator can take, whose functions are of one loss."""

import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest

from lama_optax import (
    exact_trace,
    fisher,
    flipout,
    gauss_newton,
    hutchinson,
    layer_curvature,
    supervised,
    track_curvature,
)

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
TARGETS = {
    "softmax_cross_entropy": lambda y, z: y,
    "sigmoid_binary_cross_entropy": lambda y, z: jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype),
    "squared_error": lambda y, z: jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype),
}


def task_of(make, loss, weighted):
    params, apply_fn, inputs, targets = make(dtype=jnp.float64)
    targets = TARGETS[loss](targets, apply_fn(params, inputs))
    weights = None
    if weighted:
        weights = jnp.asarray(np.random.default_rng(0).choice([0.0, 1.0, 3.0], targets.shape))
    task = supervised(apply_fn, inputs, targets, loss=loss, weights=weights)
    return params, apply_fn(params, inputs), targets, weights, task


@pytest.mark.parametrize(
    ("loss", "make", "weighted"),
    [
        *((loss, networks.mlp, False) for loss in TARGETS),
        ("softmax_cross_entropy", networks.rnn, True),
        *(SLOW(loss, networks.mlp, True) for loss in TARGETS),
        *(SLOW(loss, networks.transformer, weighted) for loss in TARGETS for weighted in (0, 1)),
    ],
)
def test_all_functions_are_of_one_loss(x64, make, loss, weighted):
    params, outputs, targets, weights, task = task_of(make, loss, weighted)
    expected_losses = {
        "softmax_cross_entropy": lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y),
        "sigmoid_binary_cross_entropy": optax.sigmoid_binary_cross_entropy,
        "squared_error": lambda z, y: (z - y) ** 2,
    }[loss](outputs, targets)
    value = np.average(expected_losses, weights=weights)

    def example_loss(params, example):
        return task["output_loss_fn"](task["example_output_fn"](params, example), example)

    @jax.jit
    def all_of_them(params):
        over_examples = (None, 0)
        return (
            task["value_fn"](params),
            task["losses_fn"](params),
            task["sampled_losses_fn"](params, jax.random.key(0)),
            jax.vmap(example_loss, over_examples)(params, task["batch"]),
            jax.vmap(task["example_value_fn"], over_examples)(params, task["batch"]),
        )

    found, losses, sampled, of_outputs, of_examples = all_of_them(params)
    assert found == pytest.approx(value, rel=1e-12)
    if weighted:
        np.testing.assert_array_equal(losses[1], weights)
        np.testing.assert_array_equal(sampled[1], weights)
        losses, sampled = losses[0], sampled[0]
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-12)
    assert sampled.shape == losses.shape
    np.testing.assert_allclose(of_outputs, of_examples, rtol=1e-12)
    assert jnp.mean(of_examples) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("loss", TARGETS)
def test_sampled_losses_have_the_covariance_of_drawn_targets(x64, loss):
    """Their gradient by the outputs has mean 0 and the Hessian as covariance, a Fisher matrix."""
    outputs = jnp.asarray([[0.5, -1.0, 2.0]])
    target = TARGETS[loss](jnp.zeros(1, jnp.int32), outputs)
    task = supervised(lambda p, x: p, jnp.zeros(1), target, loss=loss)

    def gradient(key):
        return jax.grad(lambda z: jnp.sum(task["sampled_losses_fn"](z, key)))(outputs)[0]

    draws = jax.jit(jax.vmap(gradient))(jax.random.split(jax.random.key(0), 20_000))
    hessian = jax.jit(jax.hessian(lambda z: jnp.sum(task["losses_fn"](z[None]))))(outputs[0])
    # 20,000 draws of entries of size up to 2: standard errors of at most 0.02.
    np.testing.assert_allclose(draws.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(draws.T @ draws / len(draws), hessian, atol=0.08)


def test_sampled_losses_where_a_class_is_masked():
    outputs = jnp.asarray([[0.5, -jnp.inf, 2.0]])
    task = supervised(lambda p, x: p, jnp.zeros(1), jnp.zeros(1, jnp.int32))
    draw = jax.value_and_grad(lambda z, key: jnp.sum(task["sampled_losses_fn"](z, key)))
    for seed in range(4):  # signs that differ let the other two have gradients
        value, gradient = draw(outputs, jax.random.key(seed))
        assert jnp.isfinite(value)
        assert gradient[0, 1] == 0
        assert float(gradient[0, 0]) == pytest.approx(-float(gradient[0, 2]), abs=1e-7)


def test_a_change_of_estimator_changes_one_word():
    """All five in one script; where the Hessian is the Gauss-Newton matrix they agree."""
    rng = np.random.default_rng(0)
    apply_fn = lambda p, x: x @ p["dense"]["kernel"]  # noqa: E731
    params = {"dense": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}}
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 4, 8))
    found = {}
    for estimator in (fisher(300), hutchinson(300), flipout(100), gauss_newton(), exact_trace()):
        tx = optax.chain(track_curvature(estimator), optax.sgd(0.1))

        @jax.jit
        def train_step(params, state, tx=tx):
            task = supervised(apply_fn, x, y)
            _, grads = jax.value_and_grad(task["value_fn"])(params)
            updates, state = tx.update(grads, state, params, **task)
            return optax.apply_updates(params, updates), state

        _, state = train_step(params, tx.init(params))
        found[type(estimator).__name__] = float(state[0].curvature[0])
    exact = found.pop("_ExactTrace")
    # The noisiest, hutchinson, has a relative standard error of about 3 %.
    assert all(value == pytest.approx(exact, rel=0.12) for value in found.values()), found


def test_one_compilation_serves_all_batches():
    params, apply_fn, inputs, targets = networks.mlp()
    traces = []

    @jax.jit
    def value(params, task):
        traces.append(1)
        return task["value_fn"](params)

    first = value(params, supervised(apply_fn, inputs, targets))
    second = value(params, supervised(apply_fn, inputs + 1, targets))
    assert len(traces) == 1
    assert first != second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"apply_fn": 3}, r"apply_fn must be a function .*; got 3"),
        ({"apply_fn": lambda p, x: (x @ p, {})}, r"apply_fn must return one array.*; got tuple"),
        ({"loss": "hinge"}, r"loss must be one of 'softmax_cross_entropy', .*; got 'hinge'"),
        ({"targets": np.ones(4)}, r"targets must be integers, .*; got float64|float32"),
        ({"targets": np.ones((4, 2), int)}, r"targets must have the shape \(4,\).*got \(4, 2\)"),
        ({"targets": np.ones(3, int)}, r"same number of examples"),
        ({"weights": np.ones(3)}, r"weights must have the shape of targets, \(4,\).*got \(3,\)"),
        ({"weights": 1.0}, r"weights must have the shape of targets"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@pytest.mark.parametrize("estimator", [hutchinson(), fisher()], ids=["hutchinson", "fisher"])
def test_bad_input(change, message, estimator):
    arguments = {
        "apply_fn": lambda p, x: x @ p,
        "inputs": np.ones((4, 2), np.float32),
        "targets": np.zeros(4, int),
    } | change
    with pytest.raises(ValueError, match=message):
        layer_curvature(jnp.ones((2, 3)), 0, estimator=estimator, **supervised(**arguments))


@pytest.mark.parametrize("estimator", [fisher(), hutchinson(), flipout(), gauss_newton()])
def test_padding_may_have_any_target(estimator):
    params, apply_fn, inputs, targets = networks.mlp()
    weights = jnp.arange(len(targets)) % 2

    def found(targets):
        task = supervised(apply_fn, inputs, targets, weights=weights)
        return task["value_fn"](params), layer_curvature(params, 0, estimator=estimator, **task)

    value, curvature = found(targets)
    padded, of_padded = found(jnp.where(weights == 0, -100, targets))  # no class: its loss is NaN
    assert value == padded
    np.testing.assert_array_equal(curvature.mean, of_padded.mean)
    assert np.all(np.isfinite(curvature.mean))
