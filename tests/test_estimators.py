"""The estimators against the exact Hessian, against theory, and against bad input.

The reference is `jax.hessian` of the raveled loss in double precision, with blocks cut by the
models' own structure: nothing of the library takes part in it.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from jax.flatten_util import ravel_pytree
from models import MODELS, mlp

from lama_optax import Estimator, exact_trace, hutchinson, layer_curvature

PROBES = ("rademacher", "gaussian", "sphere")
SCOPES = ("joint", "block")
HVPS = ("exact", "finite_difference")


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    if request.param == "float64":
        request.getfixturevalue("x64")
    return request.param


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


def over_seeds(seeds, params, loss_fn, *estimators):
    """Estimates for many keys, as NumPy arrays: one compilation, the keys shared by all."""
    keys = jax.random.split(jax.random.key(0), seeds)

    def estimate(key):
        return [
            layer_curvature(params, key, estimator=estimator, value_fn=loss_fn)
            for estimator in estimators
        ]

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(estimate))(keys))


def estimate(params, loss_fn, estimator, seed=0, **options):
    """One estimate, jitted, since that compiles faster than operation by operation."""

    def run(p):
        return layer_curvature(p, seed, estimator=estimator, value_fn=loss_fn, **options)

    return jax.tree.map(np.asarray, jax.jit(run)(params))


# -- against the exact traces ----------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_exact_trace_is_the_trace_of_each_block(model, dtype):
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
    [*(("mlp", probe) for probe in PROBES), ("convolution", "sphere"), ("attention", "gaussian")],
)
def test_hutchinson_is_within_five_standard_errors(model, probe):
    # The paper's step of 1e-2 adds delta^2 times a fourth derivative (its first order is odd in
    # the probe and has mean 0): 1e-4 against standard errors of about 1e-2.
    check_against_exact(model, probe, "float32", fd_step=1e-2)


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
    estimators = [hutchinson(num_probes, scope=scope) for scope in SCOPES]
    quantile = scipy.stats.t.ppf(0.95, num_probes - 1)
    for result in over_seeds(seeds, params, loss_fn, *estimators):
        covered = abs(result.mean - exact_means(mlp)) <= quantile * result.std_error
        # Five binomial standard errors of 0.0067, and 0.01 because one sample is skewed, not
        # normal: by Edgeworth's expansion coverage then errs by order skewness^2/K.
        tolerance = 5 * np.sqrt(0.9 * 0.1 / seeds) + 0.01
        assert (abs(covered.mean(axis=0) - 0.9) <= tolerance).all(), covered.mean(axis=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_one_probe_has_no_standard_error(scope):
    params, loss_fn = mlp()
    result = estimate(params, loss_fn, hutchinson(1, scope=scope))
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


@pytest.mark.parametrize("probe", PROBES)
def test_block_scope_has_no_noise_from_other_layers(probe):
    """A loss whose whole Hessian couples two layers: each block is 0, and so is each sample."""
    coupling = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}

    def loss_fn(p):
        return p["a"] @ coupling @ p["b"]

    cases = list(itertools.product(SCOPES, HVPS))
    estimators = [hutchinson(5, probe=probe, hvp=hvp, scope=scope) for scope, hvp in cases]
    results = over_seeds(4, params, loss_fn, *estimators)
    for (scope, _), result in zip(cases, results, strict=True):
        if scope == "block":
            assert not result.mean.any()
            assert not result.std_error.any()
        else:
            assert (result.std_error > 0.01).all()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
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
    params, loss_fn = mlp()
    labels = {"Dense_0": "all", "Dense_1": "all"}
    joint, block = (
        estimate(params, loss_fn, hutchinson(4, scope=scope), seed=3, layers=labels)
        for scope in SCOPES
    )
    # The same probes and products; sums of 17 products, compiled in different loops.
    np.testing.assert_allclose(joint.mean, block.mean, rtol=17 * np.finfo(np.float32).eps)


# -- chunks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("scope", "hvp"), [("joint", "exact"), ("block", "finite_difference")])
def test_chunks_change_nothing(x64, scope, hvp):
    """K = 10: chunks that divide it, that leave a remainder, one at a time, and more than K."""
    params, loss_fn, _ = quadratic(jnp.float64)
    first, *others = over_seeds(
        2,
        params,
        loss_fn,
        *(hutchinson(10, scope=scope, hvp=hvp, chunk_size=chunk) for chunk in (None, 1, 3, 5, 11)),
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


# -- the finite difference -------------------------------------------------------------------


def cubic_error(step, dtype):
    """Estimate minus truth for w^3 at w = 1, one probe v = +-1.

    The gradient is 3 w^2, so (g(1 + delta v) - g(1)) / delta = 6 v + 3 delta v^2, and the error
    of v H v is 3 delta v: first order and nothing else.
    """
    estimator = hutchinson(1, hvp="finite_difference", fd_step=step)
    result = layer_curvature(
        {"w": jnp.ones((), dtype)}, 0, estimator=estimator, value_fn=lambda p: p["w"] ** 3
    )
    return abs(float(result.mean[0]) - 6.0)


# From a step where truncation rules down to the step where rounding is as large.
@pytest.mark.parametrize(
    "exponents", [pytest.param((0, 3), id="coarse"), pytest.param((3, 6), id="fine")]
)
def test_the_finite_differences_error_is_first_order(dtype, exponents):
    eps = float(np.finfo(dtype).eps)
    steps = np.logspace(-exponents[0], -exponents[1], 7)
    for step in steps[steps > np.sqrt(24 * eps / 3)].tolist():
        # w + delta v is rounded by eps/2, the gradient there (at most 12) by 2 eps, the difference
        # of gradients by less: in all fewer than 3 (1 + delta)^2 x 4 eps, over delta.
        rounding = 12 * (1 + step) ** 2 * eps / step
        assert abs(cubic_error(step, dtype) - 3 * step) <= rounding, step


def test_the_finite_difference_is_best_near_the_root_of_eps(dtype):
    """Error 3 delta + O(eps)/delta."""
    eps = float(np.finfo(dtype).eps)
    assert cubic_error(float(np.sqrt(eps)), dtype) <= 15 * np.sqrt(eps) * 1.01  # as above
    # Below the grid at 1 there is no step to take.
    assert np.isnan(cubic_error(0.1 * eps, dtype))


@pytest.mark.parametrize("model", ["mlp", "convolution"])
def test_the_finite_difference_converges_on_a_network(x64, model):
    """The same probes, a step ten times smaller: a difference from the exact product of a tenth."""
    params, loss_fn = MODELS[model](jnp.float64)
    estimators = [
        hutchinson(1, hvp=hvp, fd_step=step, scope=scope)
        for scope in SCOPES
        for hvp, step in [("exact", 1.0), ("finite_difference", 1e-3), ("finite_difference", 1e-4)]
    ]
    means = [result.mean for result in over_seeds(5, params, loss_fn, *estimators)]
    for exact, *approximate in (means[:3], means[3:]):
        coarse, fine = (np.linalg.norm(mean - exact) for mean in approximate)
        # The next order is smaller by delta times a ratio of derivatives, which is below 30 for
        # these losses: 3 % of the ratio. Rounding, eps/delta = 2e-12, is far below the fine error.
        assert coarse > 1e-6
        np.testing.assert_allclose(coarse / fine, 10, rtol=0.03)


# -- what users pass -------------------------------------------------------------------------

ESTIMATORS = [
    exact_trace,
    *(
        functools.partial(hutchinson, 8, hvp=hvp, scope=scope)
        for hvp, scope in itertools.product(HVPS, SCOPES)
    ),
]


@pytest.mark.parametrize("make", [exact_trace, hutchinson])
def test_has_aux_drops_the_auxiliary_output(make):
    params, loss_fn = mlp()

    def with_aux(p):
        value = loss_fn(p)
        return value, {"value": value, "count": jnp.int32(3), "words": None}

    plain = estimate(params, loss_fn, make())
    aux = estimate(params, with_aux, make(has_aux=True))
    # The auxiliary output takes no part, but it may change how the loss is compiled; a finite
    # difference divides that rounding, 6e-8 of gradients below 1, by 1e-2.
    np.testing.assert_allclose(aux.mean, plain.mean, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("make", ESTIMATORS)
def test_layers_without_parameters_have_no_curvature(make):
    params = {
        "a": {"empty": jnp.zeros((0, 3)), "w": jnp.ones(2)},
        "b": {"empty": jnp.zeros(0)},
        "c": {},
    }

    def loss_fn(p):
        return jnp.sum(p["a"]["w"] ** 2) + jnp.sum(p["a"]["empty"]) + jnp.sum(p["b"]["empty"])

    result = estimate(params, loss_fn, make())
    # 2 w has no truncation error; rounding of 1 + 0.01 over 0.01 is 1e-5.
    np.testing.assert_allclose(result.mean, [2.0, 0.0], rtol=2e-5)
    np.testing.assert_allclose(result.std_error, 0, atol=2e-5)
    assert result.size.tolist() == [2, 0]


@pytest.mark.parametrize("make", ESTIMATORS)
@pytest.mark.parametrize("params", [{}, None, {"a": []}, {"a": {"w": np.zeros((0, 3), "f4")}}])
def test_no_parameters_at_all(make, params):
    result = layer_curvature(params, 0, estimator=make(), value_fn=lambda p: jnp.zeros(()))
    layers = 1 if jax.tree.leaves(params) else 0
    assert result.mean.tolist() == [0.0] * layers
    assert result.size.tolist() == [0] * layers


@pytest.mark.parametrize("make", ESTIMATORS)
def test_parameters_of_mixed_precision(make):
    """Strict promotion is on: every product must be of one dtype."""
    params = {
        "a": {"w": jnp.ones(4, jnp.bfloat16), "b": jnp.ones(4, jnp.float32)},
        "c": {"w": jnp.ones(8, jnp.float16)},
    }

    def loss_fn(p):
        squares = jax.tree.map(lambda x: jnp.sum(x.astype(jnp.float32) ** 2), p)
        return squares["a"]["w"] + squares["a"]["b"] + 0.5 * squares["c"]["w"]

    def check(estimator, rounding):
        result = estimate(params, loss_fn, estimator)
        assert result.mean.dtype == result.std_error.dtype == jnp.float32
        atol = 5 * result.std_error + rounding
        assert (abs(result.mean - np.array([2.0, 1.0])) <= atol).all(), estimator

    if make is exact_trace:
        check(make(), 0.0)
        return
    # 1 +- 1/4 is exact in bfloat16, where 1 +- 0.01 is not: Rademacher probes make no error.
    check(make(fd_step=0.25), 0.0)
    # The other probes are rounded to bfloat16, their squares by 2^-8 then, and 1 + v/4 for finite
    # differences by 2^-8 before the division by 1/4.
    for probe in ("gaussian", "sphere"):
        check(make(probe=probe, fd_step=0.25), 2**-5)


def abstract(params, loss_fn, estimator, **options):
    """Shapes and dtypes of an estimate, without compiling it."""

    def run(p):
        return layer_curvature(p, 0, estimator=estimator, value_fn=loss_fn, **options)

    return jax.eval_shape(run, params)


def test_a_double_leaf_makes_the_estimate_double(x64):
    params = {"a": jnp.ones(2, jnp.float32), "b": jnp.full(2, 1 / 3, jnp.float64)}

    def loss_fn(p):
        return jnp.sum(p["a"].astype(jnp.float64) ** 2) + jnp.sum(p["b"] ** 2)

    for make in ESTIMATORS:
        result = abstract(params, loss_fn, make())
        assert result.mean.dtype == result.std_error.dtype == jnp.float64
        assert result.size.dtype == jnp.int32


def test_the_fields_of_the_result():
    params, loss_fn = mlp()
    for make in ESTIMATORS:
        result = abstract(params, loss_fn, make())
        assert result._fields == ("mean", "std_error", "size")
        assert [x.shape for x in result] == [(2,)] * 3
        assert [x.dtype for x in result] == [jnp.float32, jnp.float32, jnp.int32]


def test_layers_as_elsewhere():
    params, loss_fn = mlp()
    module, leaf = (
        estimate(params, loss_fn, exact_trace(), layers=layers) for layers in ("module", "leaf")
    )
    # A module's trace is the sum of its leaves'; four sums of at most 12 float32 numbers.
    traces = (leaf.mean * leaf.size).reshape(2, 2).sum(axis=1)
    np.testing.assert_allclose(traces, module.mean * module.size, rtol=50 * np.finfo("f4").eps)


def test_a_key_is_a_seed_a_key_or_its_data():
    params, loss_fn, _ = quadratic()
    keys = [
        3,
        np.int32(3),
        jax.random.key(3),
        jax.random.key_data(jax.random.key(3)),
        jax.random.PRNGKey(3),
        np.asarray(jax.random.PRNGKey(3)),
    ]
    run = jax.jit(
        lambda key: layer_curvature(params, key, estimator=hutchinson(4), value_fn=loss_fn).mean
    )
    means = [run(key).tolist() for key in keys]
    assert all(mean == means[0] for mean in means)
    assert run(4).tolist() != means[0]


def test_other_arguments_are_ignored():
    params, loss_fn = mlp()
    for make in ESTIMATORS:
        result = abstract(params, loss_fn, make(), loss=1.0, grads=params, step=None)
        assert result == abstract(params, loss_fn, make())


def test_estimators_are_records():
    """Not callables, which `optax.inject_hyperparams` would take for schedules."""
    for make in ESTIMATORS:
        assert isinstance(make(), Estimator)
        assert not callable(make())
        assert make() == make()
        assert hash(make()) == hash(make())
        assert make(has_aux=True) != make()


def test_nothing_is_compiled_twice():
    """Nor does the number of probes or layers multiply what is traced."""
    params, loss_fn, _ = quadratic()
    counts = {}
    for estimator in (
        exact_trace(),
        hutchinson(3),
        hutchinson(200),
        hutchinson(200, chunk_size=7),
        hutchinson(3, hvp="finite_difference", scope="block"),
    ):
        traces = []

        def counted(p, traces=traces):
            traces.append(1)
            return loss_fn(p)

        @jax.jit
        def run(p, key, estimator=estimator, counted=counted):
            return layer_curvature(p, key, estimator=estimator, value_fn=counted).mean

        run(params, jax.random.key(0))
        counts[estimator] = len(traces)
        run(jax.tree.map(lambda x: 2 * x, params), jax.random.key(1))
        run(params, jax.random.key(2))
        assert len(traces) == counts[estimator], "traced again"
    # Once for a product and once at params for finite differences; a loop traces its body for
    # the shapes once more, and once for the chunk that is left over.
    assert max(counts.values()) <= 4, counts


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_probes": 0}, "num_probes must be an integer of at least 1; got 0"),
        ({"num_probes": -1}, "num_probes must be an integer of at least 1; got -1"),
        ({"num_probes": 2.5}, "num_probes must be an integer of at least 1; got 2.5"),
        ({"num_probes": 10.0}, "num_probes must be an integer of at least 1; got 10.0"),
        ({"num_probes": True}, "num_probes must be an integer of at least 1; got True"),
        ({"num_probes": "10"}, "num_probes must be an integer of at least 1; got '10'"),
        ({"num_probes": None}, "num_probes must be an integer of at least 1; got None"),
        (
            {"probe": "normal"},
            "probe must be one of 'rademacher', 'gaussian', 'sphere'; got 'normal'",
        ),
        ({"probe": None}, "probe must be one of 'rademacher', 'gaussian', 'sphere'; got None"),
        ({"hvp": "jvp"}, "hvp must be one of 'exact', 'finite_difference'; got 'jvp'"),
        ({"scope": "layer"}, "scope must be one of 'joint', 'block'; got 'layer'"),
        ({"fd_step": 0}, "fd_step must be a positive number; got 0"),
        ({"fd_step": -0.01}, "fd_step must be a positive number; got -0.01"),
        ({"fd_step": float("nan")}, "fd_step must be a positive number; got nan"),
        ({"fd_step": float("inf")}, "fd_step must be a positive number; got inf"),
        ({"fd_step": None}, "fd_step must be a positive number; got None"),
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1; got 0"),
        ({"chunk_size": 2.0}, "chunk_size must be an integer of at least 1; got 2.0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        hutchinson(**options)


def _masked(params):
    return {**params, "Dense_0": optax.MaskedNode()}


@pytest.mark.parametrize("make", ESTIMATORS)
@pytest.mark.parametrize(
    ("value_fn", "message"),
    [
        (None, "value_fn=lambda p: loss_fn(p, batch)"),
        (3.0, "value_fn must be a function of params; got 3.0"),
        (lambda p: jnp.ones(2), r"must return a real floating-point scalar; got shape (2,)"),
        (lambda p: jnp.ones((1,)), r"must return a real floating-point scalar; got shape (1,)"),
        (lambda p: jnp.int32(3), "must return a real floating-point scalar; got shape () and"),
        (lambda p: jnp.complex64(3), "must return a real floating-point scalar"),
        (lambda p: None, "must return a real floating-point scalar"),
        (lambda p: {"loss": jnp.ones(())}, "must return a real floating-point scalar"),
        (lambda p: (jnp.ones(()), {}), "has_aux=True"),
    ],
)
def test_bad_objective(make, value_fn, message):
    params, _ = mlp()
    arguments = {} if value_fn is None else {"value_fn": value_fn}
    with pytest.raises(ValueError, match=re.escape(message)):
        layer_curvature(params, 0, estimator=make(), **arguments)


@pytest.mark.parametrize("make", ESTIMATORS)
@pytest.mark.parametrize("value", [1.0, (1.0,), (1.0, 2.0, 3.0), [1.0, 2.0]])
def test_no_auxiliary_output(make, value):
    params, _ = mlp()
    with pytest.raises(ValueError, match=r"value_fn must return \(value, aux\) with has_aux=True"):
        layer_curvature(params, 0, estimator=make(has_aux=True), value_fn=lambda p: value)


@pytest.mark.parametrize("make", ESTIMATORS)
def test_the_scalar_beside_the_auxiliary_output_is_checked_too(make):
    params, _ = mlp()
    with pytest.raises(ValueError, match="must return a real floating-point scalar"):
        layer_curvature(
            params, 0, estimator=make(has_aux=True), value_fn=lambda p: (jnp.ones(2), None)
        )


@pytest.mark.parametrize("make", ESTIMATORS)
def test_hidden_parameters_ask_for_curvature(make):
    """As `optax.masked` and `optax.partition` pass them: the loss could not read them."""
    params, loss_fn = mlp()
    with pytest.raises(ValueError, match=r"(?s)MaskedNode.*as curvature="):
        layer_curvature(_masked(params), 0, estimator=make(), value_fn=loss_fn)


def test_integer_parameters_are_refused():
    with pytest.raises(ValueError, match=r"params\['n'\] is int32"):
        layer_curvature(
            {"n": jnp.ones(2, jnp.int32)}, 0, estimator=exact_trace(), value_fn=lambda p: 0.0
        )
