"""Operations without a second derivative: every estimator names what to do, and it works."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parts import exact_means, tanh_with_vjp, with_activation

from lama_optax import exact_trace, hutchinson, lama_adam, layer_curvature


@jax.custom_vjp
def tanh_without_jvp(x):
    """Its rules call a custom_vjp, as those of fused kernels do: no JVP of its gradient."""
    return tanh_with_vjp(x)


tanh_without_jvp.defvjp(
    lambda x: (tanh_with_vjp(x),) * 2, lambda y, cotangent: (cotangent * (1 - y**2),)
)


@jax.custom_vjp
def tanh_on_host(x):
    """A custom_vjp around a callback: jax reports the missing JVP as a ValueError of its own."""
    return _on_host(x)


def _on_host(x):
    return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


tanh_on_host.defvjp(lambda x: (_on_host(x),) * 2, lambda y, cotangent: (cotangent * (1 - y**2),))


@pytest.mark.parametrize("scanned", [False, True], ids=["plain", "scan"])
@pytest.mark.parametrize(
    ("estimator", "activation"),
    [
        pytest.param(hutchinson(1), tanh_without_jvp, id="nested-vmapped"),
        # In a loop, which is how large models are estimated, jax reports it while it compiles.
        pytest.param(hutchinson(2, chunk_size=1), tanh_without_jvp, id="nested-loop"),
        pytest.param(hutchinson(1, scope="block"), tanh_without_jvp, id="nested-block"),
        pytest.param(exact_trace(), tanh_without_jvp, id="nested-exact"),
        pytest.param(hutchinson(1), tanh_on_host, id="callback-vmapped"),
        pytest.param(exact_trace(), tanh_on_host, id="callback-exact"),
    ],
)
def test_every_estimator_names_both_remedies(estimator, activation, scanned):
    params, value_fn, *_ = with_activation(activation, seed=0)
    params = optax.tree.cast(params, jnp.float32)
    if scanned:
        loss, value_fn = value_fn, lambda p: _scanned(loss, p)
    with pytest.raises(ValueError, match=r"hvp='finite_difference'.*value_fn that does without"):
        jax.jit(lambda p: layer_curvature(p, 0, estimator=estimator, value_fn=value_fn).mean).lower(
            params
        )  # before anything is compiled


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_custom_vjp_without_jvp_names_both_remedies(jitted):
    params, value_fn, *_ = with_activation(tanh_without_jvp, seed=0)
    params = optax.tree.cast(params, jnp.float32)
    tx = lama_adam(0.1, update_interval=1)
    update = functools.partial(tx.update, value_fn=value_fn)
    with pytest.raises(ValueError, match="cannot be differentiated twice") as error:
        (jax.jit(update) if jitted else update)(params, tx.init(params), params)
    assert "hutchinson(hvp='finite_difference')" in str(error.value)
    assert "value_fn that does without the operation" in str(error.value)
    assert "custom_vjp" in str(error.value)


def _scanned(loss, params):
    return jax.lax.scan(lambda total, _: (total + loss(params), None), 0.0, length=2)[0]


def test_finite_differences_do_work_there(x64):
    part = with_activation(tanh_without_jvp, seed=0)
    estimator = hutchinson(32, hvp="finite_difference", fd_step=1e-6)
    expected = exact_means(part.params, part.reference)

    @jax.jit
    def both(params, key):
        return [
            layer_curvature(params, key, estimator=e, value_fn=f)
            for e, f in [(estimator, part.value_fn), (hutchinson(32), part.reference)]
        ]

    for seed in range(3):
        actual, analytic = both(part.params, jax.random.key(seed, impl="rbg"))
        # Probe for probe the analytic product: the difference quotient is off by delta times a
        # third derivative of size 1, summed over N entries, and by 1e-16/delta of rounding.
        np.testing.assert_allclose(actual.mean, analytic.mean, atol=1e-5)
        assert (np.abs(actual.mean - expected) < 5 * actual.std_error).all()


def test_a_separate_value_fn_does_work_there(x64):
    """The gradient of the fused operation, the curvature of its plain form."""
    part = with_activation(tanh_without_jvp, seed=0)
    tx = lama_adam(0.03, sensitivity=1.0, estimator=exact_trace(), update_interval=1)
    params = part.params

    @jax.jit
    def step(params, state):
        grads = jax.grad(part.value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=part.reference)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(40):
        before = params
        params, state = step(params, state)
    assert part.value_fn(params) < 0.6 * part.value_fn(part.params)
    np.testing.assert_allclose(
        state[0].curvature, exact_means(before, part.reference), rtol=1e-10, atol=1e-12
    )
