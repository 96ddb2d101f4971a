"""`track_noise_scale` against one gradient an example: right in one estimate, and calibrated."""

import json

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from noise import averages, example_gradients, modules, tracker

from lama_optax import grouped_value_and_grad, noise_report, supervised, track_noise_scale

SLOW = pytest.mark.slow


# One estimate, against the formulas in float64.


def batch_norm_mlp(dtype):
    params, _, inputs, targets = networks.mlp(n=6, dtype=dtype)

    def apply_fn(p, x):
        for name in ("Dense_0", "Dense_1"):
            x = x @ p[name]["kernel"]
            x = (x - jnp.mean(x, 0, keepdims=True)) / jnp.std(x, 0, keepdims=True)
            x = jnp.tanh(x + p[name]["bias"][None])
        return x @ p["Dense_2"]["kernel"]

    del params["Dense_2"]["bias"]
    return params, apply_fn, inputs, targets


MODELS = {
    "mlp": lambda dtype: networks.mlp(n=6, dtype=dtype),
    "cnn": lambda dtype: networks.cnn(n=6, dtype=dtype),
    "transformer": lambda dtype: networks.transformer(n=6, dtype=dtype),
    "batch norm": batch_norm_mlp,
}


def signs_at(step, count, dtype=jnp.float64):
    key = jax.random.fold_in(jax.random.key(0), step)
    return np.asarray(jax.random.rademacher(key, (count,), dtype), np.float64)


@pytest.mark.parametrize(
    "model", ["mlp", "cnn", "batch norm", pytest.param("transformer", marks=SLOW)]
)
def test_signs_give_the_formulas(model, x64):
    """Total derivatives under BatchNorm; the mean over predictions of a sequence."""
    params, apply_fn, inputs, targets = MODELS[model](jnp.float64)
    task = supervised(apply_fn, inputs, targets)
    gradients = example_gradients(task["losses_fn"], params)
    # Every second step, so that the estimate stands in a condition, which CNNs need a way around.
    tx = tracker(update_interval=2)
    update = jax.jit(tx.update)
    state, mean = tx.init(params), jax.jit(jax.grad(task["value_fn"]))(params)
    for _ in range(3):  # the first estimate only starts the scale, which is then |g|^2
        _, state = update(mean, state, params, **task)
    signs, count = signs_at(2, 6), 6
    for name, found in averages(state, params).items():
        a = np.sum(gradients[name].mean(0) ** 2)
        q = np.sum((signs @ gradients[name]) ** 2) / count
        expected = [(q - a) * count / (count - 1), (count * a - q) / (count - 1)]
        np.testing.assert_allclose(found, np.asarray(expected) / a, rtol=1e-9)


def test_weights_and_padding(x64):
    params, apply_fn, inputs, targets = networks.rnn(n=5, dtype=jnp.float64)
    weights = np.random.default_rng(0).uniform(0.5, 2.0, targets.shape)
    weights[1, 3:] = weights[4] = 0  # a short sequence, and none

    def losses_fn(p):
        losses = supervised(apply_fn, inputs, targets)["losses_fn"](p)
        # Padding may hold anything.
        return jnp.where(weights > 0, losses, jnp.inf), jnp.asarray(weights)

    def value_fn(p):
        return supervised(apply_fn, inputs, targets, weights=jnp.asarray(weights))["value_fn"](p)

    by_prediction = jax.jit(jax.jacrev(supervised(apply_fn, inputs, targets)["losses_fn"]))(params)
    rows = modules(by_prediction, leading=2)
    tx, mean = tracker(), jax.jit(jax.grad(value_fn))(params)
    state, update = tx.init(params), jax.jit(lambda *a: tx.update(*a, losses_fn=losses_fn)[1])
    for _ in range(2):
        state = update(mean, state, params)
    w, signs = weights.sum(1), signs_at(1, 5)
    effective = w.sum() ** 2 / (w**2).sum()
    for name, found in averages(state, params).items():
        weighted = np.einsum("it,itp->ip", weights, rows[name])  # w_i times the gradient of l_i
        a = np.sum((weighted.sum(0) / w.sum()) ** 2)
        q = np.sum((signs @ weighted) ** 2) / (w**2).sum()
        s = (q - a) * effective / (effective - 1)
        m = (effective * a - q) / (effective - 1)
        np.testing.assert_allclose(found, np.asarray([s, m]) / a, rtol=1e-9)


