"""`track_noise_scale` where nothing can be known, on devices, in wrappers: never a wrong number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from noise import (
    PARAMS,
    ROWS,
    TRACKER,
    averages,
    example_gradients,
    losses,
    run_groups,
    run_signs,
    signs_step,
    tracker,
    value,
)

from lama_optax import (
    NoiseScaleState,
    grouped_value_and_grad,
    noise_report,
    stacked,
    track_noise_scale,
)

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
UNKNOWN = {"noise_scale": None, "std_error": None, "at_least": None, "at_most": None}

# What is not known, and what is wrong.


def find(state):
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, NoiseScaleState))
    return next(node for node in nodes if isinstance(node, NoiseScaleState))


@pytest.mark.parametrize("run", [run_signs, run_groups])
def test_a_gradient_of_zero_is_not_known(run):
    state = run(TRACKER, ROWS)
    report = noise_report(state, PARAMS)
    assert report["unused"] == UNKNOWN
    assert report["used"] == report["total"] != UNKNOWN
    assert state.rejected == 0


def test_equal_examples_in_groups_are_not_known():
    """Three groups, whose mean is rounded."""
    batches = np.tile(ROWS[:8, :1], (1, 6, 1))
    report = noise_report(run_groups(TRACKER, batches, num_groups=3), PARAMS)
    assert report["total"] == UNKNOWN


def test_equal_examples_with_signs_are_not_known():
    report = noise_report(run_signs(TRACKER, np.tile(ROWS[:20, :1], (1, 32, 1))), PARAMS)
    assert report["total"]["noise_scale"] is None


def test_one_example_beside_padding_is_no_estimate():
    state, weights = TRACKER.init(PARAMS), np.zeros(32, np.float32)
    weights[2] = 0.3
    for rows in ROWS[:3]:
        state = signs_step(TRACKER, weighted=True)(state, rows, weights)
    assert state.weight.tolist() == [0, 0, 0]
    assert state.rejected == 0


def test_what_is_not_finite_is_rejected():
    state = run_signs(TRACKER, ROWS[:3])
    for bad in (np.nan, np.inf, 1e30):  # its square overflows
        rows = np.array(ROWS[3])
        rows[0, 0] = bad
        after = signs_step(TRACKER)(state, rows)
        assert after.rejected == 2  # "used" and the total
        assert after.mean.tolist() == state.mean.tolist()
        assert after.scale.tolist() == state.scale.tolist()


@pytest.mark.standard_promotion  # of optax's clipping
@pytest.mark.parametrize("before", [optax.clip_by_global_norm(0.1), SLOW(optax.scale(0.9))])
def test_behind_clipping_or_scaling(before):
    """With signs |G|^2 seems smaller than it is: too large, or not known. Groups do not mind."""
    tx = optax.chain(before, tracker())
    right = noise_report(run_groups(TRACKER, ROWS), PARAMS)
    assert noise_report(run_groups(tx, ROWS), PARAMS) == right
    first = noise_report(run_signs(TRACKER, ROWS), PARAMS)["total"]
    assert first["at_least"] < right["total"]["noise_scale"] < first["at_most"]
    behind = noise_report(run_signs(tx, ROWS), PARAMS)["total"]["noise_scale"]
    assert behind is None or behind > 1.1 * first["noise_scale"]


GROUPS = jax.tree.map(lambda p: jnp.ones((4, *p.shape)), PARAMS)


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({}, "losses_fn is missing"),
        ({"losses_fn": lambda p: value(p, ROWS[0])}, "losses_fn must return the losses of all"),
        ({"losses_fn": lambda p: losses(p, ROWS[0, :1])}, "at least two examples.*got 1"),
        ({"group_gradients": GROUPS}, "batch_size must be an integer"),
        ({"group_gradients": PARAMS, "batch_size": 32}, "group_gradients must be shaped"),
        (
            {"group_gradients": {"used": GROUPS["used"]}, "batch_size": 32},
            "group_gradients must be",
        ),
        (
            {"group_gradients": jax.tree.map(lambda g: g[:1], GROUPS), "batch_size": 32},
            "at least two groups; got 1",
        ),
    ],
)
def test_errors_of_update(extra, match):
    tx = tracker()
    with pytest.raises(ValueError, match=match):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, **extra)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: track_noise_scale(decay=1.0), r"decay must be in \[0, 1\)"),
        (lambda: track_noise_scale(update_interval=0), "update_interval must be"),
        (lambda: track_noise_scale(layers="modules"), "layers must be one of"),
        (lambda: track_noise_scale(key="0").init(PARAMS), "key must be"),
        (lambda: grouped_value_and_grad(value, 0), "num_groups must be"),
        (lambda: grouped_value_and_grad(3.0, 2), "loss_fn must be a function"),
        (lambda: grouped_value_and_grad(value, 3)(PARAMS, ROWS[0]), "num_groups=3.* 32 examples"),
    ],
)
def test_errors_of_construction(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# Devices, dtypes, wrappers.


def mesh_of(count):
    return jax.make_mesh(
        (count,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )


def mapped(step, how, others=0):
    if how == "pmap":
        devices = jax.devices()[:4]
        in_axes = (None, 0, *[None] * others)
        fn = jax.pmap(step, axis_name="d", in_axes=in_axes, out_axes=None, devices=devices)
        return lambda state, rows, *args: fn(state, rows.reshape(4, -1, *rows.shape[1:]), *args)
    return jax.jit(
        jax.shard_map(
            step,
            mesh=mesh_of(4),
            in_specs=(P(), P("d"), *[P()] * others),
            out_specs=P(),
            check_vma=how == "shard_map, checked",
        )
    )


@pytest.mark.parametrize(
    "how", ["shard_map, checked", *map(SLOW, ("shard_map, unchecked", "pmap"))]
)
def test_each_device_draws_signs_of_its_own(how):
    """The whole batch's estimate, by signs that differ between the devices."""
    tx = tracker(axis_name="d")

    def step(state, rows):
        def mean_loss(p):
            return jax.lax.pmean(value(p, rows), "d")

        grads = jax.grad(mean_loss)(PARAMS)
        if how != "shard_map, checked":  # there JAX sums a replicated argument's gradient
            grads = jax.lax.pmean(grads, "d")
        return tx.update(grads, state, PARAMS, losses_fn=lambda p: losses(p, rows))[1]

    state, step = tx.init(PARAMS), mapped(step, how)
    for rows in ROWS[:2]:
        state = step(state, rows)
    key = jax.random.fold_in(jax.random.key(0), 1)
    keys = [jax.random.fold_in(key, device) for device in range(4)]
    signs = np.stack([jax.random.rademacher(k, (8,), jnp.float32) for k in keys])
    rows = example_gradients(lambda p: losses(p, ROWS[1]), {"used": PARAMS["used"]})["used"]
    q = np.sum(np.einsum("di,dip->dp", signs, rows.reshape(4, 8, 2)) ** 2) / 32
    a = np.sum(rows.mean(0) ** 2)
    first = example_gradients(lambda p: losses(p, ROWS[0]), {"used": PARAMS["used"]})["used"]
    expected = np.asarray([(q - a) * 32 / 31, (32 * a - q) / 31]) / np.sum(first.mean(0) ** 2)
    np.testing.assert_allclose(averages(state, PARAMS)["total"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("how", "num_groups"),
    [
        ("shard_map, checked", 2),
        ("pmap", 1),
        SLOW("shard_map, checked", 1),
        SLOW("shard_map, unchecked", 2),
    ],
)
def test_devices_are_the_groups(how, num_groups):
    tx = tracker(axis_name="d")

    def step(state, rows, shrink):
        _, grads, groups = grouped_value_and_grad(value, num_groups)(PARAMS, rows)
        grads = jax.tree.map(lambda g: shrink * g, jax.lax.pmean(grads, "d"))
        return tx.update(grads, state, PARAMS, group_gradients=groups, batch_size=32)[1]

    state, fn = tx.init(PARAMS), mapped(step, how, others=1)
    for rows in ROWS[:4]:
        state = fn(state, rows, 1.0)
    expected = run_groups(TRACKER, ROWS[:4], 4 * num_groups)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4), state, expected)
    # Updates that are not the groups' mean, such as clipped ones.
    after = fn(state, ROWS[4], 0.9)
    assert after.rejected == 2
    assert after.mean.tolist() == state.mean.tolist()


