"""What is wrong gets a `ValueError` that names the argument, its value and what is allowed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lama_optax import (
    exact_trace,
    hutchinson,
    lam,
    lam_scale,
    lama_adam,
    lama_scale,
    layer_curvature,
    layer_names,
)

PARAMS = {
    "Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    "Dense_1": {"kernel": jnp.ones((3, 1)), "bias": jnp.ones(1)},
}
nan, inf = float("nan"), float("inf")


def loss(params):
    return functools.reduce(jnp.add, [jnp.sum(p**2) for p in jax.tree.leaves(params)])


DECAY = ("in [0, 1)", [1.0, -0.1, 1, 1.5, nan, inf, "0.9", None, [0.9], np.ones(1), 1j])
NOT_NEGATIVE = ("a number of at least 0", [-1e-9, nan, inf, "1", None, [1.0], np.ones(2)])
FLAG = ("True or False", [3, 0, "True", None])
COUNT = ("an integer of at least 1", [0, -1, 1.5, True, "3", None])

# argument -> what is allowed, and values that are not
LAMA = {
    "b1": DECAY,
    "b2": DECAY,
    "eps": NOT_NEGATIVE,
    "alpha_min": NOT_NEGATIVE,
    "alpha_max": NOT_NEGATIVE,
    "sensitivity": ("a finite number", [nan, inf, -inf, "1", None, np.ones(2)]),
    "update_interval": COUNT,
    "curvature_decay": DECAY,
    "max_momentum": ("None or in [0, 1)", [1.0, -0.1, nan, inf, "0.9", np.ones(1)]),
    "momentum": ("one of 'paper', 'ema'", ["adam", "", None, 1]),
    "layers": ("one of 'module', 'leaf'", ["block", ""]),
    "axis_name": ("None or the name of a mapped axis", [0, 1.5]),
    "key": (
        "an integer seed, one typed PRNG key or the raw data of one",
        [1.5, None, "0", True, np.ones(2)],
    ),
    "estimator": ("a record with an `estimate` method", [hutchinson, None, "exact", loss, 3]),
}
LAM = {
    "decay": DECAY,
    "eps": NOT_NEGATIVE,
    "granularity": ("one of 'weight', 'layer'", ["module", "", None, 1]),
    "layers": ("one of 'module', 'leaf'", ["block", ""]),
}
HUTCHINSON = {
    "num_probes": COUNT,
    "probe": ("one of 'rademacher', 'gaussian', 'sphere'", ["normal", "", None, 1]),
    "hvp": ("one of 'exact', 'finite_difference'", ["fd", "", None]),
    "fd_step": ("a positive number", [0, 0.0, -1e-2, nan, inf, "1", None]),
    "scope": ("one of 'joint', 'block'", ["layer", "", None]),
    "chunk_size": ("an integer of at least 1", [0, -1, 1.5, True, "3"]),
    "has_aux": FLAG,
}
TABLES = {
    "lama_scale": (lama_scale, LAMA),
    "lama_adam": (
        functools.partial(lama_adam, 0.1),
        {**LAMA, "weight_decay": NOT_NEGATIVE},
    ),
    "lam_scale": (lam_scale, LAM),
    "lam": (functools.partial(lam, 0.1), LAM),
    "hutchinson": (hutchinson, HUTCHINSON),
    "exact_trace": (exact_trace, {"has_aux": FLAG}),
}
ARGUMENTS = [(function, argument) for function, (_, table) in TABLES.items() for argument in table]


@pytest.mark.parametrize(("function", "argument"), ARGUMENTS)
def test_invalid_argument(function, argument):
    call, table = TABLES[function]
    allowed, values = table[argument]
    for value in values:
        with pytest.raises(ValueError, match=rf"^{argument} must be ") as error:
            call(**{argument: value})
        message = str(error.value)
        assert message.startswith(f"{argument} must be {allowed}"), message
        assert message.endswith(f"got {value!r}."), message


def test_numbers_of_every_kind_are_allowed():
    for number in (0.5, 0, np.float32(0.5), np.asarray(0.5), jnp.asarray(0.5)):
        lama_scale(number, number, number, alpha_min=number, sensitivity=number)
        lama_scale(curvature_decay=number, max_momentum=number)
        lam_scale(number, number)


def test_alpha_min_above_alpha_max():
    message = r"alpha_min must be at most alpha_max; got 1\.6 > 1\.5"
    with pytest.raises(ValueError, match=message):
        lama_adam(0.1, alpha_min=1.6)
    with pytest.raises(ValueError, match="alpha_min must be at most alpha_max"):
        lama_scale(alpha_max=0.4)
    lama_scale(alpha_min=1.5)  # equal limits switch the adaptation off


@pytest.mark.parametrize(("factory", "argument"), [(lama_adam, "sensitivity"), (lam, "decay")])
def test_schedule_as_a_number_points_to_inject_hyperparams(factory, argument):
    message = rf"{argument} must be .*inject_hyperparams.*{argument}=schedule"
    with pytest.raises(ValueError, match=message):
        factory(0.1, **{argument: optax.constant_schedule(0.5)})


@pytest.mark.parametrize(("argument", "dtype"), [("b1", "bfloat16"), ("max_momentum", "float16")])
def test_traced_half_precision_decay(argument, dtype):
    """A traced value cannot be checked, and 0.999 is 1 in bfloat16; the message has the remedy."""
    message = rf"{argument} came as {dtype}.*hyperparam_dtype=jnp\.float32"
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda x: lama_scale(**{argument: x}).init(PARAMS))(jnp.asarray(0.5, dtype))


def test_traced_number_that_is_none():
    with pytest.raises(ValueError, match="sensitivity must be a finite number; got"):
        jax.jit(lambda x: lama_scale(sensitivity=x).init(PARAMS))(jnp.ones(2))


# The loss function.


@pytest.mark.parametrize("estimator", [hutchinson(), exact_trace()], ids=["hutchinson", "exact"])
def test_missing_value_fn_shows_the_call(estimator):
    tx = lama_scale(estimator=estimator)
    with pytest.raises(ValueError, match=r"value_fn is missing") as error:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert "tx.update(grads, state, params, value_fn=lambda p: loss_fn(p, batch))" in str(
        error.value
    )
    with pytest.raises(ValueError, match=r"value_fn is missing"):
        layer_curvature(PARAMS, 0, estimator=estimator)


BAD_LOSSES = {
    "vector": (lambda p: p["Dense_0"]["bias"], r"scalar; got shape \(3,\)"),
    "integer": (lambda p: jnp.asarray(3), r"real floating-point scalar; .* int32"),
    "complex": (lambda p: loss(p).astype(jnp.complex64), r"real floating-point .* complex64"),
    "aux": (lambda p: (loss(p), {}), r"has_aux=True"),
}


@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_value_fn_that_returns_no_scalar(kind):
    value_fn, message = BAD_LOSSES[kind]
    tx = lama_scale(estimator=exact_trace())
    with pytest.raises(ValueError, match=rf"value_fn must return .*{message}"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value_fn=value_fn)


def test_value_fn_that_returns_no_aux_where_it_is_announced():
    tx = lama_scale(estimator=exact_trace(has_aux=True))
    with pytest.raises(ValueError, match=r"value_fn must return \(value, aux\) with has_aux=True"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value_fn=loss)


def test_value_fn_that_is_a_value():
    tx = lama_scale()
    with pytest.raises(ValueError, match=r"value_fn must be a function of params; got 0\.5"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value_fn=0.5)


def test_loss_that_is_not_finite_leaves_a_finite_state():
    tx = lama_scale(estimator=exact_trace(), update_interval=1)

    @jax.jit
    def step(state, factor):
        def value_fn(p):
            return factor * loss(p)

        grads = jax.grad(value_fn)(PARAMS)
        return tx.update(grads, state, PARAMS, value_fn=value_fn)

    _, good = step(tx.init(PARAMS), 1.0)
    for bad in (nan, inf):
        updates, state = step(good, bad)
        assert int(state.rejected) == 2  # both layers
        assert state.curvature.tolist() == good.curvature.tolist() == [2.0, 2.0]
        assert all((u == 0).all() for u in jax.tree.leaves(updates))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
        # And training goes on.
        updates, state = step(state, 1.0)
        assert all((np.isfinite(u) & (u != 0)).all() for u in jax.tree.leaves(updates))


def test_curvature_that_is_not_finite_while_the_gradients_are():
    """|p|^1.5 has gradient 0 and second derivative infinity at 0 (written out: no NaN of pow)."""

    @jax.custom_jvp
    def slope(x):
        return 1.5 * jnp.sqrt(jnp.abs(x)) * jnp.sign(x)

    @slope.defjvp
    def _(primals, tangents):
        (x,), (dx,) = primals, tangents
        return slope(x), dx * 0.75 / jnp.sqrt(jnp.abs(x))

    @jax.custom_jvp
    def power(x):
        return jnp.abs(x) ** 1.5

    @power.defjvp
    def _(primals, tangents):
        (x,), (dx,) = primals, tangents
        return power(x), dx * slope(x)

    params = {"a": {"w": jnp.asarray([0.0, 1.0])}, "b": {"w": jnp.asarray([4.0])}}

    def value_fn(p):
        return jnp.sum(power(p["a"]["w"])) + jnp.sum(p["b"]["w"] ** 2)

    grads = jax.grad(value_fn)(params)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    tx = lama_scale(estimator=exact_trace(), update_interval=1)
    updates, state = jax.jit(functools.partial(tx.update, value_fn=value_fn))(
        grads, tx.init(params), params
    )
    assert int(state.rejected) == 1
    assert state.curvature.tolist() == [0.0, 2.0]
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    # The gradient was good, so the layer is trained all the same.
    assert updates["a"]["w"][1] != 0


# Parameters, gradients and curvature that do not fit.


def test_missing_params():
    tx = lama_scale()
    with pytest.raises(
        ValueError, match=r"params is missing: call tx\.update\(grads, state, param"
    ):
        tx.update(PARAMS, tx.init(PARAMS), value_fn=loss)


def test_params_and_gradients_of_another_structure():
    tx = lama_scale()
    state = tx.init(PARAMS)
    other = {**PARAMS, "Dense_2": PARAMS["Dense_1"]}
    for grads, params, name in ((PARAMS, other, "params"), (other, PARAMS, "updates")):
        with pytest.raises(ValueError, match=rf"{name} must .*init.*Dense_2.*init\(params\) again"):
            tx.update(grads, state, params, value_fn=loss)


@pytest.mark.parametrize("granularity", ["weight", "layer"])
def test_lam_gradients_of_another_structure(granularity):
    tx = lam_scale(granularity=granularity)
    with pytest.raises(ValueError, match=r"updates must .*init"):
        tx.update({"other": jnp.ones(1)}, tx.init(PARAMS))


def test_params_of_another_shape():
    tx = lama_scale()
    wider = jax.tree.map(lambda p: jnp.ones((2, *p.shape)), PARAMS)
    with pytest.raises(ValueError, match=r"init"):
        tx.update(wider, tx.init(PARAMS), wider, curvature=jnp.zeros(2))


BAD_CURVATURES = {
    "three": (jnp.ones(3), r"shape \(2,\), one entry a layer.*got shape \(3,\)"),
    "matrix": (np.ones((2, 1)), r"shape \(2,\), one entry a layer.*got shape \(2, 1\)"),
    "subtree": ({"Dense_0": 1.0}, r"shaped like params"),
    "list": ([1.0, 2.0], r"shaped like params"),
    "arrays": (PARAMS, r"hold a scalar"),
}


@pytest.mark.parametrize("kind", BAD_CURVATURES)
def test_curvature_that_does_not_fit(kind):
    curvature, message = BAD_CURVATURES[kind]
    tx = lama_scale()
    with pytest.raises(ValueError, match=rf"curvature must .*{message}"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, curvature=curvature)


@pytest.mark.parametrize(
    "leaf",
    [jnp.ones(2, jnp.complex64), jnp.ones(2, jnp.int32), np.ones(2, bool), 3],
    ids=["complex", "int", "bool", "number"],
)
def test_params_that_are_not_real_floating_point(leaf):
    params = {"a": {"w": jnp.ones(2)}, "b": leaf}
    dtype = jnp.result_type(leaf)
    remedy = "split_real_and_imaginary" if dtype == jnp.complex64 else r"optax\.masked"
    message = rf"params must hold real floating-point.*\['b'\] is {dtype}.*{remedy}"
    for call in (
        lama_scale().init,
        lama_adam(0.1).init,
        lam_scale().init,
        lam_scale(granularity="layer").init,
        layer_names,
        lambda p: layer_curvature(p, 0, estimator=hutchinson(), value_fn=loss),
    ):
        with pytest.raises(ValueError, match=message):
            call(params)


BAD_LAYERS = {
    "subtree": ({"Dense_0": "in"}, "shaped like params"),
    "deeper": ({"Dense_0": {"kernel": {"x": "a"}, "bias": "b"}, "Dense_1": "c"}, "shaped like"),
    "floats": (jax.tree.map(lambda _: 1.5, PARAMS), r"strings or integers as labels; got 1\.5"),
    "function": (lambda params: "module", "must return a tree of labels .*returned 'module'"),
    "none": (None, "shaped like params"),
}


@pytest.mark.parametrize("kind", BAD_LAYERS)
def test_layers_that_do_not_fit(kind):
    layers, message = BAD_LAYERS[kind]
    for call in (
        lambda: lama_scale(layers=layers).init(PARAMS),
        lambda: lam_scale(granularity="layer", layers=layers).init(PARAMS),
        lambda: layer_names(PARAMS, layers),
    ):
        with pytest.raises(ValueError, match=rf"layers must .*{message}|layers {message}"):
            call()


@pytest.mark.parametrize("estimator", [hutchinson, None, loss], ids=["bare", "none", "function"])
def test_layer_curvature_with_what_is_no_estimator(estimator):
    with pytest.raises(ValueError, match=r"estimator must be a record with an `estimate` method"):
        layer_curvature(PARAMS, 0, estimator=estimator, value_fn=loss)


def test_key_that_is_none():
    several = jax.random.split(jax.random.key(0), 2)
    for key in (1.5, "0", None, jnp.ones(2), several, 2**32, -(2**31) - 1):
        with pytest.raises(ValueError, match=r"key must be "):
            lama_scale(key=key).init(PARAMS)


def test_mu_dtype_that_holds_no_moment():
    for mu_dtype in ("float31", int, "int32", jnp.complex64):
        with pytest.raises(ValueError, match=r"mu_dtype must be "):
            lama_scale(mu_dtype=mu_dtype)
