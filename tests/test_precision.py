"""Half precision with loss scaling by hand, mixed trees, double precision, complex parameters."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import mlp

from lama_optax import exact_trace, hutchinson, lama_adam, lama_scale, layer_curvature

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


def mixed(tree):
    """Dense_0 in bfloat16, the head in float32: as in training with a float32 head."""
    return tree | {"Dense_0": optax.tree.cast(tree["Dense_0"], jnp.bfloat16)}


def in_dtype(dtype):
    """The MLP's params in ``dtype`` or mixed, and a loss that computes in float32 from them.

    The values are those of float32 rounded to the parameters' dtype, so that ``upcast(params)``
    is the same point in float32.
    """
    params, loss = mlp()
    params = mixed(params) if dtype == "mixed" else optax.tree.cast(params, dtype)
    return params, lambda p: loss(optax.tree.cast(p, jnp.float32))


def half_loss(dtype):
    """A regression that computes and returns in half precision, as a jmp policy makes it."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=s), dtype) for s in [(16, 2), (16, 1)])

    def loss_fn(p):
        p = optax.tree.cast(p, dtype)
        hidden = jnp.tanh(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"][None])
        outputs = hidden @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"][None]
        return jnp.mean((outputs - y) ** 2)

    return loss_fn


# -- estimates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["mixed", *map(SLOW, ("float16", "bfloat16"))])
def test_estimate_of_half_precision_parameters(dtype):
    params, loss = in_dtype(dtype)
    single = optax.tree.cast(params, jnp.float32)
    estimate = jax.jit(
        functools.partial(layer_curvature, key=0, estimator=exact_trace(), value_fn=loss)
    )
    half = estimate(params)
    assert half.mean.dtype == half.std_error.dtype == jnp.float32
    # The Hessian is that of float32 at the same point; only H v is rounded to the leaf's dtype:
    # half a unit in the last place of bfloat16, 2^-9, for each entry.
    np.testing.assert_allclose(half.mean, estimate(single).mean, rtol=2**-8, atol=2e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", SLOW("float16")])
def test_value_fn_that_returns_half_precision(dtype):
    params, _ = mlp()
    loss = half_loss(dtype)
    assert loss(params).dtype == dtype

    @jax.jit
    def means(params):
        return [
            layer_curvature(params, 0, estimator=exact_trace(), value_fn=f).mean
            for f in (loss, half_loss(jnp.float32))
        ]

    actual, expected = means(params)
    assert actual.dtype == jnp.float32
    # Some ten roundings in half precision between the parameters and each H v.
    rtol = 10 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol)


# -- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["mixed", *map(SLOW, ("bfloat16", "float16"))])
def test_training_with_parameters_in_half_precision(dtype):
    params, loss = in_dtype(dtype)
    tx = lama_adam(0.03, sensitivity=1.0, estimator=exact_trace(), update_interval=1)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value_fn=loss)
        return (optax.apply_updates(params, updates), state), value

    # A scan refuses a state or params that change their dtypes.
    (new, state), values = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=40))(params)
    # Float32 gets from 1.48 to 0.43 in these 40 steps.
    assert values[0] > 1.4
    assert values[-1] < 0.6
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, params)
    assert (jnp.abs(state[0].alpha - 1) > 1e-3).all()


@pytest.mark.parametrize("dtype", ["float16", SLOW("bfloat16")])
def test_static_loss_scaling_by_hand(dtype):
    """Master weights in float32, the forward pass in half precision, a loss in small units.

    The gradients of float16 are then below its least number, 6e-8, and so are its second
    derivatives: without the scale neither trains nor is seen. So in float16 the scale belongs in
    value_fn too, and the sensitivity is divided by it.
    """
    unit = 1e-8
    params, _ = mlp()
    loss = half_loss(dtype)
    initial = float(half_loss(jnp.float32)(params))

    def run(scale, value_scale):
        sensitivity = 4.0 / (unit * value_scale)
        tx = lama_adam(0.03, sensitivity=sensitivity, estimator=exact_trace(), update_interval=1)

        def in_units(scale):
            return lambda p: loss(p).astype(jnp.float32) * (unit * scale)

        def step(carry, _):
            params, state = carry
            grads = jax.tree.map(lambda g: g / scale, jax.grad(in_units(scale))(params))
            updates, state = tx.update(grads, state, params, value_fn=in_units(value_scale))
            return (optax.apply_updates(params, updates), state), state[0].alpha

        (new, _), alphas = jax.lax.scan(step, (params, tx.init(params)), length=40)
        return half_loss(jnp.float32)(new), alphas

    run = jax.jit(run)  # of traced scales: compiled once
    scale = 2.0**20
    value, alphas = run(scale, scale)
    assert value < 0.5 * initial
    single = jax.jit(
        functools.partial(
            layer_curvature, key=0, estimator=exact_trace(), value_fn=half_loss(jnp.float32)
        )
    )(params)
    # alpha from the unscaled loss in float32; its slope is at most 1/4 of the 10 roundings that
    # test_value_fn_that_returns_half_precision allows the curvature, times the sensitivity of 4.
    expected = 0.5 + jax.nn.sigmoid(4.0 * single.mean)
    assert (jnp.abs(expected - 1) > 0.01).all()
    np.testing.assert_allclose(alphas[0], expected, atol=10 * float(jnp.finfo(dtype).eps))
    if dtype == "float16":
        unscaled_value, unscaled_alphas = run(1.0, 1.0)
        # What the scale is for: no parameter moves, two programs round one value.
        np.testing.assert_allclose(unscaled_value, initial, rtol=1e-6)
        assert (unscaled_alphas == 1).all()  # and why value_fn needs it as well
    else:
        # bfloat16 has the range of float32: nothing underflows, nothing changes.
        np.testing.assert_allclose(run(1.0, 1.0)[1][0], alphas[0], rtol=1e-6)


