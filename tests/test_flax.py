"""`lama_optax.flax`: what Flax's own train state does not pass on."""

import jax
import jax.numpy as jnp
import pytest

from lama_optax import exact_trace, lama_adam
from lama_optax.flax import TrainState

# Flax promotes implicitly.
pytestmark = pytest.mark.standard_promotion

PARAMS = {"a": {"w": jnp.asarray([0.5, -1.0])}, "b": {"w": jnp.asarray([2.0])}}


def loss(p):
    return jnp.sum(p["a"]["w"] ** 2) + 2 * jnp.sum(p["b"]["w"] ** 2)


def test_train_state_passes_value_fn_to_the_optimizer():
    tx = lama_adam(0.1, estimator=exact_trace(), update_interval=1)
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    step = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params), value_fn=loss))
    state = step(state)
    assert int(state.step) == 1
    assert state.opt_state[0].curvature.tolist() == [2.0, 4.0]
    assert float(loss(state.params)) < float(loss(PARAMS))
