"""`layer_curvature` over many batches, and until it is known well enough."""

import functools
import warnings

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from jax.tree_util import Partial

from lama_optax import LayerCurvature, fisher, hutchinson, layer_curvature, supervised
from lama_optax.curvature import measure

PARAMS = {"a": jnp.ones(2), "b": jnp.ones(3)}


class Normal:
    """Estimates that are normal about 1 and 2, with the standard deviations asked for."""

    def __init__(self, *spread):
        self.spread = jnp.asarray(spread)

    def estimate(self, key, params, layers, /, *, shift=0.0, **extra_args):
        del params, extra_args
        noise = jax.random.normal(key, (2,)) * self.spread
        trace = (jnp.asarray([1.0, 2.0]) + shift + noise) * layers.size_array()
        return LayerCurvature.from_trace(layers, trace, None)


def test_mean_and_standard_error_over_batches():
    shifts = np.random.default_rng(0).normal(size=20)
    batches = ({"shift": jnp.float32(shift)} for shift in shifts)  # a generator, as loaders are
    found = layer_curvature(PARAMS, 0, estimator=Normal(0.0, 0.0), batches=batches)
    np.testing.assert_allclose(found.mean, shifts.mean() + np.asarray([1, 2]), rtol=1e-6)
    expected = np.std(shifts, ddof=1) / 20**0.5
    np.testing.assert_allclose(found.std_error, expected, rtol=1e-5)
    assert found.size.tolist() == [2, 3]


def test_each_batch_draws_anew():
    found = layer_curvature(PARAMS, 0, estimator=Normal(1.0, 1.0), batches=[{}] * 100)
    # The spread is the estimator's alone: 1 / sqrt(100), known to 7 %.
    np.testing.assert_allclose(found.std_error, 0.1, rtol=0.25)


def test_one_batch_has_no_standard_error():
    found = layer_curvature(PARAMS, 0, estimator=Normal(1.0, 1.0), batches=[{}])
    assert jnp.isnan(found.std_error).all()


@pytest.mark.parametrize("how", ["supervised", "partial"])
def test_batches_are_compiled_once(how):
    params, apply_fn, inputs, targets = networks.mlp()
    traces = []

    def counted(p, x):
        traces.append(1)
        return apply_fn(p, x)

    def losses(x, y, p):
        return supervised(counted, x, y)["value_fn"](p)

    def batch(shift):
        if how == "supervised":
            return supervised(counted, inputs + shift, targets)
        return {"value_fn": Partial(losses, inputs + shift, targets)}

    estimator = fisher() if how == "supervised" else hutchinson(1)
    one = functools.partial(layer_curvature, params, 0, estimator=estimator)
    one(batches=[batch(0.0)])
    once = len(traces)
    one(batches=[batch(0.1 * i) for i in range(5)])
    assert len(traces) == 2 * once


def test_an_interruption_keeps_what_there_is():
    def batches():
        for shift in (0.0, 2.0):
            yield {"shift": jnp.float32(shift)}
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted: the mean is over 2 estimates"):
        found = layer_curvature(PARAMS, 0, estimator=Normal(0.0, 0.0), batches=batches())
    assert found.mean.tolist() == [2.0, 3.0]


def test_batches_that_are_not_known():
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        layer_curvature(PARAMS, 0, estimator=Normal(1.0, 1.0), batches=[])
    shifts = [{"shift": jnp.float32(shift)} for shift in (0, np.nan)]
    with pytest.raises(ValueError, match=r"estimate 1 is not finite for the layers \['a', 'b'\]"):
        layer_curvature(PARAMS, 0, estimator=Normal(1.0, 1.0), batches=shifts)


def test_sampling_stops_when_every_layer_is_known():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = layer_curvature(PARAMS, 0, estimator=Normal(1.0, 1.0), relative_error=0.1)
    assert (found.std_error <= 0.1 * found.mean).all()
    assert found.std_error[0] > 0.08  # and not much later


def test_layers_that_are_not_known_are_named():
    with pytest.warns(UserWarning, match=r"relative error of 0.1 after 50 estimates: b\.$"):
        layer_curvature(PARAMS, 0, estimator=Normal(0.1, 5.0), relative_error=0.1, max_samples=50)
    with pytest.warns(UserWarning, match=r"after 30 estimates: b\.$"):
        layer_curvature(PARAMS, 0, estimator=Normal(0.1, 5.0), relative_error=0.1, share=0.5)


@pytest.mark.parametrize("spread", [0.6, pytest.param(2.0, marks=pytest.mark.slow)])
def test_interval_of_a_mean_that_stopped_by_itself(spread):
    """90 to 98 % of 500 runs, though each stopped when its standard error looked small."""
    rng, held = np.random.default_rng(0), []
    for _ in range(500):
        means = (np.asarray([1.0, 2.0]) + spread * rng.normal(size=2) for _ in range(10_000))
        samples = measure._collected(means, ["a", "b"], 0.1, 1.0)
        error = np.std(samples, axis=0, ddof=1) / len(samples) ** 0.5
        assert (error <= 0.1 * np.abs(np.mean(samples, axis=0))).all()
        held.append(np.abs(np.mean(samples, axis=0) - [1.0, 2.0]) < 1.96 * error)
    coverage = np.mean(held, axis=0)
    assert (coverage >= 0.9).all(), coverage
    assert (coverage <= 0.98).all(), coverage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relative_error": 0.0}, r"relative_error must be in \(0, 1\); got 0.0"),
        ({"relative_error": 0.1, "max_samples": 0}, r"max_samples must be an integer"),
        ({"relative_error": 0.1, "share": 1.5}, r"share must be in \(0, 1\]; got 1.5"),
    ],
)
def test_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        layer_curvature(PARAMS, 0, estimator=Normal(1.0, 1.0), **options)
