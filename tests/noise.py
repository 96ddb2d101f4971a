"""What the tests of the noise scale share: gradients of examples, a state's content, a run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lama_optax import grouped_value_and_grad, noise_report, track_noise_scale


def tracker(**options):
    return track_noise_scale(**({"update_interval": 1} | options))


def modules(tree, leading=0):
    """Every module's entries side by side in float64, after all of them together ("total")."""
    parts = {
        name: np.concatenate(
            [np.reshape(x, (*x.shape[:leading], -1)) for x in jax.tree.leaves(module)], -1
        ).astype(np.float64)
        for name, module in tree.items()
    }
    return {"total": np.concatenate(list(parts.values()), -1)} | parts


def example_gradients(losses_fn, params):
    """One gradient an example, of the mean over its predictions: name -> (n, size)."""

    def examples(p):
        losses = losses_fn(p)
        return losses.reshape(losses.shape[0], -1).mean(1)

    return modules(jax.jit(jax.jacrev(examples))(params), leading=1)


def averages(state, params):
    """What the state holds of each name: tr(Sigma) / scale and |G|^2 / scale."""
    report = noise_report(state, params)
    order = [*range(1, len(report)), 0]  # the total is the arrays' last
    return dict(zip([list(report)[i] for i in order], np.asarray(state.mean).T, strict=True))


# A run on a small model.

PARAMS = {"used": jnp.asarray([0.5, -1.0]), "unused": jnp.ones(3)}
ROWS = np.random.default_rng(1).normal(size=(30, 32, 2)).astype(np.float32)


def losses(p, rows):
    return jnp.square(rows @ p["used"] - 1)


def value(p, rows):
    return jnp.mean(losses(p, rows))


TRACKER = tracker()


@functools.cache
def signs_step(tx, weighted=False):
    """Compiled once for all tests that use this transformation."""

    @jax.jit
    def step(state, rows, weights=None):
        def losses_fn(p):
            return (losses(p, rows), weights) if weighted else losses(p, rows)

        return tx.update(jax.grad(value)(PARAMS, rows), state, PARAMS, losses_fn=losses_fn)[1]

    return step


def run_signs(tx, batches):
    state = tx.init(PARAMS)
    for rows in batches:
        state = signs_step(tx)(state, rows)
    return state


@functools.cache
def groups_step(tx, num_groups):
    fn = grouped_value_and_grad(value, num_groups)

    @jax.jit
    def step(state, rows):
        _, grads, groups = fn(PARAMS, rows)
        extra = {"group_gradients": groups, "batch_size": rows.shape[0]}
        return tx.update(grads, state, PARAMS, **extra)[1]

    return step


def run_groups(tx, batches, num_groups=4):
    state = tx.init(PARAMS)
    for rows in batches:
        state = groups_step(tx, num_groups)(state, rows)
    return state
