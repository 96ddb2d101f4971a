"""Errors that say what to write, and that what they say to write works."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

from lama_optax import (
    exact_trace,
    fisher,
    hutchinson,
    lama_adam,
    layer_names,
    supervised,
    track_curvature,
)

# Optimizers of optax and Flax's dense layers promote implicitly.
pytestmark = pytest.mark.standard_promotion

W = jnp.asarray([0.5, -1.0, 2.0])
X = jnp.asarray([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0], [1.0, 1.0, 0.5], [-1.0, 0.5, 0.0]])
Y = jnp.asarray([0, 1, 2, 0])


def flax_own_state(estimator):
    tx = optax.chain(track_curvature(estimator), optax.sgd(0.1))
    state = train_state.TrainState.create(apply_fn=None, params={"w": W}, tx=tx)
    task = supervised(lambda params, x: x * params["w"], X, Y)
    return state.apply_gradients(grads={"w": W}, **task)


def injected(layers):
    return optax.inject_hyperparams(lama_adam)(1e-3, layers=layers).init({"a": {"w": W}})


# What a user writes, and what the error has to say.
MISTAKES = {
    "a function among params": (
        lambda: track_curvature().init({"w": W, "activation": jnp.tanh}),
        r"\['activation'\] is <.*tanh.*>, no array: .*eqx\.partition\(model, eqx\.is_inexact_array",
    ),
    "a string among params": (
        lambda: track_curvature().init({"w": W, "name": "float32"}),
        r"\['name'\] is 'float32', no array: .*eqx\.partition",
    ),
    "a dtype among params": (
        lambda: lama_adam(0.1).init({"w": W, "dtype": jnp.float32}),
        r"\['dtype'\] is <class .*>, no array",
    ),
    "an integer base": (
        lambda: track_curvature().init({"w": W, "base": jnp.ones(3, jnp.int8)}),
        r"\['base'\] is int8: .*close over it.*\{\*\*frozen, \*\*trained\}",
    ),
    "complex": (
        lambda: track_curvature().init({"w": W.astype(jnp.complex64)}),
        r"\['w'\] is complex64: .*jax\.lax\.complex\(real, imag\)",
    ),
    "Flax's TrainState, hutchinson": (
        lambda: flax_own_state(hutchinson()),
        r"value_fn is missing.*lama_optax\.flax\.TrainState",
    ),
    "Flax's TrainState, fisher": (
        lambda: flax_own_state(fisher()),
        r"sampled_losses_fn is missing.*lama_optax\.flax\.TrainState",
    ),
    "layers called as a schedule": (
        lambda: injected(lambda params: jax.tree.map(jnp.ndim, params)),
        r"layers must return a tree.*returned 0.*static_args='layers'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_what_to_write(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        call()


def curvatures(tx, params, **extra_args):
    """What the tracker holds after one update."""
    _, state = jax.jit(functools.partial(tx.update, **extra_args))(params, tx.init(params), params)
    return state[0].curvature.tolist()


def exact(task, params, name):
    """The mean diagonal entry of one leaf's block of the Hessian."""
    block = jax.jit(jax.hessian(task["value_fn"]))(params)[name][name]
    return np.trace(np.reshape(block, (params[name].size, -1))) / params[name].size


def test_adapters_on_a_frozen_integer_base():
    """LoRA: the base is closed over, the adapters are all params there are."""
    frozen = {"base": jnp.asarray([[1, 2, 0], [0, -1, 1], [2, 0, 1]], jnp.int8)}

    def apply_fn(params, x):
        return x @ (params["base"] / 8 + params["a"] @ params["b"])

    trained = {"a": jnp.ones((3, 1)), "b": jnp.asarray([[1.0, 0.5, -1.0]])}
    task = supervised(lambda trained, x: apply_fn({**frozen, **trained}, x), X, Y)
    tx = optax.chain(track_curvature(exact_trace()), optax.adamw(1e-2))
    found = curvatures(tx, trained, **task)
    expected = [exact(task, trained, name) for name in layer_names(trained)]
    assert found == pytest.approx(expected, rel=1e-5)  # sums of a few float32


def test_a_complex_parameter_as_two_real_ones():
    """|z - 2j|^2 has the second derivative 2 in each real coordinate."""
    params = {"z": {"real": jnp.ones(2), "imag": jnp.zeros(2)}}

    def value_fn(params):
        z = jax.lax.complex(params["z"]["real"], params["z"]["imag"])
        return jnp.sum(jnp.abs(z - 2j) ** 2)

    tx = optax.chain(track_curvature(exact_trace()), optax.adamw(1e-2))
    assert curvatures(tx, params, value_fn=value_fn) == pytest.approx([2.0], rel=1e-6)


def test_a_static_function_of_layers_under_inject_hyperparams():
    params = {"a": {"w": W}, "b": {"w": W}}
    make = optax.inject_hyperparams(lama_adam, static_args="layers")
    tx = make(1e-3, layers=lambda params: jax.tree.map(lambda _: "all", params))
    assert tx.init(params).inner_state[0].curvature.shape == (1,)
