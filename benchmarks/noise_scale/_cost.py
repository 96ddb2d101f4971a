"""What it costs to track the noise scale: time and memory of a step over those without."""

import functools
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.lab._jobs import Job, Settings
from benchmarks.lab._timing import interleave
from benchmarks.noise_scale._workloads import Workload, workloads
from lama_optax import grouped_value_and_grad, track_noise_scale

ALONE = "optax.adam"
PER_EXAMPLE = "one gradient an example, by vmap"
#: Contender -> steps from one estimate to the next.
INTERVALS = {
    ALONE: 1,
    "four groups, every step": 1,
    "signs, every 10": 10,
    "signs, every 50": 50,
    PER_EXAMPLE: 1,
}
BATCH, ROUNDS = 16, 48


def jobs(settings: Settings, machine: dict[str, Any]) -> Iterator[Job]:
    """One unit: the larger transformer's steps in turn; each visit is one interval at least."""
    name = "mlp" if settings.quick else "gpt-500k"
    if name not in settings.models:
        return
    rounds = 2 if settings.quick else ROUNDS
    unit = {"section": "cost", "model": name, "batch": BATCH, "rounds": rounds}
    unit |= {"machine": machine}
    measure = functools.partial(_measure, workloads(settings.quick)[name], rounds, settings.seed)
    yield Job(unit, measure)


def _measure(workload: Workload, rounds: int, seed: int) -> dict[str, Any]:
    batch = workload.batch(workload.draw(np.random.default_rng(seed), (BATCH,)))
    params = workload.init(seed)
    visits, memory, seconds = {}, {}, {}
    for name, interval in INTERVALS.items():
        tx = _optimizer(name, interval)
        step = jax.jit(functools.partial(_step, workload, name, tx), donate_argnums=(0, 1))
        began = jax.tree.map(jnp.copy, (params, tx.init(params)))
        compiled = step.lower(*began, batch).compile()
        plan: Any = compiled.memory_analysis()
        # Donated arguments are among the results.
        memory[name] = plan.temp_size_in_bytes + plan.output_size_in_bytes
        visits[name] = _visit(compiled, began, batch, max(interval, 10))
    seconds = interleave(visits, rounds, 0.0, [seed, 3])
    return {"seconds": seconds, "memory": memory}


def _optimizer(name: str, interval: int) -> optax.GradientTransformationExtraArgs:
    adam = optax.adam(1e-3)
    if name in (ALONE, PER_EXAMPLE):
        return optax.with_extra_args_support(adam)
    return optax.chain(track_noise_scale(update_interval=interval), adam)


def _step(workload: Workload, name: str, tx: Any, params: Any, state: Any, batch: Any) -> Any:
    extra: dict[str, Any] = {}
    found = jnp.zeros([])
    if name.startswith("four"):
        _, gradient, groups = grouped_value_and_grad(workload.loss, 4)(params, batch)
        extra = {"group_gradients": groups, "batch_size": BATCH}
    elif name == PER_EXAMPLE:
        one = jax.grad(
            lambda p, *example: workload.loss(p, jax.tree.map(lambda a: a[None], example))
        )
        each = jax.vmap(one, (None, 0, 0))(params, *batch)
        gradient = jax.tree.map(lambda g: jnp.mean(g, 0), each)
        squares = jax.vmap(lambda g: optax.tree.norm(g, squared=True))(each)
        found = jnp.mean(squares) - optax.tree.norm(gradient, squared=True)
    else:
        gradient = jax.grad(workload.loss)(params, batch)
        extra = workload.task(batch) if name != ALONE else {}
    updates, state = tx.update(gradient, state, params, **extra)
    return optax.apply_updates(params, updates), state, found


def _visit(compiled: Any, began: Any, batch: Any, steps: int) -> Any:
    at = began

    def visit(window: float) -> float:
        nonlocal at
        del window
        start = perf_counter()
        for _ in range(steps):
            *at, _ = jax.block_until_ready(compiled(*at, batch))
        return (perf_counter() - start) / steps

    return visit
