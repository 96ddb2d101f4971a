"""Each trap of the field, one test a row: ours passes where the named peer was seen to fail.

The rows are those of the compatibility table of the README. Where another file holds the full
test, the section says which, and what stands here is the shortest form of the trap. What a peer
does is asserted for the version alone in which it was seen, so that a repaired peer breaks nothing.
"""

import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

from lama_optax import (
    LamaState,
    exact_trace,
    hutchinson,
    lama_adam,
    lama_scale,
    layer_curvature,
)

PARAMS = {"a": {"w": jnp.asarray([0.5, -1.0])}, "b": {"w": jnp.asarray([2.0])}}
# Compiles faster than the default generator.
KEY = jax.random.key(0, impl="rbg")


def loss(p):
    return jnp.sum(p["a"]["w"] ** 2) + 2 * jnp.sum(p["b"]["w"] ** 2)


def seen_in(package, *versions):
    """Whether the peer is the one whose behaviour was seen."""
    return importlib.metadata.version(package) in versions


def sophia(**options):
    return optax.contrib.sophia(0.1, update_interval=1, **options)


# -- state that breaks optax.tree.map_params; in full: test_optax_contract.py -------------------


def test_map_params_finds_the_moments_and_nothing_else():
    tx = lama_adam(0.1, update_interval=1)
    marked = optax.tree.map_params(tx, lambda _: "p", tx.init(PARAMS))
    (state,) = (s for s in marked if isinstance(s, LamaState))
    assert state.mu == state.nu == {"a": {"w": "p"}, "b": {"w": "p"}}
    assert all(isinstance(x, jax.Array) for x in (state.curvature, state.alpha, state.count))


def test_a_dictionary_per_layer_breaks_map_params():
    def init(params):
        return {"mu": optax.tree.zeros_like(params), "layers": dict.fromkeys(params, 0.0)}

    tx = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    if not seen_in("optax", "0.2.8"):
        pytest.skip("seen in optax 0.2.8")
    with pytest.raises(TypeError):  # map_params calls init with a placeholder, which has no keys
        optax.tree.map_params(tx, lambda _: "p", tx.init(PARAMS))


# -- finite gradients, infinite curvature; in full: test_faults.py, test_lama.py ----------------


def kinked(p):
    """Finite gradient and infinite second derivative where the sum is 0: it is there."""
    return jnp.abs(jnp.sum(p["w"])) ** 1.5 + jnp.sum(p["w"] ** 2)


def test_infinite_curvature_poisons_nothing():
    params = {"w": jnp.asarray([1.0, -1.0])}
    grads = jax.grad(kinked)(params)
    assert np.isfinite(grads["w"]).all()
    tx = optax.apply_if_finite(lama_adam(0.1, key=KEY, update_interval=1), max_consecutive_errors=3)
    step = jax.jit(tx.update, static_argnames="value_fn")
    updates, state = step(grads, tx.init(params), params, value_fn=kinked)
    assert np.isfinite(updates["w"]).all()
    assert int(state.inner_state[0].rejected) == 1
    smooth = jax.jit(functools.partial(tx.update, value_fn=lambda p: jnp.sum(p["w"] ** 2)))
    updates, state = smooth(grads, state, params)
    assert (updates["w"] != 0).all()
    assert float(state.inner_state[0].curvature[0]) == 2.0


@pytest.mark.standard_promotion
def test_infinite_curvature_poisons_sophia():
    if not seen_in("optax", "0.2.8"):
        pytest.skip("seen in optax 0.2.8")
    params = {"w": jnp.asarray([1.0, -1.0])}
    grads = jax.grad(kinked)(params)
    tx = optax.apply_if_finite(sophia(), max_consecutive_errors=3)
    _, state = tx.update(grads, tx.init(params), params, obj_fn=kinked)
    assert not np.isfinite(state.inner_state[0].nu["w"]).any()
    assert int(state.total_notfinite) == 0  # the update was finite: the wrapper saw nothing
    for _ in range(2):  # good steps do not mend it
        _, state = tx.update(grads, state, params, obj_fn=lambda p: jnp.sum(p["w"] ** 2))
    assert not np.isfinite(state.inner_state[0].nu["w"]).any()


# -- mixed bfloat16 and float32 parameters; in full: test_precision.py --------------------------

MIXED = {"a": {"w": jnp.ones(2, jnp.bfloat16)}, "b": {"w": jnp.ones(1)}}


def mixed_loss(p):
    return loss(optax.tree.cast(p, jnp.float32))


def test_mixed_parameters():
    tx = lama_scale(key=KEY)
    update = jax.jit(functools.partial(tx.update, value_fn=mixed_loss))
    updates, state = update(MIXED, tx.init(MIXED), MIXED)
    assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, MIXED)
    assert state.curvature.tolist() == [2.0, 4.0]


