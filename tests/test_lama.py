"""`lama_scale` and `lama_adam` against the documents in NumPy, and what spec.md found in them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from lama_optax import (
    exact_trace,
    lama_adam,
    lama_scale,
)

# The bound. What is seen is 1e-14: both sides round at 1e-16 and a step of 0.05 carries
# the error of one step into the next.
ATOL = 1e-9
STEPS = 30
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


def loss(params, problem):
    hidden, out = params["Dense_0"], params["Dense_1"]
    h = jnp.tanh(problem.x @ hidden["kernel"] + hidden["bias"][None])
    z = (h @ out["kernel"] + out["bias"][None])[:, 0]
    return jnp.mean(jax.nn.softplus(z) - problem.y * z)


def train(tx, params, value_fn, steps, **extra_args):
    """Trains in one compiled scan; returns every step's parameters and state, stacked."""

    def step(carry, _):
        params, state = carry
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn, **extra_args)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    scan = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[1])
    return scan(jax.tree.map(jnp.asarray, params))


def assert_follows(history, params, state):
    """Holds the library's run against the reference's, step by step."""
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *[step.params for step in history])
    for layer, leaves in expected.items():
        for name, leaf in leaves.items():
            np.testing.assert_allclose(params[layer][name], leaf, rtol=0, atol=ATOL)
    for field in ("curvature", "alpha", "momentum", "weight_sum"):
        values = np.array([getattr(step, field) for step in history])
        np.testing.assert_allclose(getattr(state, field), values, rtol=0, atol=ATOL, err_msg=field)


PARAMS = {
    "Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    "Dense_1": {"kernel": jnp.ones((3, 1)), "bias": jnp.ones(1)},
}
GRADS = jax.tree.map(lambda p: 0.1 * p, PARAMS)


# Eqs. 1 to 9 with the exact Hessian. The curvature of the problem is about 0.1, so that
# lambda = +-10 moves alpha by some tenths; seeds and options are spread over the cases.
@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (0, {"sensitivity": 10.0}),
        SLOW(1, {"sensitivity": -10.0}),
        SLOW(2, {"sensitivity": 10.0, "momentum": "ema"}),
        (3, {"sensitivity": -10.0, "momentum": "ema"}),
        SLOW(4, {"sensitivity": 30.0, "max_momentum": 0.95, "b2": 0.99, "eps": 1e-3}),
        (5, {"sensitivity": 30.0, "max_momentum": 0.95, "momentum": "ema", "b1": 0.8}),
        SLOW(6, {"sensitivity": 10.0, "curvature_decay": 0.7}),
        (7, {"sensitivity": 10.0, "curvature_decay": 0.7, "update_interval": 4}),
        SLOW(8, {"sensitivity": 0.01, "update_interval": 7, "alpha_min": 0.1, "alpha_max": 1.05}),
    ],
    ids=lambda x: x if isinstance(x, int) else "-".join(f"{k}={v}" for k, v in x.items()),
)
def test_equations_1_to_9(x64, seed, options):
    problem = reference.make_problem(seed)
    options = {"max_momentum": None, **options}
    history = reference.lama(problem, STEPS, 0.05, **options)
    tx = optax.chain(
        lama_scale(estimator=exact_trace(), **({"update_interval": 1} | options)),
        optax.scale_by_learning_rate(0.05),
    )
    params, (state, _) = train(tx, problem.params, lambda p: loss(p, problem), STEPS)
    assert_follows(history, params, state)

    # What makes the case a test: alpha is away from 1, and the cap, where there is one, acts.
    if abs(options["sensitivity"]) > 1:
        assert np.abs(np.array(history[-1].alpha) - 1).max() > 0.01
    if options["max_momentum"] is not None:
        assert options["max_momentum"] in history[-1].momentum