def test_a_loss_that_sums_over_devices_is_refused():
    tx = tracker(axis_name="d")

    def step(state, rows):
        extra = {"losses_fn": lambda p: jax.lax.pmean(losses(p, rows), "d")}
        return tx.update(PARAMS, state, PARAMS, **extra)[1]

    with pytest.raises(ValueError, match="losses_fn holds a collective"):
        mapped(step, "shard_map, checked")(tx.init(PARAMS), ROWS[0])


@pytest.mark.parametrize("run", [run_signs, run_groups])
def test_sharded_batches_under_jit(run):
    sharded = jax.device_put(ROWS[:4], NamedSharding(mesh_of(4), P(None, "d")))
    found, expected = run(TRACKER, sharded), run(TRACKER, ROWS[:4])
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4), found, expected)


def test_bfloat16_parameters():
    tx, found = tracker(), []

    @jax.jit
    def step(state, params, rows):
        rows = rows.astype(params["used"].dtype)
        grads = jax.grad(value)(params, rows)
        return tx.update(grads, state, params, losses_fn=lambda p: losses(p, rows))[1]

    for dtype in (jnp.float32, jnp.bfloat16):
        params = jax.tree.map(lambda p, dtype=dtype: p.astype(dtype), PARAMS)
        state = tx.init(params)
        for rows in ROWS:
            state = step(state, params, rows)
        assert state.mean.dtype == jnp.float32
        found.append(noise_report(state, params)["total"]["noise_scale"])
    # Gradients are off by about 1 % each, their squares by twice that.
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_stacked_layers():
    kernels = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 2)), jnp.float32)

    def losses_fn(p):
        hidden = ROWS[0]
        for kernel in p["blocks"] if "blocks" in p else p.values():
            hidden = jnp.tanh(hidden @ kernel)
        return jnp.sum(hidden, 1)

    def estimate(params, layers):
        tx = tracker(layers=layers)
        state, mean = tx.init(params), jax.grad(lambda p: jnp.mean(losses_fn(p)))(params)
        update = jax.jit(lambda state: tx.update(mean, state, params, losses_fn=losses_fn)[1])
        state = update(update(state))
        return list(noise_report(state, params, layers)), state.mean

    names, means = estimate({"blocks": kernels}, stacked("blocks"))
    _, expected = estimate({"a": kernels[0], "b": kernels[1]}, "module")
    assert names == ["total", "blocks[0]", "blocks[1]"]
    np.testing.assert_allclose(means, expected, rtol=1e-5)


