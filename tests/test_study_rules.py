"""The study's candidate rules and its frozen Adam, against float64 references in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
pytest.importorskip("sklearn")

from benchmarks.study import _rules as rules
from benchmarks.study._groups import group_layers
from benchmarks.study._programs import PROGRAMS, layered
from lama_optax import layer_names

pytestmark = [pytest.mark.standard_promotion, pytest.mark.slow]

B2, EPS = 0.999, 1e-8
STEPS = 7
KEY = np.array([3, 4], np.uint32)

# A diagonal Hessian, for which a probe of signs gives the trace without noise.
HESSIAN = {
    "a": {"bias": np.array([0.5]), "kernel": np.array([2.0, 0.1])},
    "b": {"kernel": np.array([30.0, 10.0])},
    "c": {"bias": np.array([0.02]), "kernel": np.array([0.3])},
}
# At the first step h P = 1 / |p|: far from and near to the optimum, so that q differs by layer.
START = {
    "a": {"bias": np.array([3.0]), "kernel": np.array([1.0, 2.0])},
    "b": {"kernel": np.array([0.1, 0.2])},
    "c": {"bias": np.array([10.0]), "kernel": np.array([20.0])},
}
LAYERS = ("a", "b", "c")


def value_fn(params):
    terms = jax.tree.map(lambda h, p: jnp.sum(h * p**2) / 2, HESSIAN, params)
    return sum(jax.tree.leaves(terms))


def noise(t, leaf):
    """What stands for a mini-batch's noise in the gradient."""
    return np.sin(1.7 * t * (1 + np.arange(leaf.size)))


def trained(tx, steps=STEPS, noisy=0.0):
    """The layers' parameters after each step, as flat arrays."""
    params = jax.tree.map(jnp.asarray, START)
    state = tx.init(params)

    @jax.jit
    def step(params, state, added):
        grads = jax.tree.map(jnp.add, jax.grad(value_fn)(params), added)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    path = []
    for t in range(1, steps + 1):
        added = {
            name: dict(
                zip(layer, _split(noisy * noise(t, flat(HESSIAN, name)), layer), strict=True)
            )
            for name, layer in HESSIAN.items()
        }
        params, state = step(params, state, added)
        path.append([flat(params, layer) for layer in LAYERS])
    return path, state


def _split(values, layer):
    sizes = [x.size for x in layer.values()]
    return np.split(values, np.cumsum(sizes)[:-1])


def flat(tree, layer):
    return np.concatenate([np.asarray(x, np.float64) for x in tree[layer].values()])


def reference(decide, steps=STEPS, lr_in_q=1.0, noisy=0.0):
    """The rules' common part; ``decide(q, P^(1/2) g, t)`` gives b, rate and nu of each layer."""
    h = [flat(HESSIAN, layer) for layer in LAYERS]
    p = [flat(START, layer) for layer in LAYERS]
    m, v, q = ([np.zeros_like(x) for x in h] for _ in range(3))
    weight, ema = np.zeros(3), np.zeros(3)
    path = []
    for t in range(1, steps + 1):
        g = [a * b + noisy * noise(t, a) for a, b in zip(h, p, strict=True)]
        v = [B2 * a + (1 - B2) * b**2 for a, b in zip(v, g, strict=True)]
        precondition = [1 / (np.sqrt(a / (1 - B2**t)) + EPS) for a in v]
        latest = [lr_in_q * np.mean(a * b) for a, b in zip(precondition, h, strict=True)]
        ema = 0.9 * ema + 0.1 * np.array(latest)
        q = ema / (1 - 0.9**t)
        gradient = [np.sqrt(a) * b for a, b in zip(precondition, g, strict=True)]
        b, rate, nu = decide(q, gradient, t)
        weight = b * weight + 1 - b
        for i in range(3):
            m[i] = b[i] * m[i] + (1 - b[i]) * g[i]
            mixed = (1 - nu[i]) * g[i] + nu[i] * m[i] / weight[i]
            p[i] = p[i] - rate[i] * precondition[i] * mixed
        path.append([x.copy() for x in p])
    return path