@pytest.mark.standard_promotion
def test_mixed_parameters_in_sophia():
    if not seen_in("optax", "0.2.8"):
        pytest.skip("seen in optax 0.2.8")
    tx = sophia()
    with pytest.raises(TypeError, match="primal and tangent arguments"):
        tx.update(MIXED, tx.init(MIXED), MIXED, obj_fn=mixed_loss)


# -- partition and masked hide params; in full: test_wrappers.py --------------------------------

LABELS = {"a": "x", "b": "y"}


def test_partition_says_what_to_write_and_that_works():
    tx = optax.partition({"x": lama_scale(), "y": optax.sgd(0.1)}, LABELS)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"MaskedNode.*curvature=jax\.tree\.unflatten"):
        tx.update(PARAMS, state, PARAMS, value_fn=loss)
    c = layer_curvature(PARAMS, KEY, estimator=hutchinson(1), layers="leaf", value_fn=loss)
    curvature = jax.tree.unflatten(jax.tree.structure(PARAMS), c.mean)
    _, state = jax.jit(tx.update)(PARAMS, state, PARAMS, curvature=curvature)
    assert state.inner_states["x"].inner_state.curvature.tolist() == [2.0]


@pytest.mark.standard_promotion
def test_partition_crashes_inside_the_users_loss_in_sophia():
    if not seen_in("optax", "0.2.8"):
        pytest.skip("seen in optax 0.2.8")
    tx = optax.partition({"x": sophia(), "y": optax.sgd(0.1)}, LABELS)
    with pytest.raises(TypeError, match="MaskedNode"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, obj_fn=lambda p: jnp.sum(p["b"] ** 2))


# -- inject_hyperparams traces an integer; in full: test_optax_contract.py ----------------------


def probes_as_an_argument(learning_rate, num_probes):
    """An optimizer as optax PR 1604 has it: the count is an argument of the factory."""
    estimator = hutchinson(num_probes=num_probes)
    return lama_adam(learning_rate, estimator=estimator, key=KEY, update_interval=1)


@pytest.mark.standard_promotion
def test_the_number_of_probes_is_static_under_inject_hyperparams():
    tx = optax.inject_hyperparams(lama_adam)(0.1, estimator=hutchinson(num_probes=3))
    state = tx.init(PARAMS)
    assert "estimator" not in state.hyperparams
    updates, _ = jax.jit(functools.partial(tx.update, value_fn=loss))(PARAMS, state, PARAMS)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)

    trap = optax.inject_hyperparams(probes_as_an_argument)(0.1, num_probes=3)
    update = jax.jit(functools.partial(trap.update, value_fn=loss))
    with pytest.raises((TypeError, ValueError)):  # jax: a shape cannot be a traced number
        update(PARAMS, trap.init(PARAMS), PARAMS)


# -- MultiSteps evaluates on every mini-step: test_accumulation.py ------------------------------


# -- devices drift apart under shard_map; a mesh with explicit axis types; in full: test_sharding.py


def mesh(explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    return jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2])


X = jnp.arange(8.0).reshape(8, 1) * jnp.asarray([[0.5, -0.25]])


def batch_loss(p, x):
    return jnp.mean((x @ p["w"]) ** 4)


def test_replicas_agree_under_shard_map():
    params = {"w": jnp.asarray([1.0, 0.5])}
    spec = jax.sharding.PartitionSpec

    def update(tx, p, x):
        _, state = tx.update(p, tx.init(p), p, value_fn=lambda p: batch_loss(p, x))
        return state.curvature[None]  # one row a device

    def on_devices(axis_name):
        tx = lama_scale(axis_name=axis_name, estimator=exact_trace())
        return jax.jit(
            jax.shard_map(
                functools.partial(update, tx),
                mesh=mesh(explicit=False),
                in_specs=(spec(), spec("data")),
                out_specs=spec("data"),
                check_vma=False,
            )
        )(params, X)

    first, second = on_devices("data")
    assert first.tolist() == second.tolist()
    whole = layer_curvature(
        params, 0, estimator=exact_trace(), value_fn=lambda p: batch_loss(p, X)
    ).mean
    np.testing.assert_allclose(first, whole, rtol=1e-5)  # float32, in another order
    first, second = on_devices(None)  # the trap, in our own code
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_meshes_of_both_axis_types(explicit):
    tx = lama_scale(key=KEY, estimator=hutchinson(2))
    params = {"a": {"w": jnp.arange(4.0), "b": jnp.ones(2)}}

    def update(p):
        return tx.update(p, tx.init(p), p, value_fn=lambda p: _quartic(p))

    expected, alone = jax.jit(update)(params)
    with jax.set_mesh(mesh(explicit)):
        sharding = jax.sharding.NamedSharding(mesh(explicit), jax.sharding.PartitionSpec("data"))
        updates, state = jax.jit(update)(jax.device_put(params, sharding))
    np.testing.assert_allclose(state.curvature, alone.curvature, rtol=1e-6)
    np.testing.assert_allclose(updates["a"]["w"], expected["a"]["w"], rtol=1e-6)


