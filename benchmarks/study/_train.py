"""One training run: one compiled program an arm, whatever the hyper-parameters."""

import functools
import time
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.study._arms import ARMS, Hyper, optimizer
from benchmarks.study._workload import Parts, Workload

#: How often the validation loss is read.
LOOKS = 20


@functools.lru_cache(maxsize=1)
def _parts(workload: Workload, study: int) -> Parts:
    return workload.parts(study)


@functools.cache
def _common(workload: Workload) -> tuple[Any, Any]:
    return jax.jit(workload.init), jax.jit(workload.measure)


@functools.cache
def _programs(workload: Workload, name: str) -> tuple[Any, Any]:
    """The optimizer's state at the start, and some steps."""

    def start(hyper: Hyper, params: Any) -> Any:
        return optimizer(name, workload, hyper).init(params)

    def advance(hyper: Hyper, params: Any, state: Any, batches: Any) -> tuple[Any, Any]:
        tx = optimizer(name, workload, hyper)

        def step(carry: tuple[Any, Any], batch: Any) -> tuple[tuple[Any, Any], None]:
            params, state = carry
            batch = workload.prepare(params, batch)
            grads = jax.grad(workload.loss)(params, batch)
            asked = workload.task(batch) if ARMS[name].estimates else {}
            updates, state = tx.update(grads, state, params, **asked)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), batches)[0]

    return jax.jit(start), jax.jit(advance)


def gradients(workload: Workload, name: str, steps: int) -> int:
    """Gradients that so many steps have taken; an estimate by `fisher` is one more."""
    return steps + (-(-steps // workload.interval) if ARMS[name].estimates else 0)


def run(workload: Workload, name: str, hyper: Hyper, study: int, seed: int) -> dict[str, Any]:
    """Trains once; what was measured on the way and at the end.

    Args:
      workload: what is trained; its steps are a multiple of `LOOKS`.
      name: the arm.
      hyper: the values of its axes.
      study: which data split.
      seed: of the initial parameters and the order of the data, within the study.

    Returns:
      ``validation`` and ``held_out`` (of a run that diverged: those at the start), ``curve``
      (steps and validation loss at every look), ``seconds`` without compilation and looks, and of
      LAMA ``momentum``, the least and the largest that a layer had at a look.
    """
    parts: Parts = _parts(workload, study)
    init, measure = _common(workload)
    start, advance = _programs(workload, name.rstrip("'"))
    every = workload.steps // LOOKS
    params = init(jax.random.key(1_000_003 * study + seed))
    batches = workload.batches(parts["train"], np.random.default_rng([study, seed]))
    first = {part: float(measure(params, parts[part])) for part in ("validation", "test")}
    state, seconds, momentum = start(hyper, params), [], []
    looks = [first]
    # Of a loss that of the test counts at the end alone, of returns the mean over all looks.
    asked = tuple(first) if workload.margin is not None else ("validation",)
    for done in range(0, workload.steps, every):
        some = jax.tree.map(lambda x, done=done: x[done : done + every], batches)
        begin = time.perf_counter()
        params, state = jax.block_until_ready(advance(hyper, params, state, some))
        seconds.append(time.perf_counter() - begin)
        looks.append({part: float(measure(params, parts[part])) for part in asked})
        if ARMS[name].estimates:
            momentum += np.asarray(optax.tree.get(state, "momentum")).tolist()
        if not np.isfinite(looks[-1]["validation"]):
            break
    # Returns count over the whole run; one may end below its start by chance, a loss diverges.
    if workload.margin is not None:
        last = {part: float(np.mean([look[part] for look in looks])) for part in first}
    else:
        last = looks[-1] | {"test": float(measure(params, parts["test"]))}
    worse = workload.margin is None and last["validation"] > first["validation"]
    diverged = worse or not all(np.isfinite(value) for value in last.values())
    judged = first if diverged else last
    values = [(i * every, look["validation"]) for i, look in enumerate(looks)]
    return {
        "hyper": hyper,
        "validation": judged["validation"],
        "held_out": judged["test"],
        "diverged": diverged,
        "curve": [look for look in values if np.isfinite(look[1])],
        "gradients": gradients(workload, name, workload.steps),
        "seconds": float(np.median(seconds)) * LOOKS,  # the first call compiles
        "momentum": [min(momentum), max(momentum)] if momentum else None,
    }