def test_both_signs_move_alpha_to_either_side_of_one(x64):
    """Finding 5, on the same training step."""
    problem = reference.make_problem(0)
    params = jax.tree.map(jnp.asarray, problem.params)

    @jax.jit
    def after_one_step(params, sensitivity):
        tx = lama_scale(sensitivity=sensitivity, estimator=exact_trace(), update_interval=1)
        value_fn = lambda p: loss(p, problem)  # noqa: E731
        return tx.update(jax.grad(value_fn)(params), tx.init(params), params, value_fn=value_fn)[1]

    state = {sign: after_one_step(params, sign * 10.0) for sign in (1, -1)}
    # sigmoid(x) + sigmoid(-x) = 1: the two alphas lie symmetrically about the middle, 1.
    np.testing.assert_allclose(state[1].alpha + state[-1].alpha, 2.0, rtol=1e-14)
    positive = state[1].curvature > 0
    assert positive.any()
    assert ((state[1].alpha > 1) == positive).all()


def test_schedule_and_weight_decay_of_lama_adam(x64):
    problem = reference.make_problem(0)

    def schedule(count):  # optax's own compute in float32
        return jnp.maximum(0.1 - 0.09 * count.astype(jnp.float64) / 20, 0.01)

    options = {"sensitivity": 10.0, "weight_decay": 0.1, "max_momentum": 0.99}
    history = reference.lama(problem, STEPS, lambda t: max(0.1 - 0.09 * t / 20, 0.01), **options)
    tx = lama_adam(schedule, estimator=exact_trace(), **options, update_interval=1)
    params, (state, *_) = train(tx, problem.params, lambda p: loss(p, problem), STEPS)
    assert_follows(history, params, state)


def test_weight_decay_mask_of_lama_adam():
    kernels = jax.tree.map(lambda p: p.ndim > 1, PARAMS)
    plain, masked, full = (
        lama_adam(0.5, **options, update_interval=1)
        for options in ({}, {"weight_decay": 0.25, "mask": kernels}, {"weight_decay": 0.25})
    )
    states = [tx.init(PARAMS) for tx in (plain, masked, full)]

    @jax.jit
    def updates(states):
        return [
            tx.update(GRADS, state, PARAMS, curvature=jnp.zeros(2))[0]
            for tx, state in zip((plain, masked, full), states, strict=True)
        ]

    plain, masked, full = updates(states)
    for layer in PARAMS:
        assert masked[layer]["bias"].tolist() == plain[layer]["bias"].tolist()
        assert masked[layer]["kernel"].tolist() == full[layer]["kernel"].tolist()
        # lr w p = 0.125 exactly; two float32 roundings of a sum below 1.
        difference = plain[layer]["kernel"] - full[layer]["kernel"]
        np.testing.assert_allclose(difference, 0.125, rtol=0, atol=2e-7)


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    ("dtype", "jitted"),
    [("float32", True), *map(SLOW, ("float32", "float64", "float64"), (False, True, False))],
)
def test_alpha_of_one_is_adam_to_the_bit(x64, optimized, dtype, jitted):
    rng = np.random.default_rng(3)
    params = {
        "w": jnp.asarray(rng.normal(size=(4, 3)), dtype),
        "b": {"x": jnp.asarray(rng.normal(size=5), dtype)},
    }
    ours, theirs = (
        lama_scale(alpha_min=1.0, alpha_max=1.0, sensitivity=5.0),
        optax.scale_by_adam(),
    )
    our_update = functools.partial(ours.update, curvature=jnp.asarray([0.3, -2.0], dtype))
    their_update = theirs.update
    if jitted:
        our_update, their_update = jax.jit(our_update), jax.jit(their_update)
    our_state, their_state = ours.init(params), theirs.init(params)
    for _ in range(20 if jitted else 4):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        our_updates, our_state = our_update(grads, our_state, params)
        their_updates, their_state = their_update(grads, their_state, params)
        for actual, expected in zip(
            jax.tree.leaves((our_updates, our_state.mu, our_state.nu)),
            jax.tree.leaves((their_updates, their_state.mu, their_state.nu)),
            strict=True,
        ):
            assert actual.dtype == expected.dtype
            np.testing.assert_array_equal(actual, expected)


# Findings about the document.


@functools.cache
def compiled_constant_gradient(**options):
    tx = lama_scale(alpha_min=0.5, alpha_max=1.5, sensitivity=1.0, **options)

    @jax.jit
    def run(curvature):
        def step(state, _):
            one = jnp.ones(())
            updates, state = tx.update(one, state, one, curvature=curvature[None])
            return state, (updates, state)

        return jax.lax.scan(step, tx.init(jnp.ones(())), length=3000)[1]

    return run


