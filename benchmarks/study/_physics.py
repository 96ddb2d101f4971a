"""A physics-informed network: the convection equation u_t + beta u_x = 0 on a circle.

With u(0, x) = sin x the solution is sin(x - beta t). The loss is the mean squared residual of
the equation, of the initial condition and of the periodic boundary, on the full batch; what is
judged is the squared error against the solution at points never trained on, over the mean
square of the solution (the metric is its root, the relative L2 error).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.study._workload import Workload, apply_mlp, lecun_mlp

PyTree = Any

BETA = 3.0
POINTS = 64  # of the equation
EDGE_POINTS = 16  # of the initial condition, and of the boundary
HELD_OUT_POINTS = 256
STEPS = 400


def _make(seed: int) -> tuple[dict[str, PyTree], np.ndarray]:
    rng = np.random.default_rng(seed)

    def points(count: int) -> dict[str, np.ndarray]:
        t, x = rng.uniform(0, 1, count), rng.uniform(0, 2 * np.pi, count)
        return {"t": t.astype(np.float32), "x": x.astype(np.float32)}

    train = {
        "inside": points(POINTS),
        "initial": points(EDGE_POINTS)["x"],
        "boundary": points(EDGE_POINTS)["t"],
    }
    data = {"train": train, "validation": points(HELD_OUT_POINTS), "test": points(HELD_OUT_POINTS)}
    return data, np.zeros(STEPS, np.int32)


def _network(params: PyTree, t: jax.Array, x: jax.Array) -> jax.Array:
    # Inputs centred and of order 1.
    inputs = jnp.stack([2 * t - 1, x / jnp.pi - 1], axis=-1)
    return apply_mlp(params, inputs)[..., 0]


def _loss(params: PyTree, train: PyTree) -> jax.Array:
    t, x = train["inside"]["t"], train["inside"]["x"]
    # One forward derivative along (1, beta): u_t + beta u_x.
    along = jnp.ones_like(t), jnp.full_like(x, BETA)
    residual = jax.jvp(lambda t, x: _network(params, t, x), (t, x), along)[1]
    start, edge = train["initial"], train["boundary"]
    initial = _network(params, jnp.zeros_like(start), start) - jnp.sin(start)
    left = _network(params, edge, jnp.zeros_like(edge))
    right = _network(params, edge, jnp.full_like(edge, 2 * jnp.pi))
    return jnp.mean(residual**2) + jnp.mean(initial**2) + jnp.mean((left - right) ** 2)


def _evaluate(params: PyTree, part: PyTree) -> tuple[jax.Array, jax.Array]:
    if "inside" in part:  # the training part is judged by the loss that is trained
        loss = _loss(params, part)
        return loss, jnp.sqrt(loss)
    solution = jnp.sin(part["x"] - BETA * part["t"])
    error = jnp.mean((_network(params, part["t"], part["x"]) - solution) ** 2)
    relative = error / jnp.mean(solution**2)
    return relative, jnp.sqrt(relative)


def pinn_workload() -> Workload:
    """The physics-informed network."""
    return Workload(
        name="pinn",
        metric_name="relative L2 error",
        steps=STEPS,
        batch_size=POINTS,
        trials=24,
        tune_seeds=6,
        final_seeds=100,
        chunk=72,
        step_microseconds=45,
        make=_make,
        init=lambda key: lecun_mlp(key, (2, 16, 16, 1)),
        loss=_loss,
        evaluate=_evaluate,
        prepare=lambda params, data, batch: data["train"],
        independent_examples=False,
    )
