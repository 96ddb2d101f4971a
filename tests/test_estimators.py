"""What users pass to the estimators that read `value_fn`: shapes, dtypes, keys, and bad input."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import mlp

from lama_optax import Estimator, exact_trace, hutchinson, layer_curvature

ESTIMATORS = [
    exact_trace,
    *(
        functools.partial(hutchinson, 8, hvp=hvp, scope=scope)
        for hvp, scope in itertools.product(("exact", "finite_difference"), ("joint", "block"))
    ),
]


def estimates(params, loss_fn, *estimators):
    """All estimates by one program."""

    def run(p):
        return [layer_curvature(p, 0, estimator=e, value_fn=loss_fn) for e in estimators]

    return jax.tree.map(np.asarray, jax.jit(run)(params))


def test_has_aux_drops_the_auxiliary_output():
    params, loss_fn = mlp()

    def with_aux(p):
        value = loss_fn(p)
        return value, {"value": value, "count": jnp.int32(3), "words": None}

    made = (exact_trace, hutchinson)

    @jax.jit
    def means(p):
        return [
            [layer_curvature(p, 0, estimator=make(), value_fn=loss_fn).mean for make in made],
            [
                layer_curvature(p, 0, estimator=make(has_aux=True), value_fn=with_aux).mean
                for make in made
            ],
        ]

    # The auxiliary output takes no part; a finite difference divides rounding, 6e-8, by 1e-2.
    np.testing.assert_allclose(*means(params), rtol=1e-5, atol=5e-5)


def test_layers_without_parameters_have_no_curvature():
    params = {
        "a": {"empty": jnp.zeros((0, 3)), "w": jnp.ones(2)},
        "b": {"empty": jnp.zeros(0)},
        "c": {},
    }

    def loss_fn(p):
        return jnp.sum(p["a"]["w"] ** 2) + jnp.sum(p["a"]["empty"]) + jnp.sum(p["b"]["empty"])

    for result in estimates(params, loss_fn, *(make() for make in ESTIMATORS)):
        # 2 w has no truncation error; rounding of 1 + 0.01 over 0.01 is 1e-5.
        np.testing.assert_allclose(result.mean, [2.0, 0.0], rtol=2e-5)
        np.testing.assert_allclose(result.std_error, 0, atol=2e-5)
        assert result.size.tolist() == [2, 0]


@pytest.mark.parametrize("params", [{"a": [], "b": None}, {"a": {"w": np.zeros((0, 3), "f4")}}])
def test_no_parameters_at_all(params):
    layers = 1 if jax.tree.leaves(params) else 0
    made = estimates(params, lambda p: jnp.zeros(()), *(make() for make in ESTIMATORS))
    for result in made:
        assert result.mean.tolist() == [0.0] * layers
        assert result.size.tolist() == [0] * layers


def test_parameters_of_mixed_precision():
    """Strict promotion is on: every product must be of one dtype."""
    params = {
        "a": {"w": jnp.ones(4, jnp.bfloat16), "b": jnp.ones(4, jnp.float32)},
        "c": {"w": jnp.ones(8, jnp.float16)},
    }

    def loss_fn(p):
        squares = jax.tree.map(lambda x: jnp.sum(x.astype(jnp.float32) ** 2), p)
        return squares["a"]["w"] + squares["a"]["b"] + 0.5 * squares["c"]["w"]

    # 1 +- 1/4 is exact in bfloat16, where 1 +- 0.01 is not: Rademacher probes make no error.
    rounding = {exact_trace(): 0.0} | {make(fd_step=0.25): 0.0 for make in ESTIMATORS[1:]}
    # The other probes are rounded to bfloat16, their squares by 2^-8 then, and 1 + v/4 for finite
    # differences by 2^-8 before the division by 1/4.
    rounding[hutchinson(8, probe="gaussian")] = 2**-5
    rounding[
        hutchinson(8, probe="sphere", hvp="finite_difference", scope="block", fd_step=0.25)
    ] = 2**-5
    made = estimates(params, loss_fn, *rounding)
    for (estimator, allowed), result in zip(rounding.items(), made, strict=True):
        assert result.mean.dtype == result.std_error.dtype == jnp.float32
        atol = 5 * result.std_error + allowed
        assert (abs(result.mean - np.array([2.0, 1.0])) <= atol).all(), estimator


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

    def by_layers(p):
        return [
            layer_curvature(p, 0, estimator=exact_trace(), value_fn=loss_fn, layers=layers)
            for layers in ("module", "leaf")
        ]

    module, leaf = jax.tree.map(np.asarray, jax.jit(by_layers)(params))
    # A module's trace is the sum of its leaves'; four sums of at most 12 float32 numbers.
    traces = (leaf.mean * leaf.size).reshape(2, 2).sum(axis=1)
    np.testing.assert_allclose(traces, module.mean * module.size, rtol=50 * np.finfo("f4").eps)


def test_a_key_is_a_seed_a_key_or_its_data():
    params = jnp.ones(3)

    def loss_fn(p):
        return jnp.sum(p) ** 2

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


def test_nothing_is_traced_twice():
    """Nor does the number of probes or layers multiply what is traced."""
    params, loss_fn = mlp()
    counts = {}
    for estimator in (
        exact_trace(),
        hutchinson(3),
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

        run.eval_shape(params, jax.random.key(0))
        counts[estimator] = len(traces)
        run.eval_shape(jax.tree.map(lambda x: 2 * x, params), jax.random.key(1))
        assert len(traces) == counts[estimator], "traced again"
    # Once for a product and once at params for finite differences; a loop traces its body for
    # the shapes once more, and once for the chunk that is left over.
    assert max(counts.values()) <= 4, counts


# -- bad input -------------------------------------------------------------------------------


def _masked(params):
    return {**params, "Dense_0": optax.MaskedNode()}


@pytest.mark.parametrize("make", [exact_trace, hutchinson])
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


@pytest.mark.parametrize("make", [exact_trace, hutchinson])
@pytest.mark.parametrize("value", [1.0, (1.0,), (1.0, 2.0, 3.0), [1.0, 2.0]])
def test_no_auxiliary_output(make, value):
    params, _ = mlp()
    with pytest.raises(ValueError, match=r"value_fn must return \(value, aux\) with has_aux=True"):
        layer_curvature(params, 0, estimator=make(has_aux=True), value_fn=lambda p: value)


@pytest.mark.parametrize("make", [exact_trace, hutchinson])
def test_the_scalar_beside_the_auxiliary_output_is_checked_too(make):
    params, _ = mlp()
    with pytest.raises(ValueError, match="must return a real floating-point scalar"):
        layer_curvature(
            params, 0, estimator=make(has_aux=True), value_fn=lambda p: (jnp.ones(2), None)
        )


@pytest.mark.parametrize("make", [exact_trace, hutchinson])
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