def constant_gradient(steps, curvature, **options):
    """The states of a run in which the gradient of one scalar parameter is 1 at every step."""
    found = compiled_constant_gradient(**options)(jnp.asarray(curvature))
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:steps], found)


@pytest.mark.parametrize("curvature", [-1.0, 0.3])
def test_finding_2_alpha_moves_the_gain(x64, curvature):
    alpha_b1 = 0.9 * reference.factor(curvature, 0.5, 1.5, 1.0)
    gain = (1 - 0.9) / (1 - alpha_b1)
    # After n steps the rest is alpha_b1^n; 0.967^1000 = 3e-15 for the largest of the three.
    _, paper = constant_gradient(1000, curvature)
    _, ema = constant_gradient(1000, curvature, momentum="ema")
    np.testing.assert_allclose(paper.mu[-1], gain, rtol=1e-12)
    np.testing.assert_allclose(ema.mu[-1], 1.0, rtol=1e-12)
    assert abs(gain - 1) > 0.1


def test_finding_2_ema_steps_by_one_from_the_first(x64):
    """For a constant gradient 1 the corrected moments are 1 at every step, whatever alpha."""
    updates, _ = constant_gradient(50, 0.3, momentum="ema")
    # 1 / (1 + eps), and 1 - b2^t has lost three digits of sixteen at t = 1.
    np.testing.assert_allclose(updates, 1.0, rtol=0, atol=1e-7)


def test_finding_3_momentum_past_one_grows_geometrically(x64):
    updates, state = constant_gradient(101, 1e6, max_momentum=None)
    assert state.momentum[-1] == pytest.approx(1.35, abs=1e-12)  # alpha_max b1
    # m_t = 0.1 (1.35^t - 1)/0.35: the ratio of two steps is 1.35 once 1.35^t >> 1.
    np.testing.assert_allclose(state.mu[100] / state.mu[99], 1.35, rtol=1e-12)
    np.testing.assert_allclose(state.mu[99], 0.1 * (1.35**100 - 1) / 0.35, rtol=1e-11)
    assert updates[-1] > 1e10


def test_finding_3_the_default_cap_bounds_the_momentum(x64):
    updates, state = constant_gradient(3000, 1e6)
    assert state.momentum[-1] == 0.999
    # The gain of the capped momentum is at most 0.1/(1 - 0.999) = 100.
    assert state.mu.max() <= 100
    assert updates.max() <= 100 * (1 + 1e-6)  # (1 - b1)/(1 - b1^t) <= 1, v_hat = 1


def test_finding_3_a_factor_on_the_loss_is_enough(x64):
    """Adam ignores a constant factor on the loss; Eq. 9 does not."""
    problem = reference.make_problem(0)
    params = jax.tree.map(jnp.asarray, problem.params)
    tx = lama_scale(estimator=exact_trace(), max_momentum=None)

    @jax.jit
    def largest_momentum(factor):
        def value_fn(p):
            return factor * loss(p, problem)

        _, state = tx.update(params, tx.init(params), params, value_fn=value_fn)
        return state.momentum.max()

    assert largest_momentum(1.0) < 0.91
    assert largest_momentum(1e4) > 1


@pytest.mark.parametrize("curvature", [-1.0, 0.3])
def test_finding_4_eq_3_is_not_the_sum_of_eq_6s_weights(x64, curvature):
    decay = 0.9 * reference.factor(curvature, 0.5, 1.5, 1.0)
    t = np.arange(1, 21)
    exact = 0.1 * (1 - decay**t) / (1 - decay)
    _, state = constant_gradient(20, curvature)
    np.testing.assert_allclose(state.weight_sum[:, 0], exact, rtol=1e-13)
    # For a gradient of 1 the momentum is that sum, so dividing by it gives 1 and Eq. 3 does not.
    np.testing.assert_allclose(state.mu, exact, rtol=1e-13)
    assert np.abs(exact / (1 - 0.9**t) - 1)[1:].min() > 0.02