def grouped(apply_fn, params, inputs, targets, num_groups=4):
    def loss_fn(p, batch):
        return supervised(apply_fn, *batch)["value_fn"](p)

    return grouped_value_and_grad(loss_fn, num_groups)(params, (inputs, targets))


def test_groups_give_the_formulas_and_their_average(x64):
    """At every step, with the mean and the covariance of the estimates' weights."""
    params, apply_fn, inputs, targets = networks.mlp(n=60, dtype=jnp.float64)
    tx = tracker(update_interval=1000, decay=0.6)

    @jax.jit
    def step(state, rows):
        _, grads, groups = grouped(apply_fn, params, inputs[rows], targets[rows])
        return tx.update(grads, state, params, group_gradients=groups, batch_size=12)[1]

    state, order = tx.init(params), jnp.arange(60).reshape(5, 12)
    for rows in order:
        state = step(state, rows)
    gradients = example_gradients(supervised(apply_fn, inputs, targets)["losses_fn"], params)
    for i, name in ((-1, "total"), (0, "Dense_0"), (2, "Dense_2")):
        scale, estimates = 0.0, []
        for rows in np.asarray(order):
            groups = gradients[name][rows].reshape(4, 3, -1).mean(1)
            s = 12 / 4 * np.sum(np.var(groups, axis=0, ddof=1))
            a = np.sum(groups.mean(0) ** 2)
            if scale:
                estimates.append(np.asarray([s, a - s / 12]) / scale)
            scale = (scale + a) / 2 if scale else a
        weights = 0.6 ** np.arange(3, -1, -1.0)
        mean, estimates = np.average(estimates, axis=0, weights=weights), np.asarray(estimates)
        covariance = np.cov(estimates.T, aweights=weights, ddof=0)
        np.testing.assert_allclose(state.mean[:, i], mean, rtol=1e-9)
        np.testing.assert_allclose(state.spread[:, :, i], covariance, rtol=1e-8)
        assert state.scale[i] == pytest.approx(scale, rel=1e-9)


def test_grouped_value_and_grad_is_the_whole_batchs(x64):
    params, apply_fn, inputs, targets = networks.mlp(dtype=jnp.float64)

    def loss_fn(p, batch):
        task = supervised(apply_fn, *batch)
        return task["value_fn"](p), jnp.sum(batch[1])

    fn = jax.jit(grouped_value_and_grad(loss_fn, 3, has_aux=True))
    (value, aux), grads, groups = fn(params, (inputs, targets))
    expected, gradient = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, (inputs, targets))[0]))(
        params
    )
    assert value == pytest.approx(float(expected), rel=1e-12)
    assert aux.tolist() == targets.reshape(3, 4).sum(1).tolist()
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-9), grads, gradient)
    assert groups["Dense_0"]["kernel"].shape == (3, 4, 5)


# The interval.

CALIBRATED = [
    pytest.param(
        *case,
        marks=[] if case == (networks.mlp, 64, "signs") else SLOW,
        id="-".join((case[0].__name__, str(case[1]), case[2])),
    )
    for case in (
        (make, size, how)
        for make in (networks.mlp, networks.cnn, networks.transformer)
        for size in (8, 64)
        for how in ("signs", "groups")
    )
]


@pytest.mark.parametrize(("make", "batch_size", "how"), CALIBRATED)
def test_interval_holds_the_whole_data_sets_noise_scale(make, batch_size, how):
    """At fixed parameters, 20 draws each: in 90 to 98 % of 400 runs, the total and each layer.

    Of 400 runs 98 % have a standard deviation of 0.7 %. Where most runs cannot tell the noise scale
    (at a tenth of it, on a few parameters) single draws have long tails, of which the
    interval is too wide: there it may hold it more often.
    """
    params, apply_fn, inputs, targets = make(n=48)

    def run(key):
        tx = tracker(key=key)

        def step(state, step_key):
            rows = jax.random.randint(step_key, (batch_size,), 0, 48)
            task = supervised(apply_fn, inputs[rows], targets[rows])
            if how == "signs":
                grads, extra = jax.grad(task["value_fn"])(params), task
            else:
                _, grads, groups = grouped(apply_fn, params, inputs[rows], targets[rows])
                extra = {"group_gradients": groups, "batch_size": batch_size}
            return tx.update(grads, state, params, **extra)[1], None

        keys = jax.random.split(jax.random.fold_in(key, 1), 20)
        return jax.lax.scan(step, tx.init(params), keys)[0]

    keys = jax.random.split(jax.random.key(0), 400)
    states = jax.device_get(jax.jit(lambda keys: jax.lax.map(run, keys, batch_size=20))(keys))
    reports = [
        noise_report(jax.tree.map(lambda x, i=i: x[i], states), params) for i in range(len(keys))
    ]
    losses_fn = supervised(apply_fn, inputs, targets)["losses_fn"]
    for name, rows in example_gradients(losses_fn, params).items():
        truth = np.sum(np.var(rows, axis=0)) / np.sum(rows.mean(0) ** 2)
        found = [report[name] for report in reports]
        held = np.mean([(r["at_least"] or 0) <= truth <= (r["at_most"] or np.inf) for r in found])
        known = np.mean([r["noise_scale"] is not None for r in found])
        assert held >= 0.9, (name, held)
        assert held <= 0.98 + 0.007 or known < 0.5, (name, held)