# -- alpha and the loss scale ------------------------------------------------------------------


def test_alpha_is_the_same_for_every_loss_scale():
    """Two ways, both to the bit, since a power of two only moves the exponent."""
    params, loss = mlp()

    def run(scale, value_scale, sensitivity):
        key = jax.random.key(0, impl="rbg")
        tx = lama_scale(sensitivity=sensitivity, estimator=hutchinson(3), key=key)

        def step(state, _):
            grads = jax.grad(lambda p: scale * loss(p))(params)
            grads = jax.tree.map(lambda g: g / scale, grads)
            updates, state = tx.update(
                grads, state, params, value_fn=lambda p: value_scale * loss(p)
            )
            return state, (updates, state.alpha)

        return jax.lax.scan(step, tx.init(params), length=3)[1]

    # The scales are traced: one compilation serves all.
    run = jax.jit(run)
    updates, alpha = run(1.0, 1.0, 4.0)
    assert (jnp.abs(alpha - 1) > 1e-2).all()
    for scale in (2.0**8, 2.0**15):
        for other_updates, other_alpha in (
            run(scale, 1.0, 4.0),  # the unscaled value_fn
            run(scale, scale, 4.0 / scale),  # the scaled one, the sensitivity divided by the scale
        ):
            np.testing.assert_array_equal(other_alpha, alpha)
            for x, y in zip(jax.tree.leaves(other_updates), jax.tree.leaves(updates), strict=True):
                np.testing.assert_array_equal(x, y)
        # Neither of the two: the scale reaches alpha, whose limits are 0.5 and 1.5.
        _, wrong = run(scale, scale, 4.0)
        assert (jnp.abs(wrong - alpha) > 0.1).all()


# -- double precision --------------------------------------------------------------------------


def test_double_precision_all_the_way(x64):
    params, loss = mlp(jnp.float64)
    tx = lama_scale(estimator=exact_trace())
    updates, state = jax.jit(functools.partial(tx.update, value_fn=loss))(
        params, tx.init(params), params
    )
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    assert len(floats) >= len(jax.tree.leaves((state.mu, state.nu))) + 4
    assert {x.dtype.name for x in floats} == {"float64"}
    assert {x.dtype.name for x in jax.tree.leaves(updates)} == {"float64"}
    # Single precision anywhere on the way would show: its own estimate is off by more.
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda x: loss(unravel(x))))(flat)
    expected = [jnp.diag(hessian)[:12].mean(), jnp.diag(hessian)[12:].mean()]
    np.testing.assert_allclose(state.curvature, expected, rtol=1e-12)
    rounded = loss(optax.tree.cast(optax.tree.cast(params, jnp.float32), jnp.float64))
    assert not np.allclose(loss(params), rounded, rtol=1e-12)


# -- complex parameters ------------------------------------------------------------------------


COMPLEX = {"w": jnp.asarray([1.0 + 1.0j, -0.5j, 2.0])}


def complex_loss(p):
    return jnp.sum(jnp.abs(p["w"] - 2j) ** 2)


REFUSALS = {
    "init": lambda: lama_adam(0.1).init(COMPLEX),
    "estimate": lambda: layer_curvature(COMPLEX, 0, estimator=hutchinson(), value_fn=complex_loss),
}


@pytest.mark.parametrize("call", REFUSALS)
def test_complex_parameters_are_refused(call):
    with pytest.raises(ValueError, match=r"\['w'\] is complex64: .*jax\.lax\.complex"):
        REFUSALS[call]()


@pytest.mark.standard_promotion
def test_complex_parameters_train_split_and_bound():
    """Optax's wrapper passes no extra arguments on, so value_fn is bound."""

    def merge(split):
        return jax.tree.map(
            lambda z: z.real + 1j * z.imaginary, split, is_leaf=lambda z: hasattr(z, "imaginary")
        )

    lama = lama_adam(0.1, sensitivity=-1.0, estimator=exact_trace(), update_interval=1)
    bound = optax.GradientTransformation(
        lama.init, functools.partial(lama.update, value_fn=lambda s: complex_loss(merge(s)))
    )
    tx = optax.contrib.split_real_and_imaginary(bound)

    def step(carry, _):
        params, state = carry
        # The gradient of a real function of z is conj(jax.grad), as optax documents.
        grads = jax.tree.map(jnp.conj, jax.grad(complex_loss)(params))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=200))(COMPLEX)
    assert complex_loss(params) < 0.01 * complex_loss(COMPLEX)
    # |z - 2j|^2 has the second derivative 2 in each of the real coordinates.
    np.testing.assert_allclose(state.inner_state[0].curvature, 2.0, rtol=1e-6)
