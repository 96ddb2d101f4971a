"""Optax's own contract for contributed optimizers (`optax/contrib/_common_test.py`), and wrappers.

Where a wrapper or `optax.apply_updates` itself needs implicit promotion, the test says so by
`standard_promotion`; everything else runs under the strict rules.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import (
    ALIASES,
    FACTORIES,
    LAMA,
    PARAMS,
    assert_all_close,
    curvature_of,
    every_alias,
    every_optimizer,
    loss,
    shapes,
    update_once,
)

from lama_optax import (
    hutchinson,
    lam,
    lam_scale,
    lama_adam,
    lama_scale,
    track_curvature,
    track_noise_scale,
)

# The tests of optax/contrib/_common_test.py, in its order.


@pytest.mark.parametrize("name", [*ALIASES, "hutchinson"])
def test_unknown_extra_arguments_and_no_second_compilation(name):
    tx = lama_adam(0.1, update_interval=2) if name == "hutchinson" else FACTORIES[name]()
    traces = []

    @jax.jit
    def step(params, state, scale):
        traces.append(1)

        def value_fn(p):  # a new closure at every trace, as in a training loop
            return scale * loss(p)

        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(
            grads, state, params, value_fn=value_fn, unexpected_extra_argument=1
        )
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for scale in (1.0, 2.0, 3.0):
        params, state = step(params, state, scale)
    assert len(traces) == 1


TARGETS = {
    "rosenbrock": (
        jnp.zeros(2),
        jnp.ones(2),
        lambda p: (1.0 - p[0]) ** 2 + 100.0 * (p[1] - p[0] ** 2) ** 2,
    ),
    "mixed": (
        (jnp.zeros(3), jnp.zeros((2, 2))),
        (jnp.asarray([1.0, -1.0, 2.0]), jnp.asarray([[1.0, 0.0], [-1.0, 1.0]])),
        lambda p: (
            jnp.sum((p[0] - jnp.asarray([1.0, -1.0, 2.0])) ** 2)
            + jnp.sum((p[1] - jnp.asarray([[1.0, 0.0], [-1.0, 1.0]])) ** 2)
        ),
    ),
}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *(("lama_adam", target) for target in TARGETS),
        ("lam-weight", "rosenbrock"),
        ("lam-layer", "mixed"),
    ],
)
def test_optimizes(name, target):
    params, final, value_fn = TARGETS[target]
    # The learning rate falls, since LAM's step does not shrink with the gradient.
    schedule = optax.exponential_decay(0.2, 1000, 0.1)
    tx = {
        "lama_adam": lambda: lama_adam(schedule),
        "lam-weight": lambda: lam(schedule),
        "lam-layer": lambda: lam(schedule, granularity="layer"),
    }[name]()
    state = optax.tree.map_params(tx, lambda v: v, tx.init(params))

    def step(carry, _):
        params, state = carry
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=3000)[0])
    params, _ = run((params, state))
    assert_all_close(params, final, rtol=3e-2, atol=3e-2)  # optax's own tolerance


@pytest.mark.standard_promotion
@every_alias
def test_inject_hyperparams_gives_the_same_updates_and_states(name):
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]  # those of optax's test
    grads = jax.tree.map(jnp.negative, params)
    factory = FACTORIES[name]
    updates, state = update_once(factory(), grads, params, value_fn=loss)
    injected = optax.inject_hyperparams(factory)()
    other_updates, other_state = update_once(injected, grads, params, value_fn=loss)
    assert_all_close(other_updates, updates)
    assert_all_close(other_state.inner_state, state, rtol=1e-5, atol=1e-5)  # optax's tolerance


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("lama_adam", "float32"), ("lam-layer", "bfloat16")],
)
def test_multi_steps(name, dtype):
    tx = FACTORIES[name]()
    accumulated = optax.MultiSteps(tx, every_k_schedule=2)
    params = jnp.asarray([1.0, 2.0], dtype)
    grads = 2 * params
    update = jax.jit(functools.partial(accumulated.update, value_fn=loss))
    updates, state = update(grads, jax.jit(accumulated.init)(params), params)
    assert updates.tolist() == [0.0, 0.0]
    updates, _ = update(grads, state, params)
    # The mean of two equal gradients is that gradient.
    expected, _ = update_once(tx, grads, params, value_fn=loss)
    rtol = {"bfloat16": 2e-2, "float32": 1e-5}[dtype]  # two roundings of the dtype; as above
    assert updates.dtype == params.dtype
    assert_all_close(updates, expected, rtol=rtol)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("lama_adam", "float64"),
        ("lam-weight", "bfloat16"),
        ("lam-layer", "float64"),
        ("hutchinson", "bfloat16"),
    ],
)
def test_state_shape_and_dtype_are_stable(name, dtype):
    """`lax.cond` and `lax.scan` refuse a state that changes."""
    with jax.enable_x64(dtype == "float64"):
        tx = lama_scale(estimator=hutchinson(2)) if name == "hutchinson" else FACTORIES[name]()
        params = {"a": {"w": jnp.asarray([1.0, 2.0], dtype)}, "b": jnp.asarray(3.0, dtype)}
        state = tx.init(params)

        def step(carry, do):
            params, state = carry
            grads = jax.grad(loss)(params)
            updates, state = jax.lax.cond(
                do,
                lambda: tx.update(grads, state, params, value_fn=loss),
                lambda: (optax.tree.zeros_like(grads), state),
            )
            return (optax.apply_updates(params, updates), state), None

        do = jnp.asarray([True, False, True])
        carry, _ = jax.jit(lambda c: jax.lax.scan(step, c, do))((params, state))
        assert shapes(carry) == shapes((params, state))
        for new, old in zip(jax.tree.leaves(carry), jax.tree.leaves((params, state)), strict=True):
            assert new.weak_type == old.weak_type


@pytest.mark.parametrize("factory", [lama_adam, lam])
def test_learning_rate_is_annotated_as_a_schedule_and_takes_one(factory):
    annotation = inspect.signature(factory).parameters["learning_rate"].annotation
    assert annotation in (optax.ScalarOrSchedule, optax.Schedule)

    trained = []
    for learning_rate in (0.5, optax.constant_schedule(0.5)):
        tx = factory(learning_rate)
        updates, _ = update_once(tx, PARAMS, PARAMS, curvature=curvature_of(PARAMS))
        trained.append(updates)
    assert_all_close(*trained, rtol=1e-6)


# Tools and wrappers of optax.


@every_optimizer
def test_map_params_finds_what_is_shaped_like_the_parameters(name):
    tx = FACTORIES[name]()
    state = tx.init(PARAMS)
    marked = optax.tree.map_params(tx, lambda _: "param", state, transform_non_params=lambda _: "-")
    num_leaves = len(jax.tree.leaves(PARAMS))
    expected = {"lama": 2, "lam-": 0, "lam_": 0}[name[:4]] if name.endswith("layer") else None
    if expected is None:
        expected = 2 if name in LAMA else 1
    assert jax.tree.leaves(marked).count("param") == expected * num_leaves
    # With a second tree beside it, as for shardings or per-parameter masks.
    doubled = optax.tree.map_params(tx, lambda v, p: v + p, state, PARAMS)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)


def test_named_chain_and_clipping_before_it():
    name = "lama_scale"
    tx = optax.named_chain(
        ("clip", optax.clip_by_global_norm(0.5)),
        ("elementwise", optax.clip(0.2)),
        (name, LAMA[name]()),
    )
    updates, state = update_once(tx, PARAMS, PARAMS, value_fn=loss)
    clipped = jax.tree.map(lambda g: jnp.clip(0.5 * g / optax.tree.norm(PARAMS), -0.2, 0.2), PARAMS)
    inner = LAMA[name]()
    expected, expected_state = update_once(inner, clipped, PARAMS, value_fn=loss)
    assert_all_close(updates, expected)
    assert_all_close(state[name], expected_state)


def test_chain_drops_no_extra_argument():
    name = "lama_scale"
    tx = optax.chain(optax.identity(), LAMA[name](), optax.scale(2.0))
    updates, _ = update_once(tx, PARAMS, PARAMS, curvature=curvature_of(PARAMS))
    expected, _ = update_once(LAMA[name](), PARAMS, PARAMS, curvature=curvature_of(PARAMS))
    assert_all_close(updates, jax.tree.map(lambda u: 2 * u, expected))


MASKS = {
    "leaves": {"a": {"kernel": True, "bias": True}, "b": {"kernel": False, "bias": False}},
    "modules": {"a": True, "b": False},
    "function": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masked_takes_the_curvature_of_the_whole_tree(mask):
    tx = optax.masked(lama_scale(sensitivity=0.5), MASKS[mask])
    updates, state = update_once(tx, PARAMS, PARAMS, curvature=curvature_of(PARAMS))
    # In order of the leaves, bias before kernel: 2, 4, 6, 8; sizes 2, 4, 1, 2.
    expected = [4.0, 8.0] if mask == "function" else [(2 * 2 + 4 * 4) / 6]
    assert state.inner_state.curvature.tolist() == pytest.approx(expected)  # float32
    # What is masked passes through.
    assert updates["b"]["bias"].tolist() == PARAMS["b"]["bias"].tolist()
    assert updates["a"]["kernel"].tolist() != PARAMS["a"]["kernel"].tolist()


LABELS = {
    "leaves": {"a": {"kernel": "x", "bias": "x"}, "b": {"kernel": "y", "bias": "y"}},
    "modules": {"a": "x", "b": "y"},
}


@pytest.mark.parametrize("labels", LABELS)
def test_partition_into_two_lama_groups(labels):
    tx = optax.partition(
        {"x": lama_scale(sensitivity=0.5), "y": lama_scale(sensitivity=-0.5)}, LABELS[labels]
    )
    updates, state = update_once(tx, PARAMS, PARAMS, curvature=curvature_of(PARAMS))
    for label, module, sign in (("x", "a", 1), ("y", "b", -1)):
        alone = lama_scale(sensitivity=sign * 0.5)
        params = {module: PARAMS[module]}
        curvature = {module: curvature_of(PARAMS)[module]}
        expected, expected_state = update_once(alone, params, params, curvature=curvature)
        assert_all_close(updates[module], expected[module])
        inner = state.inner_states[label].inner_state
        assert_all_close(inner.alpha, expected_state.alpha)


@pytest.mark.parametrize("name", ["lama_adam", "lam-layer"])
def test_apply_if_finite(name):
    tx = optax.apply_if_finite(FACTORIES[name](), max_consecutive_errors=3)
    update = jax.jit(functools.partial(tx.update, value_fn=loss))
    _, state = update(PARAMS, tx.init(PARAMS), PARAMS)
    spoilt = {**PARAMS, "b": jax.tree.map(lambda p: p * jnp.nan, PARAMS["b"])}
    updates, after = update(spoilt, state, PARAMS)
    assert int(after.total_notfinite) == 1
    assert all((u == 0).all() for u in jax.tree.leaves(updates))
    assert_all_close(after.inner_state, state.inner_state, rtol=0, atol=0)  # kept, not redone


@every_alias
def test_mixed_dtypes_in_one_tree(name):
    params = {
        "half": {"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(1, jnp.float32)},
        "other half": {"w": jnp.ones(2, jnp.float16)},
        "full": {"w": jnp.ones(2, jnp.float32)},
    }

    def value_fn(p):
        return functools.reduce(
            jnp.add, [jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(p)]
        )

    tx = FACTORIES[name]()
    updates, state = update_once(tx, params, params, value_fn=value_fn)
    assert shapes(updates) == shapes(params)
    assert all((jnp.isfinite(u) & (u != 0)).all() for u in jax.tree.leaves(updates))
    assert shapes(state) == shapes(tx.init(params))


@pytest.mark.parametrize(
    "tx",
    [
        track_curvature(),
        track_noise_scale(),
        lama_scale(),
        lam_scale(),
        lam_scale(granularity="layer"),
    ],
    ids=["track_curvature", "track_noise_scale", "lama", "lam by weight", "lam by layer"],
)
def test_a_tree_without_parameters(tx):
    """As `optax.partition` makes one for a label that no leaf has."""
    extra = {"sampled_losses_fn": lambda p, key: jnp.ones(4), "value_fn": lambda p: jnp.ones(())}
    updates, state = tx.update({}, tx.init({}), {}, losses_fn=lambda p: jnp.ones(4), **extra)
    assert updates == {}
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
