"""`hutchinson` and `exact_trace` against the exact Hessian and against theory.

The reference is `jax.hessian` of the raveled loss in double precision, with blocks cut by the
models' own structure: nothing of the library takes part in it.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.flatten_util import ravel_pytree
from models import MODELS, mlp, over_seeds

from lama_optax import exact_trace, hutchinson, layer_curvature

PROBES = ("rademacher", "gaussian", "sphere")
SCOPES = ("joint", "block")
HVPS = ("exact", "finite_difference")
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@functools.cache
def exact_means(model):
    """trace(H_l)/N_l for each module of ``model``, in float64."""
    with jax.enable_x64(True):
        params, loss_fn = model(jnp.float64)
        flat, unravel = ravel_pytree(params)
        hessian = np.asarray(jax.jit(jax.hessian(lambda x: loss_fn(unravel(x))))(flat))
        np.testing.assert_allclose(hessian, hessian.T, atol=1e-13)
        sizes = [sum(leaf.size for leaf in params[name].values()) for name in sorted(params)]
    diagonal_blocks = np.split(np.diag(hessian), np.cumsum(sizes)[:-1])
    return np.array([block.mean() for block in diagonal_blocks])


def estimate(params, loss_fn, estimator, seed=0, **options):
    """One estimate, jitted, since that compiles faster than operation by operation."""

    def run(p):
        return layer_curvature(p, seed, estimator=estimator, value_fn=loss_fn, **options)

    return jax.tree.map(np.asarray, jax.jit(run)(params))


# -- against the exact traces ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "dtype"), [("mlp", "float32"), *((model, "float64") for model in MODELS)]
)
def test_exact_trace_is_the_trace_of_each_block(model, dtype):
    with jax.enable_x64(dtype == "float64"):
        params, loss_fn = MODELS[model](dtype)
        result = estimate(params, loss_fn, exact_trace())
    assert result.mean.dtype == result.std_error.dtype == dtype
    # Second derivatives of size about 1 through some 100 operations, each rounded once.
    tolerance = 100 * np.finfo(dtype).eps
    expected = exact_means(MODELS[model])
    np.testing.assert_allclose(result.mean, expected, rtol=tolerance, atol=tolerance)
    assert not result.std_error.any()


def check_against_exact(model, probe, dtype, fd_step, seeds=8):
    """Every scope and product of one probe: each seed by itself and all together.

    With K = 200 a t-distributed error passes 5 standard errors with a chance of 1e-6, and all
    cases together make fewer than 1000 comparisons.
    """
    params, loss_fn = MODELS[model](dtype)
    exact = exact_means(MODELS[model])
    cases = list(itertools.product(SCOPES, HVPS))
    estimators = [
        hutchinson(200, probe=probe, scope=scope, hvp=hvp, fd_step=fd_step) for scope, hvp in cases
    ]
    results = over_seeds(seeds, params, loss_fn, *estimators)
    for case, result in zip(cases, results, strict=True):
        assert result.mean.dtype == result.std_error.dtype == dtype
        assert result.size[0].tolist() == [
            sum(leaf.size for leaf in params[name].values()) for name in sorted(params)
        ]
        error = result.mean - exact
        assert (result.std_error > 0).all(), case
        assert (abs(error) <= 5 * result.std_error).all(), (case, error / result.std_error)
        pooled = np.sqrt(np.mean(result.std_error**2, axis=0) / seeds)
        assert (abs(error.mean(axis=0)) <= 5 * pooled).all(), (case, error.mean(axis=0) / pooled)


@pytest.mark.parametrize(
    ("model", "probe"),
    [
        ("mlp", "rademacher"),
        ("convolution", "sphere"),
        *map(SLOW, ("mlp", "mlp", "attention"), ("gaussian", "sphere", "gaussian")),
    ],
)
def test_hutchinson_is_within_five_standard_errors(model, probe):
    # The paper's step of 1e-2 adds delta^2 times a fourth derivative (its first order is odd in
    # the probe and has mean 0): 1e-4 against standard errors of about 1e-2.
    check_against_exact(model, probe, "float32", fd_step=1e-2)


@pytest.mark.slow
def test_hutchinson_in_double_precision(x64):
    # A step of 1e-5 leaves nothing but sampling error.
    check_against_exact("convolution", "rademacher", "float64", fd_step=1e-5)


# -- the standard error ----------------------------------------------------------------------

QUADRATIC_SIZES = (4, 3)


def quadratic(dtype=jnp.float32):
    """0.5 x^T H x with a dense H of our own: layers of 4 and 3 entries."""
    a = np.random.default_rng(0).normal(size=(7, 7))
    hessian = (a + a.T) / 2

    def loss_fn(p):
        x = jnp.concatenate([p["a"], p["b"]])
        return 0.5 * x @ jnp.asarray(hessian, dtype) @ x

    return {"a": jnp.ones(4, dtype), "b": jnp.ones(3, dtype)}, loss_fn, hessian


def variance_of_one_sample(hessian, probe, scope):
    """Var[v_l^T (H v)_l] / N_l^2 by the textbook, for both layers.

    Within the block, Rademacher: twice the squared off-diagonal; Gaussian: twice the squared
    Frobenius norm; sphere: 2N/(N+2) (||H||_F^2 - tr(H)^2/N). A joint probe adds the squared
    entries that couple the layer to the others, since E[v v^T] = I and blocks are independent.
    """
    variances = []
    start = 0
    for n in QUADRATIC_SIZES:
        rows = hessian[start : start + n]
        block = rows[:, start : start + n]
        squares = np.sum(block**2)
        variance = {
            "rademacher": 2 * (squares - np.sum(np.diag(block) ** 2)),
            "gaussian": 2 * squares,
            "sphere": 2 * n / (n + 2) * (squares - np.trace(block) ** 2 / n),
        }[probe]
        if scope == "joint":
            variance += np.sum(rows**2) - squares
        variances.append(variance / n**2)
        start += n
    return np.array(variances)


@pytest.mark.parametrize("probe", PROBES)
def test_the_variance_is_the_textbooks(probe):
    """K = 2, where dividing by K instead of K - 1 would halve the squared standard error."""
    params, loss_fn, hessian = quadratic()
    seeds = 4000
    estimators = [hutchinson(2, probe=probe, scope=scope) for scope in SCOPES]
    results = over_seeds(seeds, params, loss_fn, *estimators)
    truth = np.array([np.trace(hessian[:4, :4]) / 4, np.trace(hessian[4:, 4:]) / 3])
    for scope, result in zip(SCOPES, results, strict=True):
        expected = variance_of_one_sample(hessian, probe, scope) / 2
        # 4000 unbiased estimates of the variance, and the estimates' squared distance from the
        # truth, which it is the variance of: both within 5 of their own standard errors.
        for squared in (result.std_error**2, (result.mean - truth) ** 2):
            error = squared.mean(axis=0) - expected
            allowed = 5 * squared.std(axis=0) / np.sqrt(seeds)
            assert (abs(error) <= allowed).all(), (scope, error / expected)


def test_the_standard_error_covers_the_truth():
    """A 90 % interval from K = 100 probes covers the exact mean in 90 % of 2000 seeds."""
    params, loss_fn = mlp()
    num_probes, seeds = 100, 2000
    quantile = scipy.stats.t.ppf(0.95, num_probes - 1)
    (result,) = over_seeds(seeds, params, loss_fn, hutchinson(num_probes))
    covered = abs(result.mean - exact_means(mlp)) <= quantile * result.std_error
    # Five binomial standard errors of 0.0067, and 0.01 because one sample is skewed, not
    # normal: by Edgeworth's expansion coverage then errs by order skewness^2/K.
    tolerance = 5 * np.sqrt(0.9 * 0.1 / seeds) + 0.01
    assert (abs(covered.mean(axis=0) - 0.9) <= tolerance).all(), covered.mean(axis=0)


def test_one_probe_has_no_standard_error():
    params, loss_fn = mlp()
    for result in over_seeds(2, params, loss_fn, *(hutchinson(1, scope=s) for s in SCOPES)):
        assert np.isfinite(result.mean).all()
        assert np.isnan(result.std_error).all()
    assert "NaN with ``num_probes=1``" in hutchinson.__doc__


def test_a_diagonal_hessian_needs_one_rademacher_probe():
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}

    def loss_fn(p):
        return jnp.sum(p["a"] ** 2) + 2 * jnp.sum(p["b"] ** 4)

    result = estimate(params, loss_fn, hutchinson(3))
    assert result.mean.tolist() == [2.0, 24.0]
    assert result.std_error.tolist() == [0.0, 0.0]


# -- joint against block ---------------------------------------------------------------------


def test_block_scope_has_no_noise_from_other_layers():
    """A loss whose whole Hessian couples two layers: each block is 0, and so is each sample."""
    coupling = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}

    def loss_fn(p):
        return p["a"] @ coupling @ p["b"]

    cases = list(itertools.product(SCOPES, HVPS))
    estimators = [hutchinson(5, probe="sphere", hvp=hvp, scope=scope) for scope, hvp in cases]
    results = over_seeds(4, params, loss_fn, *estimators)
    for (scope, _), result in zip(cases, results, strict=True):
        if scope == "block":
            assert not result.mean.any()
            assert not result.std_error.any()
        else:
            assert (result.std_error > 0.01).all()


@pytest.mark.parametrize(
    ("scope", "order"), [("joint", ("a", "b")), ("joint", ("b", "a")), ("block", ("a", "b"))]
)
def test_infinite_curvature_of_one_layer_leaves_the_other_alone(scope, order):
    rough, smooth = order
    params = {rough: jnp.zeros(2), smooth: jnp.ones(2)}

    def loss_fn(p):
        return jnp.sum(p[rough] ** 1.5) + jnp.sum(p[smooth] ** 2)

    result = estimate(params, loss_fn, hutchinson(3, scope=scope))
    means = dict(zip(sorted(order), result.mean.tolist(), strict=True))
    assert not np.isfinite(means[rough])
    assert means[smooth] == 2.0


def test_block_scope_is_the_joint_one_for_a_single_layer():
    params, loss_fn, _ = quadratic()
    params = {"all": params}
    estimators = [hutchinson(4, scope=scope) for scope in SCOPES]
    joint, block = over_seeds(2, params, lambda p: loss_fn(p["all"]), *estimators)
    # The same probes and products; sums of 7 products, compiled in different loops.
    np.testing.assert_allclose(joint.mean, block.mean, rtol=20 * np.finfo(np.float32).eps)


# -- chunks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "hvp", "chunks"),
    [("joint", "exact", (5, 3, 11)), SLOW("block", "finite_difference", [3])],
)
def test_chunks_change_nothing(x64, scope, hvp, chunks):
    """K = 10: chunks that divide it, that leave a remainder, and more than K."""
    params, loss_fn, _ = quadratic(jnp.float64)
    first, *others = over_seeds(
        2,
        params,
        loss_fn,
        *(hutchinson(10, scope=scope, hvp=hvp, chunk_size=chunk) for chunk in (None, *chunks)),
    )
    # Equal samples up to the rounding of differently compiled products; the finite difference
    # divides its rounding by 1e-2.
    rtol = 1e-13 if hvp == "exact" else 1e-11
    for other in others:
        np.testing.assert_allclose(other.mean, first.mean, rtol=rtol)
        np.testing.assert_allclose(other.std_error, first.std_error, rtol=rtol)


def test_a_large_model_is_not_vmapped_over_all_probes():
    """By default the temporaries of 64 probes on 2^15 parameters stay far below 64 copies."""
    params = {"w": jnp.ones(2**15)}

    def memory(chunk_size):
        def estimate(p):
            estimator = hutchinson(64, probe="gaussian", chunk_size=chunk_size)
            return layer_curvature(
                p, 0, estimator=estimator, value_fn=lambda p: jnp.sum(jnp.sin(p["w"]))
            ).mean

        compiled = jax.jit(estimate).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # In a loop a few copies of the parameters are alive at once, vmapped at least 64.
    copy = 4 * 2**15
    assert memory(64) >= 64 * copy
    assert memory(None) <= 16 * copy