def _quartic(p):
    return sum(jnp.sum(leaf**4) for leaf in jax.tree.leaves(p))


# -- typed PRNG keys break checkpoints; in full: test_checkpoints.py ---------------


def test_the_state_is_plain_arrays_and_resumes_to_the_bit():
    tx = lama_adam(0.1, key=jax.random.key(3, impl="rbg"), update_interval=2)
    step = jax.jit(lambda p, s: tx.update(jax.grad(_quartic)(p), s, p, value_fn=_quartic))
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = step(PARAMS, state)
    leaves, treedef = jax.tree.flatten(state)
    saved = [(x.tobytes(), x.dtype.name, x.shape) for x in map(np.asarray, leaves)]  # no key types
    restored = jax.tree.unflatten(
        treedef, [jnp.asarray(np.frombuffer(b, d).reshape(s)) for b, d, s in saved]
    )
    for x, y in zip(
        jax.tree.leaves(step(PARAMS, restored)), jax.tree.leaves(step(PARAMS, state)), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_a_typed_key_is_no_array_of_numpy():
    with pytest.raises(TypeError):
        np.asarray(jax.random.key(0))


# -- vmapped probes exhaust memory; in full: test_estimators.py ---------------------------------


def test_chunks_bound_the_memory():
    width = 64
    params = {"w": jnp.zeros((width, width))}

    def value_fn(p):
        return jnp.mean(jnp.tanh(jnp.tanh(p["w"]) @ p["w"]) ** 2)

    def temporaries(chunk_size):
        estimator = hutchinson(32, chunk_size=chunk_size)
        fn = functools.partial(layer_curvature, estimator=estimator, value_fn=value_fn)
        compiled = jax.jit(fn).lower(params, KEY).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # 32 vmapped probes hold at least 32 tangents; one at a time a handful of arrays.
    assert temporaries(32) > 32 * params["w"].nbytes
    assert temporaries(1) < 16 * params["w"].nbytes
    assert temporaries(None) < 0.5 * temporaries(32)  # and the default is on the safe side


# -- no standard error; in full: test_estimators.py ---------------------------------------------


@pytest.mark.parametrize("estimator", [hutchinson(4), exact_trace()], ids=["hutchinson", "exact"])
def test_every_estimator_returns_a_standard_error(estimator):
    c = layer_curvature(PARAMS, KEY, estimator=estimator, value_fn=coupled)
    assert c.std_error.shape == c.mean.shape == (2,)
    assert (c.std_error[0] > 0) == (estimator != exact_trace())


def coupled(p):
    """Off-diagonal curvature, so that probes of random signs are noisy."""
    return jnp.sum(p["a"]["w"]) ** 2 + jnp.sum(p["b"]["w"] ** 2)


# -- a loss that returns (value, aux); in full: test_estimators.py -------------------------------


def test_has_aux_and_the_error_that_names_it():
    tx = lama_scale(estimator=exact_trace(has_aux=True))
    update = jax.jit(functools.partial(tx.update, value_fn=lambda p: (loss(p), {"n": 1})))
    _, state = update(PARAMS, tx.init(PARAMS), PARAMS)
    assert state.curvature.tolist() == [2.0, 4.0]
    with pytest.raises(ValueError, match=r"returned a tuple.*has_aux=True"):
        lama_scale().update(
            PARAMS, lama_scale().init(PARAMS), PARAMS, value_fn=lambda p: (loss(p), {"n": 1})
        )


@pytest.mark.standard_promotion
def test_has_aux_in_sophia():
    if not seen_in("optax", "0.2.8"):
        pytest.skip("seen in optax 0.2.8")
    tx = sophia()
    with pytest.raises(TypeError, match="scalar-output"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, obj_fn=lambda p: (loss(p), {"n": 1}))


# -- TrainState of flax passes no extra arguments; in full: test_notebooks.py --------------------


@pytest.mark.standard_promotion
def test_train_state():
    from lama_optax.flax import TrainState

    tx = lama_adam(0.1, estimator=exact_trace(), update_interval=1)
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    step = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params), value_fn=loss))
    state = step(state)
    assert state.opt_state[0].curvature.tolist() == [2.0, 4.0]
    assert float(loss(state.params)) < float(loss(PARAMS))

    if seen_in("flax", "0.12.8", "0.12.12"):
        theirs = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
        with pytest.raises((TypeError, ValueError)):
            theirs.apply_gradients(grads=PARAMS, value_fn=loss)
