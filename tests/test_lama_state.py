"""The state of `lama_scale`: its fields and dtypes, and what is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from lama_optax import CurvatureState, LamaState, lama_scale

PARAMS = {
    "Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    "Dense_1": {"kernel": jnp.ones((3, 1)), "bias": jnp.ones(1)},
}
GRADS = jax.tree.map(lambda p: 0.1 * p, PARAMS)


def test_fields_of_the_state():
    tx = lama_scale(b1=0.8, sensitivity=1.0)
    state = tx.init(PARAMS)
    assert isinstance(state, LamaState)
    assert isinstance(state.tracker, CurvatureState)
    assert jax.tree.structure(state.mu) == jax.tree.structure(state.nu)
    assert state.curvature.tolist() == state.weight_sum.tolist() == [0.0, 0.0]
    # Before the first estimate H = 0: alpha is the middle of its range.
    assert state.alpha.tolist() == [1.0, 1.0]
    assert state.momentum.tolist() == pytest.approx([0.8, 0.8])
    assert (state.count.dtype, int(state.count)) == (jnp.int32, 0)
    assert (state.rejected.dtype, int(state.rejected)) == (jnp.int32, 0)

    update = jax.jit(lambda s: tx.update(GRADS, s, PARAMS, curvature=jnp.asarray([1.0, 0.0]))[1])
    for step in range(1, 4):
        state = update(state)
        assert int(state.count) == step
    # Eq. 9, in float32.
    assert state.alpha.tolist() == pytest.approx([0.5 + 1 / (1 + np.exp(-1)), 1.0], rel=1e-6)
    assert state.momentum.tolist() == pytest.approx([0.8 * x for x in state.alpha.tolist()])


@pytest.mark.parametrize(
    ("dtype", "mu_dtype"),
    [("bfloat16", None), ("bfloat16", jnp.float32), ("float32", "bfloat16")],
)
def test_mu_dtype(dtype, mu_dtype):
    params = {"w": jnp.ones(3, dtype)}
    tx = lama_scale(mu_dtype=mu_dtype)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params, curvature=jnp.zeros(1))
        assert state.mu["w"].dtype == jnp.dtype(dtype if mu_dtype is None else mu_dtype)
        # In bfloat16 a decay of 0.999 is 1: the second moment is never kept in it.
        assert state.nu["w"].dtype == jnp.float32
        assert updates["w"].dtype == jnp.dtype(dtype)


def test_first_moment_is_corrected_before_it_is_rounded_to_mu_dtype():
    """The first update of a constant gradient is 1 whatever the dtype of the moment."""
    params = jnp.full(1, 0.3)
    tx = lama_scale(mu_dtype=jnp.bfloat16)
    updates, _ = tx.update(params, tx.init(params), params, curvature=jnp.zeros(1))
    # A rounding of bfloat16 would show as 4e-3; float32's are 1e-7 and 1 - 0.999 loses 3 digits.
    assert updates[0] == pytest.approx(1.0, abs=1e-4)


def test_layers_are_the_units_of_curvature():
    updates, moments = {}, {}
    for layers in ("module", "leaf"):
        tx = lama_scale(layers=layers, sensitivity=3.0)
        curvature = {"Dense_0": {"kernel": 1.0, "bias": -2.0}, "Dense_1": 0.0}
        updates[layers], state = tx.update(GRADS, tx.init(PARAMS), PARAMS, curvature=curvature)
        moments[layers] = state.momentum
    # By module: kernel and bias of Dense_0 cancel, (6 * 1 - 3 * 2)/9 = 0. In order of the leaves:
    # bias before kernel.
    assert moments["module"].tolist() == pytest.approx([0.9, 0.9])
    expected = 0.9 * reference.factor(np.array([-2.0, 1.0, 0.0, 0.0]), 0.5, 1.5, 3.0)
    assert moments["leaf"].tolist() == pytest.approx(np.minimum(expected, 0.999).tolist())


def test_eps_root_keeps_a_derivative_through_update_finite():
    """A dead unit has the gradient 0, where the root's derivative is infinite: as in optax.adam."""

    def value_fn(p):
        hidden = jax.nn.relu(jnp.ones((1, 2)) @ p["in"] + jnp.asarray([[0.1, -50.0]]))
        return jnp.sum((hidden @ p["out"] - 1.0) ** 2)

    @jax.jit
    @jax.grad
    def gradient(p, eps_root):
        tx = lama_scale(eps_root=eps_root)
        updates, _ = tx.update(jax.grad(value_fn)(p), tx.init(p), p, curvature=jnp.zeros(2))
        return value_fn(optax.apply_updates(p, updates))

    params = {"in": jnp.ones((2, 2)) / 3, "out": jnp.ones((2, 1))}
    for eps_root in (0.0, 1e-8):
        found = gradient(params, eps_root)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)) == (eps_root > 0)


# What is not finite.


@pytest.mark.parametrize("momentum", ["paper", "ema"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e30])
def test_entry_with_a_gradient_that_is_not_finite_stays(bad, momentum):
    """1e30: finite, but its square is not in float32."""
    tx = lama_scale(momentum=momentum)
    params = jnp.zeros(2)
    good, spoilt = jnp.asarray([1.0, 1.0]), jnp.asarray([bad, 1.0])
    clean_state = state = tx.init(params)
    for grads in (good, spoilt, good):
        before = state
        updates, state = tx.update(grads, state, params, curvature=jnp.zeros(1))
        _, clean_state = tx.update(good, clean_state, params, curvature=jnp.zeros(1))
        if grads is spoilt:
            assert updates[0] == 0
            assert (state.mu[0], state.nu[0]) == (before.mu[0], before.nu[0])
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
        # The entry beside it does not notice.
        assert state.mu[1] == clean_state.mu[1]
        assert state.nu[1] == clean_state.nu[1]


@pytest.mark.parametrize("momentum", ["paper", "ema"])
def test_momentum_beyond_1_grows_to_the_largest_number_and_no_further(momentum):
    """1.35^400 is 1e52: without a cap, moments and weights stop at float32's 3.4e38."""
    tx = lama_scale(max_momentum=None, sensitivity=1e6, momentum=momentum)
    params = jnp.zeros(2)

    def step(state, _):
        updates, state = tx.update(jnp.ones(2), state, params, curvature=jnp.ones(1))
        finite = [jnp.isfinite(x).all() for x in (updates, state.mu, state.nu, state.weight_sum)]
        return state, jnp.stack(finite)

    state, finite = jax.lax.scan(step, tx.init(params), None, length=400)
    assert state.momentum[0] > 1.3
    assert finite.all()
    assert jnp.abs(state.mu).min() > 3e38


def test_update_beyond_float16_is_not_made():
    """m_hat/eps, with a second moment that has gone to 0, is 5e7; float16 ends at 65504."""
    params = jnp.zeros(1, jnp.float16)
    tx = lama_scale(b2=0.0)
    state = tx.init(params)
    for grads in (jnp.ones(1, jnp.float16), params):
        updates, state = tx.update(grads, state, params, curvature=jnp.zeros(1))
        assert jnp.isfinite(updates).all()
