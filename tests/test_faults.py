"""A soak: 20,000 jitted steps whose gradients, losses and curvatures go wrong at random.

The objective is a sum of one quadratic for each layer, ``c_l / 2 * |p_l|^2``, whose average
curvature is ``c_l`` exactly and for every probe: what each step injects is known, so the count of
rejected estimates and the curvature that is left are computed beside the run in NumPy.
"""

import functools
import gc
import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lama_optax import hutchinson, lama_adam, layer_curvature

CHUNK, NUM_CHUNKS = 1000, 20
# Each with both signs. 3e38 is finite and its square is not; 1e-40 is denormal in float32.
FAULTS = np.asarray([np.nan, np.inf, 3e38, 1e15, 1e-15, 1e-40, 0.0], "f4")

PARAMS = {
    "a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "b": {"kernel": jnp.ones((2, 1))},
    "c": jnp.ones(3),
}
LAYERS = ("a", "b", "c")


def draw(rng, shape):
    """Normal numbers, one in five replaced by a fault of either sign."""
    fault = rng.choice(FAULTS, size=shape) * rng.choice([-1, 1], size=shape).astype("f4")
    return np.where(rng.random(shape) < 0.2, fault, rng.normal(size=shape)).astype("f4")


def draw_chunk(rng):
    return {
        "grads": jax.tree.map(lambda p: draw(rng, (CHUNK, *p.shape)), PARAMS),
        "curvature": draw(rng, (CHUNK, len(LAYERS))),
        "loss": draw(rng, (CHUNK,)),
    }


def objective(fault, params):
    """Also the loss itself goes wrong: an added constant that no derivative sees."""
    terms = [
        0.5 * fault["curvature"][i] * jnp.sum(leaf**2)
        for i, layer in enumerate(LAYERS)
        for leaf in jax.tree.leaves(params[layer])
    ]
    return sum(terms, fault["loss"])


SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
OPTIONS = {
    "paper": {},
    "ema": {"momentum": "ema", "update_interval": 3, "curvature_decay": 0.9},
}


@pytest.mark.parametrize(
    ("name", "seed"), [("paper", 0), ("ema", 1), *map(SLOW, ("paper", "ema"), (1, 0))]
)
def test_soak(name, seed):
    gc.collect()  # no array of another test's may go while this one counts them
    options = OPTIONS[name]
    interval = options.get("update_interval", 1)
    # A sensitivity at which the curvatures drive alpha over its whole range.
    tx = lama_adam(
        1e-3,
        sensitivity=1.0,
        estimator=hutchinson(1),
        key=jax.random.key(seed, impl="rbg"),
        **{"update_interval": 1} | options,
    )
    traces = 0

    def step(carry, fault):
        nonlocal traces
        traces += 1
        params, state = carry
        updates, state = tx.update(
            fault["grads"], state, params, value_fn=lambda p: objective(fault, p)
        )
        params = optax.apply_updates(params, updates)
        floats = [x for x in jax.tree.leaves((params, state)) if jnp.issubdtype(x.dtype, "f")]
        finite = jnp.stack([jnp.isfinite(x).all() for x in floats]).all()
        seen = (finite, state[0].alpha, state[0].momentum, state[0].rejected)
        return (params, state), seen

    # No donation: what is old is dropped by Python, as in most users' loops.
    run = jax.jit(lambda carry, faults: jax.lax.scan(step, carry, faults))

    rng = np.random.default_rng(seed)
    carry = (PARAMS, tx.init(PARAMS))
    rejected, kept, alphas = 0, np.zeros(len(LAYERS), "f4"), []
    for chunk in range(NUM_CHUNKS):
        faults = draw_chunk(rng)
        carry, (finite, alpha, momentum, counts) = run(carry, faults)
        assert np.asarray(finite).all()
        assert ((alpha >= 0.5) & (alpha <= 1.5)).all()
        assert ((momentum >= 0) & (momentum <= np.float32(0.999))).all()
        alphas.append(np.array(alpha))  # a copy: a view would keep the device array alive

        # (layer, estimate) pairs, step by step: only the steps that estimate count.
        due = (chunk * CHUNK + np.arange(CHUNK)) % interval == 0
        injected = np.where(due, (~np.isfinite(faults["curvature"])).sum(axis=1), 0)
        # 3e38 is a finite curvature, but the sum over a layer of several entries overflows.
        huge = due[:, None] & (np.abs(faults["curvature"]) == np.float32(3e38))
        injected = injected + huge.sum(axis=1)
        np.testing.assert_array_equal(counts, rejected + np.cumsum(injected))
        rejected = int(counts[-1])

        for c in faults["curvature"][due]:
            kept = np.where(np.isfinite(c) & (np.abs(c) < 1e38), c, kept)
        if not options:
            # The last finite estimate; 1e-40 may be flushed to 0.
            np.testing.assert_allclose(carry[1][0].curvature, kept, rtol=1e-6, atol=1e-38)

        if chunk == 2:  # compiled, and every buffer of a chunk has been seen
            first_traces = traces
            arrays, memory = len(jax.live_arrays()), peak_memory()
    assert traces == first_traces
    assert run._cache_size() == 1
    assert len(jax.live_arrays()) == arrays
    # 17 more chunks, each of 20 kB of faults and results a layer: 20 MB is far above the noise of
    # an allocator and below what a leak of one buffer a step would take (17,000 of 4 kB pages).
    assert peak_memory() - memory < 20e6
    assert int(carry[1][0].count) == CHUNK * NUM_CHUNKS
    # Faults there were: a fifth of the estimates, of which three sevenths are not finite.
    estimates = CHUNK * NUM_CHUNKS // interval * len(LAYERS)
    assert 0.07 * estimates < rejected < 0.1 * estimates
    # And the rest moved alpha: the test saw a working optimizer, not one that ignores its input.
    assert np.std(np.concatenate(alphas)) > 0.02


def peak_memory():
    """Bytes; the most that the process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def test_the_objective_has_the_curvature_that_is_injected():
    fault = {"curvature": jnp.asarray([0.5, -2.0, 7.0]), "loss": jnp.asarray(jnp.nan)}

    @jax.jit
    def estimate(params, key):
        value_fn = functools.partial(objective, fault)
        return layer_curvature(params, key, estimator=hutchinson(1), value_fn=value_fn).mean

    mean = estimate(PARAMS, jax.random.key(0, impl="rbg"))
    np.testing.assert_allclose(mean, fault["curvature"], rtol=1e-6)


def test_recovers_after_faults():
    """Whatever came before, good steps train again."""
    tx = lama_adam(
        0.05, estimator=hutchinson(1), key=jax.random.key(0, impl="rbg"), update_interval=1
    )
    params = {"w": jnp.full(3, 2.0)}

    def value_fn(scale, p):
        return scale * jnp.sum(p["w"] ** 2)

    def step(carry, scale):
        params, state = carry
        grads = jax.grad(lambda p: value_fn(scale, p))(params)
        updates, state = tx.update(grads, state, params, value_fn=lambda p: value_fn(scale, p))
        return (optax.apply_updates(params, updates), state), None

    bad = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 3e38, jnp.nan])
    scales = jnp.concatenate([jnp.ones(3), bad, jnp.ones(200)])
    (params, state), _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), scales))(params)
    assert value_fn(1.0, params) < 0.01
    assert int(state[0].rejected) == len(bad)
    np.testing.assert_allclose(state[0].curvature, 2.0, rtol=1e-6)
