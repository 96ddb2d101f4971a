"""`track_curvature` in wrappers, on devices and on layers of any size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from models import compiled_curvature

from lama_optax import (
    exact_trace,
    fisher,
    hutchinson,
    layer_curvature,
    layer_report,
    track_curvature,
)

SLOW = pytest.mark.slow
PARAMS = {
    "Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    "Dense_1": {"kernel": jnp.ones((3, 1)), "bias": jnp.ones(1)},
}
GRADS = jax.tree.map(lambda p: 0.1 * p, PARAMS)


def tracker(estimator=hutchinson(1), **options):
    """One that estimates at every step and keeps the last estimate, unless told otherwise."""
    return track_curvature(estimator, **({"update_interval": 1, "curvature_decay": 0.0} | options))


@pytest.mark.parametrize("estimator", [hutchinson(1), fisher()], ids=["hutchinson", "fisher"])
def test_layers_of_more_than_2_to_the_31_parameters(estimator):
    """80 scanned blocks of a 70-billion-parameter network, by shapes alone."""
    params = {"blocks": {"up": jax.ShapeDtypeStruct((80, 8192, 28672), jnp.bfloat16)}}

    def losses(p, key=None):
        return jnp.tanh(p["blocks"]["up"][0, :2].astype(jnp.float32))

    def step(p):
        tx = tracker(estimator)
        task = {"value_fn": lambda p: jnp.sum(losses(p)), "sampled_losses_fn": losses}
        state = tx.update(p, tx.init(p), p, **task)[1]
        return state, layer_curvature(p, 0, estimator=estimator, **task)

    state, found = jax.eval_shape(step, params)
    assert state.curvature.shape == (1,)
    assert found.size.dtype == jnp.float32


WRAPPERS = {
    "named_chain": lambda tx: optax.named_chain(("track", tx), ("sgd", optax.sgd(0.1))),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.sgd(rate))
    )(0.1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(optax.chain(tx, optax.sgd(0.1)), 3),
    "MultiSteps": lambda tx: optax.MultiSteps(optax.chain(tx, optax.sgd(0.1)), 1),
    "schedule_free": lambda tx: optax.contrib.schedule_free(
        optax.chain(tx, optax.sgd(0.1)), 0.1, b1=0.9
    ),
    "bound, under lookahead": lambda tx: optax.chain(
        optax.GradientTransformation(
            tx.init, functools.partial(tx.update, curvature=jnp.asarray([1.0, 2.0]))
        ),
        optax.sgd(0.1),
    ),
}


@pytest.mark.standard_promotion  # of optax's wrappers
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_in_optax_wrappers(wrapper):
    """The report finds what was given, and the other optimizer's update is the plain one."""
    tx = WRAPPERS[wrapper](tracker())
    state = tx.init(PARAMS)
    arguments = {} if "bound" in wrapper else {"curvature": jnp.asarray([1.0, 2.0])}
    updates, state = tx.update(GRADS, state, PARAMS, **arguments)
    report = layer_report(state, PARAMS)
    assert [row["curvature"] for row in report.values()] == [1.0, 2.0]
    if wrapper != "schedule_free":
        jax.tree.map(
            lambda u, g: np.testing.assert_allclose(u, -0.1 * g, rtol=1e-6), updates, GRADS
        )


@pytest.mark.parametrize("hide", [True, False], ids=["masked params", "whole params"])
def test_a_tracker_whose_params_are_masked(hide):
    """`layer_report` reads it where `optax.MaskedNode` stands in place of the hidden part."""
    tx = optax.masked(tracker(), {"Dense_0": True, "Dense_1": False})
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, curvature={"Dense_0": 3.0, "Dense_1": 4.0})
    params = PARAMS | ({"Dense_1": optax.MaskedNode()} if hide else {})
    if hide:
        assert layer_report(state, params)["Dense_0"]["curvature"] == 3.0
    else:
        with pytest.raises(ValueError, match="it has 1 layers"):
            layer_report(state, params)


# Devices.


def test_devices_draw_their_own_probes():
    """All see the same examples: the mean over 4 has a quarter of the variance, not all of it."""
    params = {"w": jax.random.normal(jax.random.key(0), (3, 3))}
    mesh = jax.make_mesh(
        (4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )

    def curvature(key, axis_name):
        tx = tracker(hutchinson(1), axis_name=axis_name, key=key)

        def value_fn(p):
            return jnp.sum(jnp.sin(p["w"] @ p["w"]))

        return tx.update(params, tx.init(params), params, value_fn=value_fn)[1].curvature

    def many(keys, axis_name):
        return jax.lax.map(lambda key: curvature(key, axis_name), keys)

    keys = jax.random.split(jax.random.key(7), 300)
    one = jax.jit(lambda keys: many(keys, None))(keys)
    four = jax.jit(
        jax.shard_map(lambda keys: many(keys, "d"), mesh=mesh, in_specs=P(), out_specs=P())
    )(keys)
    # A ratio of two variances from 300 draws each has a standard deviation of about 12 %.
    assert float(four.var() / one.var()) == pytest.approx(0.25, rel=0.4)


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=SLOW)])
def test_a_loss_that_sums_over_devices_is_one_function_of_all(x64, check_vma):
    """Its devices take the same draws, and the exact trace shows that nothing is summed twice."""
    params, data = {"w": jnp.asarray([0.3, -0.2])}, jnp.arange(8.0).reshape(4, 2) / 4
    mesh = jax.make_mesh(
        (4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )

    def loss(p, rows, mean):
        return mean(jnp.mean(jnp.sin(rows @ p["w"]))) ** 2

    def step(params, rows):
        tx = tracker(exact_trace(), axis_name="d")

        def value_fn(p):
            return loss(p, rows, lambda x: jax.lax.pmean(x, "d"))

        return tx.update(params, tx.init(params), params, value_fn=value_fn)[1].curvature

    found = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(P(), P("d")), out_specs=P(), check_vma=check_vma)
    )(params, data)

    def whole(p):
        return loss(p, data, lambda x: x)

    expected = compiled_curvature(params, estimator=exact_trace(), value_fn=whole).mean
    np.testing.assert_allclose(found, expected, rtol=1e-12)
