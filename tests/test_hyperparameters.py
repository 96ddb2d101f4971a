"""Numbers that a schedule may change: traced, by `optax.inject_hyperparams`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import (
    FACTORIES,
    PARAMS,
    assert_all_close,
    every_alias,
    loss,
    update_once,
)

from lama_optax import exact_trace, lam, lama_adam, lama_scale

LAMA_NUMBERS = {
    "b1": 0.5,
    "b2": 0.5,
    "eps": 1.0,
    "eps_root": 1.0,
    "alpha_min": 0.9,
    "alpha_max": 1.05,
    "sensitivity": -0.1,
    "update_interval": 2,
    "curvature_decay": 0.5,
    "max_momentum": 0.49,
    "learning_rate": 0.5,
    "weight_decay": 0.1,
}
LAM_NUMBERS = {"decay": 0.5, "eps": 1.0, "learning_rate": 0.5}


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    ("factory", "numbers", "static"),
    [
        # A curvature that moves alpha, but not to where the default cap hides alpha's limits.
        (
            lama_adam,
            LAMA_NUMBERS,
            {"sensitivity": 0.02, "estimator": exact_trace(), "update_interval": 1},
        ),
        (lam, LAM_NUMBERS, {}),
        (lam, LAM_NUMBERS, {"granularity": "layer"}),
    ],
    ids=["lama_adam", "lam-weight", "lam-layer"],
)
def test_every_number_can_be_changed_between_steps_without_a_compilation(factory, numbers, static):
    injected = optax.inject_hyperparams(factory)(learning_rate=0.1, **static)
    params = jnp.asarray([0.3, -1.0, 2.0])
    traces = []

    def value_fn(params):
        return jnp.sum(jnp.sin(3 * params) * jnp.sum(params**2))

    def two_steps(tx, state):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(value_fn)(params)
            updates, state = tx.update(grads, state, params, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), None

        traces.append(1)
        return jax.lax.scan(step, (params, state), length=2)[0][0]

    train = jax.jit(functools.partial(two_steps, injected))
    initial = injected.init(params)
    assert set(initial.hyperparams) - {"key"} == set(numbers)
    arrays = {
        name: jnp.full_like(initial.hyperparams[name], value) for name, value in numbers.items()
    }

    def changed(arrays):
        return train(initial._replace(hyperparams={**initial.hyperparams, **arrays}))

    # Each of them has an effect of its own.
    for name, array in arrays.items():
        assert np.abs(changed({name: array}) - changed({})).max() > 1e-4, name
    # All of them together are the optimizer that was built with them, which are no tracers there.
    tx = factory(**static | numbers)
    # Roundings of float32 in another order, carried on by sin(3 x) |x|^2, of slope 20.
    np.testing.assert_allclose(
        changed(arrays), two_steps(tx, tx.init(params)), rtol=1e-5, atol=1e-5
    )
    assert len(traces) == 2


@pytest.mark.standard_promotion
@every_alias
def test_inject_hyperparams_with_half_precision_parameters(name):
    dtype = "bfloat16"
    params = {"w": jnp.asarray([1.0, 2.0], dtype)}
    # Numbers in the dtype of the parameters, optax's default, would round 0.999 away.
    with pytest.raises(ValueError, match=r"hyperparam_dtype=jnp\.float32"):
        optax.inject_hyperparams(FACTORIES[name])().init(params)

    tx = optax.inject_hyperparams(FACTORIES[name], hyperparam_dtype=jnp.float32)()
    updates, state = update_once(tx, params, params, value_fn=loss)
    expected, _ = update_once(FACTORIES[name](), params, params, value_fn=loss)
    assert updates["w"].dtype == jnp.dtype(dtype)
    # One rounding of the dtype, which a last bit of float32 may tip.
    assert_all_close(updates, expected, rtol=float(jnp.finfo(dtype).eps))
    assert all(x.dtype != jnp.dtype(dtype) for x in jax.tree.leaves(state.hyperparams))


@pytest.mark.parametrize("make_key", [lambda: 3, lambda: jax.random.PRNGKey(3)], ids=["int", "raw"])
def test_inject_hyperparams_with_a_key(make_key):
    tx = optax.inject_hyperparams(lama_scale)(key=make_key())
    state = jax.jit(tx.init)(PARAMS)
    assert state.inner_state.tracker.key.tolist() == jax.random.PRNGKey(3).tolist()


@pytest.mark.standard_promotion
def test_schedules_of_b1_and_sensitivity():
    tx = optax.inject_hyperparams(lama_scale)(
        b1=optax.linear_schedule(0.9, 0.5, 2), sensitivity=lambda t: 0.1 * t
    )
    update = jax.jit(functools.partial(tx.update, curvature=jnp.asarray([10.0, -10.0])))
    state, momentum = tx.init(PARAMS), []
    for _ in range(3):
        _, state = update(PARAMS, state, PARAMS)
        momentum.append(state.inner_state.momentum)
    for t, (b1, actual) in enumerate(zip((0.9, 0.7, 0.5), momentum, strict=True)):
        alpha = 0.5 + 1 / (1 + np.exp(-0.1 * t * np.asarray([10.0, -10.0])))
        # Eq. 9 in float32.
        np.testing.assert_allclose(actual, np.minimum(alpha * b1, 0.999), rtol=1e-5)
