"""Each equation's function against the formula in NumPy, and the reference against the Hessian.

The documents' equations are numbered in the names: `test_eq_6_...` tests Eq. (6).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from lama_optax.layers import resolve_layers
from lama_optax.optimizers import equations as eq

# One rounding of float64 is 1.1e-16 relative; no function below makes more than about ten.
RTOL = 1e-14
SEEDS = (0, 1, 2)


@pytest.fixture(autouse=True)
def _double(x64):
    del x64


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("seed", SEEDS)
def test_reference_gradient_and_traces_are_those_of_jax(seed):
    problem = reference.make_problem(seed)

    def loss(params):
        hidden, out = params["Dense_0"], params["Dense_1"]
        h = jnp.tanh(problem.x @ hidden["kernel"] + hidden["bias"][None])
        z = (h @ out["kernel"] + out["bias"][None])[:, 0]
        return jnp.mean(jax.nn.softplus(z) - problem.y * z)

    # Sums of some hundred terms of order 1, each rounded at 1e-16.
    tight = {"rtol": 1e-11, "atol": 1e-13}
    expected = jax.jit(jax.grad(loss))(problem.params)
    for layer, leaves in reference.gradient(problem.params, problem).items():
        for name, leaf in leaves.items():
            np.testing.assert_allclose(leaf, expected[layer][name], **tight)

    for layer, trace in reference.traces(problem.params, problem).items():
        flat, unravel = jax.flatten_util.ravel_pytree(problem.params[layer])
        of_layer = lambda w: loss({**problem.params, layer: unravel(w)})  # noqa: B023, E731 - called at once
        hessian = jax.jit(jax.hessian(of_layer))(flat)
        np.testing.assert_allclose(trace, np.trace(hessian), **tight)


@pytest.mark.parametrize("seed", SEEDS)
def test_eq_1_first_moment(seed):
    m, g = draw(seed, 2, 5)
    actual = eq.first_moment(jnp.asarray(m), jnp.asarray(g), 0.9, 1 - 0.9)
    np.testing.assert_allclose(actual, 0.9 * m + 0.1 * g, rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("seed", SEEDS)
def test_eq_2_second_moment(seed):
    v, g = draw(seed, 2, 5) ** 2
    actual = eq.second_moment(jnp.asarray(v), jnp.asarray(g), 0.999)
    np.testing.assert_allclose(actual, 0.999 * v + 0.001 * g**2, rtol=RTOL)


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_eq_3_and_4_bias_correction(count):
    m = draw(count, 5)
    actual = eq.bias_corrected([jnp.asarray(m)], 0.999, jnp.asarray(count, jnp.int32))[0]
    # 1 - 0.999 loses three of the sixteen digits, and pow is good to a few roundings.
    np.testing.assert_allclose(actual, m / (1 - 0.999**count), rtol=1e-12)


def test_eq_3_keeps_the_dtype_of_each_moment():
    moments = {"half": jnp.ones(2, jnp.bfloat16), "double": jnp.ones(2, jnp.float64)}
    actual = eq.bias_corrected(moments, 0.5, jnp.asarray(1, jnp.int32))
    assert {k: v.dtype.name for k, v in actual.items()} == {"half": "bfloat16", "double": "float64"}
    assert actual["half"].tolist() == actual["double"].tolist() == [2.0, 2.0]  # exact in binary


@pytest.mark.parametrize("seed", SEEDS)
def test_eq_5_puts_eps_outside_the_root(seed):
    m, v = draw(seed, 5), draw(seed + 9, 5) ** 2
    actual = eq.adam_step(jnp.asarray(m), jnp.asarray(v), 0.1)
    np.testing.assert_allclose(actual, m / (np.sqrt(v) + 0.1), rtol=RTOL)


@pytest.mark.parametrize("seed", SEEDS)
def test_eq_6_decays_with_alpha_b1_and_keeps_the_weight(seed):
    m, g = draw(seed, 2, 5)
    alpha, b1 = jnp.asarray(1.3), 0.9
    actual = eq.first_moment(jnp.asarray(m), jnp.asarray(g), alpha * b1, 1 - b1)
    np.testing.assert_allclose(actual, 1.3 * 0.9 * m + 0.1 * g, rtol=RTOL, atol=RTOL)


def test_eq_8_divides_by_the_number_of_parameters():
    layers = resolve_layers("leaf", [jnp.ones(3), jnp.ones(4), jnp.ones(0)])
    # Exact in binary; a layer without parameters has no curvature.
    assert layers.average(jnp.asarray([6.0, -2.0, 0.0])).tolist() == [2.0, -0.5, 0.0]


@pytest.mark.parametrize("sensitivity", [0.01, 3.0, -3.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_eq_9_of_either_sign(seed, sensitivity):
    mean = draw(seed, 7)
    actual = eq.momentum_factor(jnp.asarray(mean), 0.5, 1.5, sensitivity)
    np.testing.assert_allclose(actual, 0.5 + 1 / (1 + np.exp(-sensitivity * mean)), rtol=RTOL)


def test_eq_9_with_lambda_above_zero_raises_alpha_where_curvature_is_high():
    """Finding 5: Section 5.1 says that high curvature lowers alpha; that is lambda < 0."""
    mean = jnp.linspace(-3.0, 3.0, 13)
    raised = np.diff(eq.momentum_factor(mean, 0.5, 1.5, 1.0))
    lowered = np.diff(eq.momentum_factor(mean, 0.5, 1.5, -1.0))
    assert (raised > 0).all()
    assert (lowered < 0).all()


@pytest.mark.parametrize(("dtype", "low", "high"), [("float32", 0.45, 1.9), ("float64", 0.3, 0.9)])
def test_eq_9_reaches_its_limits_and_never_passes_them(dtype, low, high):
    """Rounding makes low + (high - low) one ulp more than high for these, without the clip."""
    mean = jnp.asarray([-1e30, 1e30], dtype)
    limits = [jnp.asarray(limit, dtype) for limit in (low, high)]
    assert eq.momentum_factor(mean, *limits, 1.0).tolist() == [float(x) for x in limits]


@pytest.mark.parametrize("seed", SEEDS)
def test_lam_accumulator_and_step(seed):
    v, g = draw(seed, 5) ** 2, draw(seed + 9, 5)
    new = eq.lam_accumulator(jnp.asarray(v), jnp.asarray(g**2), 0.9)
    np.testing.assert_allclose(new, 0.1 * g**2 + 0.9 * v, rtol=RTOL)
    # The definition's sqrt(v) + eps, not Property 1's sqrt(v + eps).
    step = eq.lam_step(jnp.asarray(g), new, 0.1)
    np.testing.assert_allclose(step, g / (np.sqrt(new) + 0.1), rtol=RTOL)
