"""An Optax line search takes `value_fn` too: one chain with `track_curvature` serves both."""

import jax
import jax.numpy as jnp
import networks
import optax
import pytest

from lama_optax import flipout, supervised, track_curvature

pytestmark = pytest.mark.standard_promotion  # of optax's line searches

SEARCHES = {
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=8)
    ),
    "lbfgs": optax.lbfgs,
}


@pytest.mark.parametrize("search", ["backtracking", pytest.param("lbfgs", marks=pytest.mark.slow)])
def test_one_value_fn_serves_tracker_and_line_search(search):
    params, apply_fn, inputs, targets = networks.mlp()
    tx = optax.chain(track_curvature(flipout(scope="joint"), update_interval=2), SEARCHES[search]())

    @jax.jit
    def step(params, state):
        task = supervised(apply_fn, inputs, targets)
        value, grads = jax.value_and_grad(task["value_fn"])(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, **task)
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(4):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]
    assert (state[0].curvature != 0).all()
    assert int(state[0].rejected) == 0


def test_a_value_fn_that_takes_the_batch_too_is_told_what_to_write():
    """Optax's line searches fill further arguments of `value_fn` by keyword; estimators do not."""
    params, apply_fn, inputs, targets = networks.mlp()
    task = supervised(apply_fn, inputs, targets)

    def value_fn(params, batch):
        return jnp.mean(apply_fn(params, batch[0]) ** 2)

    tx = track_curvature(flipout(scope="joint"))
    with pytest.raises((TypeError, ValueError)) as error:
        tx.update(params, tx.init(params), params, **task | {"value_fn": value_fn})
    notes = "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])
    assert "bind what else it takes, value_fn=lambda p: loss_fn(p, batch)" in notes
