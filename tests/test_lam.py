"""`lam_scale` and `lam` against document 2 in NumPy, and per weight against optax.rmsprop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from lama_optax import lam, lam_scale


def train(tx, params, gradient, steps):
    """Trains in one compiled scan; returns the parameters of every step, stacked."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    scan = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[1])
    return scan(jax.tree.map(jnp.asarray, params))


def loss(params, problem):
    hidden, out = params["Dense_0"], params["Dense_1"]
    h = jnp.tanh(problem.x @ hidden["kernel"] + hidden["bias"][None])
    z = (h @ out["kernel"] + out["bias"][None])[:, 0]
    return jnp.mean(jax.nn.softplus(z) - problem.y * z)


@pytest.mark.parametrize("granularity", ["weight", "layer"])
@pytest.mark.parametrize(
    ("seed", "options"), [(0, {}), (1, {"decay": 0.5, "eps": 1e-2}), (2, {"decay": 0.0})]
)
def test_lam_follows_its_rule(x64, seed, options, granularity):
    problem = reference.make_problem(seed)
    history = reference.lam(problem, 30, 0.01, granularity=granularity, **options)
    tx = lam(0.01, granularity=granularity, **options)
    params = train(tx, problem.params, jax.grad(functools.partial(loss, problem=problem)), 30)
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *history)
    for layer, leaves in expected.items():
        for name, leaf in leaves.items():
            # As for LAMA: rounding at 1e-16, thirty steps that carry it on.
            np.testing.assert_allclose(params[layer][name], leaf, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_per_weight_is_rmsprop_with_eps_outside_the_root(x64, dtype):
    """The document's eps is outside the square root; optax puts it inside by default."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(30, 2)), dtype)}
    scale = jnp.asarray(rng.normal(size=(30, 2)) ** 2, dtype)

    def gradient(p):
        return {"w": scale * p["w"]}

    ours = train(lam(0.1), params, gradient, 30)["w"]
    rmsprop = functools.partial(optax.rmsprop, 0.1, decay=0.9, eps=1e-8)
    theirs = train(rmsprop(eps_in_sqrt=False), params, gradient, 30)["w"]
    # The same rule in another order of roundings, at most one each step of numbers below 1;
    # ten times that for the steps that carry them on.
    tolerance = 300 * np.finfo(dtype).eps
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def test_per_weight_is_not_rmsprop_with_optaxs_default_eps(x64):
    """With sqrt(v + 1e-8) a gradient of 1e-5 is scaled by another number: see the reference."""
    params = jnp.zeros(1)
    g = jnp.full(1, 1e-5)
    steps = {}
    for name, tx in {
        "lam": lam(1.0),
        "inside": optax.rmsprop(1.0, decay=0.9, eps=1e-8),
        "outside": optax.rmsprop(1.0, decay=0.9, eps=1e-8, eps_in_sqrt=False),
    }.items():
        steps[name] = float(tx.update(g, tx.init(params), params)[0][0])
    v = 0.1 * 1e-10
    # rtol: a handful of float64 roundings.
    assert steps["lam"] == pytest.approx(-1e-5 / (np.sqrt(v) + 1e-8), rel=1e-12)
    assert steps["outside"] == pytest.approx(steps["lam"], rel=1e-12)
    assert steps["inside"] == pytest.approx(-1e-5 / np.sqrt(v + 1e-8), rel=1e-12)
    assert steps["inside"] / steps["lam"] < 0.1


@pytest.mark.parametrize("granularity", ["weight", "layer"])
def test_worked_example_with_its_arithmetic_corrected(x64, granularity):
    """With eta = 0.1, g = 0.5 and 1.5: the document prints v = 0.2025 and steps 0.0997 and 0.1."""
    params = {"w1": jnp.zeros(()), "w2": jnp.zeros(())}  # at the root: each its own layer
    grads = {"w1": jnp.asarray(0.5), "w2": jnp.asarray(1.5)}
    tx = lam(0.1, granularity=granularity)
    updates, state = tx.update(grads, tx.init(params), params)
    v = jax.tree.leaves(state[0].accumulator)
    np.testing.assert_allclose(np.ravel(v), [0.025, 0.225], rtol=1e-14)
    # 0.1/sqrt(0.1), less eps: 1e-8 of sqrt(v) = 0.158 and 0.474 is below 1e-7.
    for step in updates.values():
        assert step == pytest.approx(-0.31623, abs=1e-5)
        assert step == pytest.approx(-0.1 / np.sqrt(0.1), abs=1e-7)


def test_per_layer_keeps_the_direction_of_the_gradient(x64):
    rng = np.random.default_rng(0)
    grads = {
        layer: {name: jnp.asarray(rng.normal(size=4)) for name in ("kernel", "bias")}
        for layer in ("a", "b")
    }
    tx = lam_scale(granularity="layer")
    updates, state = tx.update(grads, tx.init(grads))
    assert state.accumulator.shape == (2,)
    for i, layer in enumerate(("a", "b")):
        flat = np.concatenate([grads[layer]["bias"], grads[layer]["kernel"]])
        assert state.accumulator[i] == pytest.approx(0.1 * np.mean(flat**2), rel=1e-14)
        # Property 4: one learning rate for each layer, another one for each layer.
        rates = [updates[layer][name] / grads[layer][name] for name in ("bias", "kernel")]
        expected = 1 / (np.sqrt(0.1 * np.mean(flat**2)) + 1e-8)
        np.testing.assert_allclose(rates, expected, rtol=1e-13)


def test_layers_of_lam():
    grads = {"a": {"kernel": jnp.full(3, 1.0), "bias": jnp.full(1, 2.0)}, "b": jnp.full(2, 4.0)}
    squares = {
        "module": [(3 * 1 + 4) / 4, 16],
        "leaf": [4, 1, 16],
    }
    for layers, mean_squared in squares.items():
        tx = lam_scale(granularity="layer", layers=layers, decay=0.5)
        _, state = tx.update(grads, tx.init(grads))
        assert (2 * state.accumulator).tolist() == mean_squared  # exact in binary
    labels = {"a": "all", "b": "all"}
    tx = lam_scale(granularity="layer", layers=labels, decay=0.0)
    _, state = tx.update(grads, tx.init(grads), grads)
    assert state.accumulator.tolist() == [39 / 6]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_entry_that_is_not_finite_stays_and_its_neighbour_does_not_notice(bad):
    """1e30: finite, but its square is not in float32."""
    params = jnp.zeros(2)
    tx = lam_scale()
    good, spoilt = jnp.asarray([1.0, 2.0]), jnp.asarray([bad, 2.0])
    clean_state = state = tx.init(params)
    for grads in (good, spoilt, good):
        before = state
        updates, state = tx.update(grads, state, params)
        clean, clean_state = tx.update(good, clean_state, params)
        assert jnp.isfinite(updates).all()
        assert jnp.isfinite(state.accumulator).all()
        if grads is spoilt:
            assert updates[0] == 0
            assert state.accumulator[0] == before.accumulator[0]
        assert updates[1] == clean[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_layer_that_is_not_finite_stays_and_the_other_does_not_notice(bad):
    tx = lam_scale(granularity="layer")
    good = {"a": jnp.asarray([1.0, 3.0]), "b": jnp.asarray([2.0])}
    spoilt = {"a": jnp.asarray([bad, 3.0]), "b": jnp.asarray([2.0])}
    _, before = tx.update(good, tx.init(good), good)
    expected, clean = tx.update(good, before, good)
    updates, state = tx.update(spoilt, before, good)
    assert updates["a"].tolist() == [0.0, 0.0]
    assert updates["b"].tolist() == expected["b"].tolist()
    assert state.accumulator.tolist() == [float(before.accumulator[0]), float(clean.accumulator[1])]


def test_zero_gradient_gives_zero_update():
    """0/(sqrt(0) + eps), and with eps = 0 the 0/0 that is not finite: both stay."""
    zeros = {"w": jnp.zeros(2)}
    for eps in (1e-8, 0.0):
        for granularity in ("weight", "layer"):
            tx = lam_scale(eps=eps, granularity=granularity)
            updates, _ = tx.update(zeros, tx.init(zeros), zeros)
            assert updates["w"].tolist() == [0.0, 0.0]
