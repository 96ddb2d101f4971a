"""`track_noise_scale` against per-example gradients: exact, unbiased, and its interval holds."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lama_optax import (
    NoiseScaleState,
    grouped_value_and_grad,
    noise_report,
    stacked,
    supervised,
    track_noise_scale,
)

SLOW = pytest.mark.slow


def batch_loss(apply_fn, params, batch):
    return supervised(apply_fn, *batch)["value_fn"](params)


def exact(losses_fn, params):
    """tr(Sigma) and |G|^2 of the total and of every layer (modules), by one gradient an example."""
    jacobian = jax.jacrev(lambda p: losses_fn(p).reshape(len(losses_fn(p)), -1).mean(1))(params)
    rows = {
        name: np.concatenate(
            [
                np.asarray(leaf, np.float64).reshape(len(leaf), -1)
                for leaf in jax.tree.leaves(module)
            ],
            axis=1,
        )
        for name, module in jacobian.items()
    }
    rows = {"total": np.concatenate(list(rows.values()), axis=1)} | rows
    return {
        name: (np.sum(np.var(row, axis=0)), np.sum(np.mean(row, axis=0) ** 2))
        for name, row in rows.items()
    }


# Calibration.

RUNS = 200
HOW = ("signs", "groups")
CALIBRATED = [
    pytest.param(
        *case,
        marks=[] if case == (networks.mlp, 8, "signs") else SLOW,
        id=f"{case[0].__name__}-{case[1]}-{case[2]}",
    )
    for case in (
        (make, size, how)
        for make in (networks.mlp, networks.cnn, networks.transformer)
        for size in (8, 64)
        for how in HOW
    )
]


def tracked_states(make, batch_size, how, runs=RUNS, draws=20):
    params, apply_fn, inputs, targets = make(n=48)
    loss_fn = functools.partial(batch_loss, apply_fn)

    def run(key):
        tx = track_noise_scale(update_interval=1, key=key)

        def step(state, step_key):
            rows = jax.random.randint(step_key, (batch_size,), 0, 48)
            batch = inputs[rows], targets[rows]
            if how == "signs":
                task = supervised(apply_fn, *batch)
                return tx.update(jax.grad(task["value_fn"])(params), state, params, **task)[1], None
            _, grads, groups = grouped_value_and_grad(loss_fn, 4)(params, batch)
            extra = {"group_gradients": groups, "batch_size": batch_size}
            return tx.update(grads, state, params, **extra)[1], None

        keys = jax.random.split(jax.random.fold_in(key, 1), draws)
        return jax.lax.scan(step, tx.init(params), keys)[0]

    keys = jax.random.split(jax.random.key(0), runs)
    states = jax.device_get(jax.jit(lambda keys: jax.lax.map(run, keys, batch_size=20))(keys))
    truth = exact(supervised(apply_fn, inputs, targets)["losses_fn"], params)
    reports = [noise_report(jax.tree.map(lambda x, i=i: x[i], states), params) for i in range(runs)]
    return reports, {name: covariance / square for name, (covariance, square) in truth.items()}


@pytest.mark.parametrize(("make", "batch_size", "how"), CALIBRATED)
def test_interval_holds_the_whole_data_sets_noise_scale(make, batch_size, how):
    reports, truth = tracked_states(make, batch_size, how)
    for name, ratio in truth.items():
        rows = [report[name] for report in reports]
        held = [(row["at_least"] or 0) <= ratio <= (row["at_most"] or np.inf) for row in rows]
        assert 0.9 <= np.mean(held) <= 0.98, (name, np.mean(held))