def state_of(mean, covariance):
    """A state of one layer whose averages have this covariance of their errors."""
    params = {"w": jnp.ones(2)}
    weight, squares = 1 - 0.9**500, 0.01 / 0.19
    share = squares / weight**2
    student = 1 + 1.21 / (1 / share - 1) + 1.44 / (1 / share - 1) ** 2
    spread = np.asarray(covariance) / (student**2 * share / (1 - share))
    both = np.ones(2, np.float32)
    return params, track_noise_scale().init(params)._replace(
        mean=jnp.asarray(np.stack([mean, mean], -1), jnp.float32),
        spread=jnp.asarray(np.stack([spread, spread], -1), jnp.float32),
        weight=jnp.asarray(weight * both),
        weight_squares=jnp.asarray(squares * both),
    )


@pytest.mark.parametrize(
    ("mean", "known"),
    [
        ((8.0, 1.0), ("noise_scale", "std_error", "at_least", "at_most")),
        ((8.0, 0.1), ("at_least",)),  # |G|^2 may be 0
        ((8.0, -0.1), ("at_least",)),
        ((0.2, 1.0), ("at_most",)),  # tr(Sigma) may be 0
        ((0.2, 0.1), ()),
        ((8.0, -1.0), ()),  # no gradient has such
        ((-8.0, 1.0), ()),
    ],
)
def test_interval_is_fiellers(mean, known):
    """All ratios r >= 0 such that x - r y is within 1.96 standard errors of 0, by trying them."""
    covariance = np.asarray([[0.5, -0.04], [-0.04, 0.02]])
    params, state = state_of(mean, covariance)
    row = noise_report(state, params)["total"]
    assert {column for column, value in row.items() if value is not None} == set(known)
    ratios = np.geomspace(1e-3, 1e5, 200_001)  # in steps of 1e-4
    error = np.sqrt(covariance[0, 0] - 2 * ratios * covariance[0, 1] + ratios**2 * covariance[1, 1])
    held = ratios[np.abs(mean[0] - ratios * mean[1]) <= 1.96 * error]
    if "at_least" in known:
        assert row["at_least"] == pytest.approx(held.min(), rel=2e-4)
    if "at_most" in known:
        assert row["at_most"] == pytest.approx(held.max(), rel=2e-4)
    if "std_error" in known:
        slope = np.asarray([1, -mean[0] / mean[1]]) / mean[1]
        assert row["noise_scale"] == pytest.approx(8.0, rel=1e-6)
        assert row["std_error"] == pytest.approx(np.sqrt(slope @ covariance @ slope), rel=1e-4)


def test_report_for_loggers():
    params, state = state_of((8.0, 1.0), np.diag([0.5, 0.02]))
    report = noise_report({"anywhere": (state,)}, params)
    assert list(json.loads(json.dumps(report))) == ["total", "w"]
    flat = noise_report(state, params, flat=True)
    assert flat["noise_scale/w"] == report["w"]["noise_scale"]
    assert flat["noise_scale_std_error/total"] == report["total"]["std_error"]
    assert set(noise_report(track_noise_scale().init(params), params, flat=True)) == set()
    with pytest.raises(ValueError, match="track_noise_scale once; found 2"):
        noise_report((state, state), params)
    with pytest.raises(ValueError, match="it has 1 layers"):
        noise_report(state, params | {"more": jnp.ones(2)})