@pytest.mark.standard_promotion  # of optax.MultiSteps
def test_micro_batches_under_multi_steps():
    """The losses of all micro-batches stand beside the accumulated gradient, when it is emitted."""
    tx = optax.MultiSteps(optax.chain(tracker(), optax.sgd(0.0)), 2)

    @jax.jit
    def step(state, part, micro_batches):
        def losses_fn(p):
            one = jax.checkpoint(functools.partial(losses, p))
            return jnp.concatenate(jax.lax.map(one, micro_batches))

        grads = jax.grad(value)(PARAMS, part)
        return tx.update(grads, state, PARAMS, losses_fn=losses_fn)[1]

    state = tx.init(PARAMS)
    for rows in np.asarray(ROWS[:3]):
        micro_batches = rows.reshape(2, 16, 2)
        for part in micro_batches:
            state = step(state, part, micro_batches)
    found, expected = find(state), run_signs(TRACKER, ROWS[:3])
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4), found, expected)


def test_updates_pass_unchanged_and_the_state_maps_over_params():
    tx = optax.chain(tracker(), optax.adam(1e-3))
    state = tx.init(PARAMS)
    mapped_state = optax.tree.map_params(tx, lambda p: p, state)
    assert jax.tree.structure(mapped_state) == jax.tree.structure(state)
    alone = tracker()
    extra = {"losses_fn": lambda p: losses(p, ROWS[0])}
    updates, _ = alone.update(PARAMS, alone.init(PARAMS), PARAMS, **extra)
    assert updates is PARAMS