def assert_same_path(tx, expected):
    path, _ = trained(tx)
    for ours, theirs in zip(path, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            # float64, sums in another order; a parameter may pass through 0.
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


ONES = np.ones(3)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("sensitivity", [1.0, -2.0])
def test_v1_follows_relative_log_curvature(x64, shift, sensitivity):
    lr, b1 = 0.05, 0.8

    def decide(q, gradient, t):
        x = np.log(q) - np.median(np.log(q))
        alpha = 0.5 + 1 / (1 + np.exp(-sensitivity * x))
        assert np.ptp(alpha) > 0.2  # else the test could not tell the layers apart
        return np.minimum(b1 * np.roll(alpha, shift), 0.999), lr * ONES, ONES

    tx = rules.relative_log_curvature(lr, b1, sensitivity, shift, KEY)
    assert_same_path(tx, reference(decide, lr_in_q=lr))


def test_v2_takes_the_optimum_of_one_mode(x64):
    lr = 0.2

    def decide(q, gradient, t):
        # (2 sigmoid(ln q) - 1)^2 = ((q - 1) / (q + 1))^2
        return np.clip(((q - 1) / (q + 1)) ** 2, 0, B2**0.5), lr * ONES, ONES

    assert_same_path(rules.one_mode_optimum(lr, KEY), reference(decide, lr_in_q=lr))


@pytest.mark.parametrize("pool", [0.0, 1.0])
def test_v3_is_yellowfins_rule(x64, pool):
    lr, beta = 0.02, 0.999
    sizes = np.array([3, 2, 2])
    hs, sums = [], {"low": 0, "high": 0, "norm": 0, "h": 0, "d": 0, "square": 0}
    mean = [np.zeros(n) for n in sizes]

    def decide(q, gradient, t):
        def gather(x):
            return np.full(3, x.sum()) if pool else x

        h = np.full(3, (sizes * q).sum() / sizes.sum()) if pool else q
        hs.append(h)
        recent = np.array(hs[-20:])
        high = recent.max(axis=0)
        low = np.maximum(recent.min(axis=0), 1e-3 * high)
        squares = np.array([np.sum(g**2) for g in gradient])

        def average(name, new):
            sums[name] = beta * sums[name] + (1 - beta) * new
            return sums[name] / (1 - beta**t)

        low, high = average("low", low), average("high", high)
        for i, g in enumerate(gradient):
            mean[i] = beta * mean[i] + (1 - beta) * g
        of_mean = np.array([np.sum((x / (1 - beta**t)) ** 2) for x in mean])
        variance = gather(np.maximum(average("square", squares) - of_mean, 0))
        norm = average("norm", np.sqrt(gather(squares)))
        distance = average("d", norm / average("h", np.maximum(h, 1e-3 * recent.max(axis=0))))
        b = np.zeros(3)
        for i in range(3):
            p = distance[i] ** 2 * low[i] ** 2 / (2 * max(variance[i], 1e-30))
            p = np.clip(p, 1e-6, 1e6)
            # p x = (1 - x)^3
            roots = np.roots([-1, 3, -3 - p, 1])
            (x,) = (r.real for r in roots if abs(r.imag) < 1e-9)
            k = np.sqrt(high[i] / low[i])
            b[i] = np.clip(max(x, (k - 1) / (k + 1)) ** 2, 0, 0.999)
        rate = (1 - np.sqrt(b)) ** 2 / low
        return b, lr * rate / (1 - b), ONES

    path, state = trained(rules.yellowfin_by_layer(lr, pool, KEY), noisy=5.0)
    expected = reference(decide, noisy=5.0)
    assert np.ptp(np.asarray(state.momentum)) > 1e-2 or pool
    for ours, theirs in zip(path, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            # The bisection ends at intervals of 2^-24.
            np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("fixed", [-1.0, 0.3])
def test_v4_is_quasi_hyperbolic(x64, fixed):
    lr, b1 = 0.1, 0.9

    def decide(q, gradient, t):
        return b1 * ONES, lr * ONES, 1 / (1 + q) if fixed < 0 else fixed * ONES

    assert_same_path(rules.quasi_hyperbolic(lr, b1, fixed, KEY), reference(decide, lr_in_q=lr))


def test_v5_caps_the_rate(x64, monkeypatch):
    """Layers of one entry: its curvature is the largest, found by the first product."""
    single = {name: {"kernel": HESSIAN[name]["kernel"][:1]} for name in LAYERS}
    monkeypatch.setitem(globals(), "HESSIAN", single)
    start = {name: {"kernel": START[name]["kernel"][:1]} for name in LAYERS}
    monkeypatch.setitem(globals(), "START", start)
    lr, b1, c = 0.5, 0.6, 0.05
    rates = []

    def decide(q, gradient, t):
        rates.append(np.minimum(lr, c * 2 * (1 + b1) / ((1 - b1) * q / lr)))
        return b1 * ONES, rates[-1], ONES

    assert_same_path(rules.capped_rate(lr, b1, c, KEY), reference(decide, lr_in_q=lr))
    # The cap binds in some layers and not in others.
    assert (rates[0] < lr).any()
    assert (rates[0] == lr).any()


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("power", [0.4, -1.0])
def test_v6_sets_the_rate_by_relative_curvature(x64, shift, power):
    lr, b1 = 0.05, 0.8
    factors = []

    def decide(q, gradient, t):
        factors.append(np.clip((np.median(q) / q) ** power, 0.1, 10))
        return b1 * ONES, lr * np.roll(factors[-1], shift), ONES

    tx = rules.relative_curvature_rate(lr, b1, power, shift, KEY)
    assert_same_path(tx, reference(decide, lr_in_q=lr))
    # The layers differ, and with the larger power a bound is met.
    assert np.ptp(factors[0]) > 0.5
    assert (np.abs(np.log10(factors)).max() == 1) == (abs(power) > 0.5)


@pytest.mark.parametrize("seed", range(3))
def test_v5_finds_the_largest_eigenvalue_of_each_block(seed):
    """A full Hessian in which the layers are coupled; gradients stay, so P stays too."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(10, 10)).astype(np.float32)
    hessian = root @ root.T / 10
    gradient = np.exp(rng.normal(size=10)).astype(np.float32)

    def value(params):
        x = jnp.concatenate([params["a"]["kernel"], params["b"]["kernel"]])
        return x @ hessian @ x / 2

    params = {"a": {"kernel": jnp.ones(6)}, "b": {"kernel": jnp.ones(4)}}
    grads = {"a": {"kernel": jnp.asarray(gradient[:6])}, "b": {"kernel": jnp.asarray(gradient[6:])}}
    tx = rules.capped_rate(1e-3, 0.9, 1.0, np.array([0, seed], np.uint32))

    @jax.jit
    def run(state):
        def step(state, _):
            state = tx.update(grads, state, params, value_fn=value)[1]
            return state, state.memory[1]

        return jax.lax.scan(step, state, length=400)[1]

    found = np.asarray(run(tx.init(params)))[100:].mean(axis=0)
    scaled = hessian / np.sqrt(np.outer(gradient, gradient))
    exact = [np.linalg.eigvalsh(scaled[part, part])[-1] for part in (slice(6), slice(6, 10))]
    # The products' noise, what the other layer adds, tilts the direction: the quotient is at most
    # the eigenvalue, and a cap within 30 % is what the rule needs.
    assert (found < np.array(exact) * 1.05).all()
    assert (found > np.array(exact) * 0.7).all()


def test_groups_are_the_librarys_layers():
    groups = group_layers(HESSIAN)
    assert groups.names == layer_names(HESSIAN) == LAYERS
    assert groups.sizes == (3, 2, 2)
    np.testing.assert_allclose(
        groups.sum(jax.tree.map(jnp.asarray, HESSIAN)),
        [flat(HESSIAN, layer).sum() for layer in LAYERS],
        rtol=1e-6,  # float32
    )


def test_layered_is_adam_where_all_layers_are_alike(x64):
    expected, _ = trained(optax.with_extra_args_support(optax.adam(0.05, 0.8)))
    path, _ = trained(layered(0.05, 0.8, 0.2, 0.8))
    np.testing.assert_allclose(
        np.concatenate(path[-1]), np.concatenate(expected[-1]), rtol=1e-9
    )  # float64


def test_frozen_alpha_is_lama_with_that_alpha(x64):
    """alpha_min = alpha_max = 1.05: Eq. 6 with the decay 0.945, the weight 0.1 and Eq. 3."""
    program = PROGRAMS["lama"]
    hypers = program.hypers | {"lr": 0.05, "alpha_min": 1.05, "alpha_max": 1.05}
    expected, _ = trained(program.make(hypers, KEY))
    path, _ = trained(layered(0.05, np.full(3, 0.945), 0.1, 0.9))
    np.testing.assert_allclose(
        np.concatenate(path[-1]), np.concatenate(expected[-1]), rtol=1e-7
    )  # the library's bias correction is taken in float32's exponent


def test_shift_gives_every_layer_its_neighbours_alpha():
    program = PROGRAMS["lama"]
    seen = []
    for shift in (0, 1):
        hypers = program.hypers | {"lr": 1e-3, "sensitivity": 1.0, "shift": shift}
        _, state = trained(program.make(hypers, KEY), steps=1)
        seen.append(np.asarray(program.observe(state)["alpha"]))
    assert np.ptp(seen[0]) > 0.05
    np.testing.assert_allclose(seen[1], np.roll(seen[0], 1), rtol=1e-6)  # float32
