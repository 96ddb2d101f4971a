"""How cost grows: with K, the number of parameters, the depth, the batch and the devices."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.cost._memory import in_child
from benchmarks.lab._jobs import Job, Settings
from benchmarks.lab._models import MLP, Model, Task
from benchmarks.lab._steps import compiled_estimate
from benchmarks.lab._timing import interleave, repeat
from lama_optax import Estimator, flipout, hutchinson

ROUNDS, WINDOW = 5, 0.02
GRADIENT = "gradient"

SIZES: dict[str, tuple[int, ...]] = {
    "K": (1, 4, 16, 64, 256),
    "parameters": (1_000, 10_000, 100_000, 1_000_000, 10_000_000),
    "depth": (2, 4, 8, 16, 32, 64),
    "batch": (16, 64, 256, 1024, 4096),
    "devices": (1, 2, 4, 8),
}
QUICK_SIZES: dict[str, tuple[int, ...]] = {"K": (1, 2)}


def jobs(settings: Settings) -> Iterator[Job]:
    """Units of the section ``"growth"``: one for each axis and size."""
    for axis, sizes in (QUICK_SIZES if settings.quick else SIZES).items():
        for size in sizes:
            unit = {"section": "growth", "axis": axis, "size": size, "network": shape(axis, size)}
            timing: dict[str, Any] = {"rounds": ROUNDS, "window": WINDOW, "seed": settings.seed}
            if settings.quick:
                timing |= {"rounds": 1, "window": 0}
            unit["contenders"] = contenders(axis, size, settings.quick)
            if axis == "devices":
                measure: Callable[[], Any] = functools.partial(
                    in_child, "growth", {"unit": unit, **timing}, size
                )
            else:
                measure = functools.partial(times, unit, **timing)
            yield Job({**unit, **timing}, measure)


def shape(axis: str, size: int) -> dict[str, Any]:
    """Widths (64 inputs first) and batch of the MLP that an axis is measured on."""
    if axis == "parameters":
        # 64 w + w^2 + 10 w and the biases 2 w + 10 make `size` parameters.
        width = max(1, round((-76 + (76**2 + 4 * (size - 10)) ** 0.5) / 2))
        return {"widths": (width, width, 10), "batch": 64}
    if axis == "depth":
        return {"widths": (64,) * (size - 1) + (10,), "batch": 64}
    if axis == "devices":
        return {"widths": (512, 512, 10), "batch": 512}
    return {"widths": (256, 256, 10), "batch": size if axis == "batch" else 256}


def contenders(axis: str, size: int, quick: bool) -> list[str]:
    """The labels of the estimators that are timed beside the gradient."""
    labels = list(estimators(axis, size))
    return labels[:1] if quick else labels


def estimators(axis: str, size: int) -> dict[str, Estimator]:
    """The estimators that are of interest along an axis."""
    if axis == "K":
        return {
            "hutchinson": hutchinson(size),
            "hutchinson, vmapped": hutchinson(size, chunk_size=size),
            "flipout": flipout(size),
        }
    found: dict[str, Estimator] = {"hutchinson": hutchinson(1)}
    if axis == "depth":
        found["hutchinson block"] = hutchinson(1, scope="block")
    found["flipout joint"] = flipout(1, scope="joint")
    found["flipout block"] = flipout(1, scope="block")
    return found


def times(unit: dict[str, Any], rounds: int, window: float, seed: int) -> dict[str, list[float]]:
    """Seconds of a gradient and of each estimate, one entry a round."""
    axis, size, made = unit["axis"], unit["size"], unit["network"]

    def examples() -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        pictures = rng.normal(size=(made["batch"], 8, 8, 1)).astype(np.float32)
        return pictures, rng.integers(0, 10, made["batch"]).astype(np.int32)

    task = Task("growth", "", MLP(tuple(made["widths"])), examples, "classes", made["batch"], 0)
    model = Model(task, task.init(), task.minibatch(0))
    if axis == "devices":
        model = _sharded(model, size)
    work = {GRADIENT: _compiled(model, None)}
    known = estimators(axis, size)
    work |= {label: _compiled(model, known[label]) for label in unit["contenders"]}
    for call in work.values():
        call()
    return interleave({k: repeat(call) for k, call in work.items()}, rounds, window, seed)


def _sharded(model: Model, devices: int) -> Model:
    """The batch shared out over devices, the parameters on all of them."""
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))
    on_all = NamedSharding(mesh, PartitionSpec())
    shared = NamedSharding(mesh, PartitionSpec("data"))
    return Model(
        model.task, jax.device_put(model.params, on_all), jax.device_put(model.batch, shared)
    )


def _compiled(model: Model, estimator: Estimator | None) -> Callable[[], object]:
    if estimator is None:
        gradient = jax.jit(jax.grad(model.task.loss_fn)).lower(model.params, model.batch).compile()
        return lambda: jax.block_until_ready(gradient(model.params, model.batch))
    estimate = compiled_estimate(model, estimator)
    return lambda: jax.block_until_ready(estimate(model.params, model.batch, np.uint32(0)))
