"""Inside `jax.shard_map` and `jax.pmap`, where the optimizer takes ``axis_name``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import OPTIMIZERS, assert_equal_training, loss_fn, on_mesh, start, train

from lama_optax import flipout, gauss_newton, layer_curvature

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


def mapped_step(tx, how, value_fn_is_averaged):
    """Data parallel by hand, as users write it: the gradient is averaged by them."""

    def average(params, batch):
        return jax.lax.pmean(loss_fn(params, batch), "replicas")

    def step(params, state, batch):
        if how == "shard_map, checked":  # the gradient of a replicated argument is summed by JAX
            grads = jax.grad(average)(params, batch)
        else:
            grads = jax.lax.pmean(jax.grad(loss_fn)(params, batch), "replicas")
        value_fn = average if value_fn_is_averaged else loss_fn
        updates, state = tx.update(grads, state, params, value_fn=lambda p: value_fn(p, batch))
        return optax.apply_updates(params, updates), state

    return step


def train_mapped(tx, how, value_fn_is_averaged=False):
    """The parameters and the state after training, with the replicas along the first axis."""
    params, batch = start()
    start_from = params, tx.init(params)
    step = mapped_step(tx, how, value_fn_is_averaged)
    mesh = jax.make_mesh((8,), ("replicas",), axis_types=(AxisType.Auto,))
    if how == "pmap":
        stacked = jax.tree.map(lambda leaf: np.stack([leaf] * 8), start_from)
        start_from = jax.device_put(stacked, NamedSharding(mesh, P("replicas")))
        batch = jax.tree.map(lambda leaf: leaf.reshape(8, 8, -1), batch)
        return train(jax.pmap(step, axis_name="replicas"), *start_from, batch)
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), P(), P("replicas")),
        out_specs=P(),
        check_vma=how == "shard_map, checked",
    )
    trained = train(jax.jit(mapped), *on_mesh(mesh, start_from), batch)
    return jax.tree.map(
        lambda leaf: np.stack([shard.data for shard in leaf.addressable_shards]), trained
    )


@pytest.mark.parametrize(
    ("name", "how", "value_fn_is_averaged"),
    [
        ("joint", "shard_map, checked", False),
        SLOW("exact", "shard_map, checked", False),
        ("exact", "shard_map, unchecked", False),
        SLOW("block", "shard_map, checked", True),
        SLOW("finite_difference", "shard_map, unchecked", True),
        SLOW("interval", "shard_map, checked", True),
        ("interval", "pmap", True),
    ],
)
def test_replicas_agree_to_the_bit_and_with_one_device(name, how, value_fn_is_averaged):
    tx = OPTIMIZERS[name](axis_name="replicas")
    trained = train_mapped(tx, how, value_fn_is_averaged)
    for leaf in jax.tree.leaves(trained):
        assert len(leaf) == 8
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    if name != "joint":  # whose devices draw probes of their own
        assert_equal_training(*jax.tree.map(lambda leaf: leaf[0], trained), name)


def example_loss(params, example):
    return loss_fn(params, jax.tree.map(lambda x: x[None], example))


def example_outputs(params, example):
    hidden = jnp.tanh(example[0] @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


PER_EXAMPLE = {
    "flipout joint": (flipout(2, scope="joint"), {"example_value_fn": example_loss}),
    "flipout block": (flipout(2, scope="block"), {"example_value_fn": example_loss}),
    "gauss_newton": (
        gauss_newton(),
        {
            "example_output_fn": example_outputs,
            "output_loss_fn": lambda outputs, example: jnp.mean((outputs - example[1]) ** 2),
        },
    ),
}


@pytest.mark.parametrize(
    ("name", "check_vma"),
    [
        ("flipout joint", True),
        ("flipout block", False),
        ("gauss_newton", True),
        SLOW("flipout joint", False),
        SLOW("flipout block", True),
        SLOW("gauss_newton", False),
    ],
)
def test_estimators_by_example_are_averaged_over_the_devices(name, check_vma):
    """Each device estimates from its own examples; no derivative is summed over the devices."""
    estimator, functions = PER_EXAMPLE[name]
    params, batch = start()

    def estimate(params, batch):
        return layer_curvature(params, 0, estimator=estimator, batch=batch, **functions).mean

    mesh = jax.make_mesh((8,), ("replicas",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        lambda p, b: jax.lax.pmean(estimate(p, b), "replicas"),
        mesh=mesh,
        in_specs=(P(), P("replicas")),
        out_specs=P(),
        check_vma=check_vma,
    )
    parts = jax.tree.map(lambda x: x.reshape(8, 8, *x.shape[1:]), batch)
    expected = jnp.mean(jax.lax.map(lambda part: estimate(params, part), parts), axis=0)
    found = jax.jit(mapped)(params, batch)
    # Of float32: sums of 64 terms in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_without_axis_name_the_replicas_would_drift_apart():
    """Why ``axis_name`` is there: each replica would follow the curvature of its own examples."""
    params, state = train_mapped(OPTIMIZERS["joint"](), "shard_map, unchecked")
    assert np.all(np.ptp(state[0].curvature, axis=0) > 1e-3)
    assert all(np.max(np.ptp(leaf, axis=0)) > 1e-4 for leaf in jax.tree.leaves(params))
