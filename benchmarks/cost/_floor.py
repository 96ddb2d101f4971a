"""The floor: the gradient's time and that of the fewest matrix products which an estimate needs.

The products are counted in `benchmarks.lab._products`, from the loss alone; their time is
measured on each of them alone, as large as it is in the loss.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from benchmarks.lab._jobs import Job, Models, Settings
from benchmarks.lab._models import Model
from benchmarks.lab._products import (
    Product,
    extra_products,
    gradient_products,
    isolated,
    products,
)
from benchmarks.lab._timing import Spread, interleave, repeat
from benchmarks.lab._training import describe

GRADIENT = "gradient"


def jobs(settings: Settings, models: Models) -> Iterator[Job]:
    """Units of the section ``"floor"``."""
    timing = {"rounds": 15, "window": 0.01} if not settings.quick else {"rounds": 2, "window": 0}
    for name, task in models.tasks.items():
        unit = {"section": "floor", "model": name, "task": describe(task), **timing}
        measure = functools.partial(_measure, models, name, seed=settings.seed, **timing)
        yield Job(unit | {"seed": settings.seed}, measure)


def products_of(model: Model) -> list[Product]:
    """The products of the model's loss on its batch."""
    leaves = jax.tree_util.tree_leaves_with_path(model.params)
    layers = [jax.tree_util.keystr(path[:-1]) for path, _ in leaves]
    return products(model.task.loss_fn, layers, model.params, model.batch)


def _measure(models: Models, name: str, rounds: int, window: float, seed: int) -> dict[str, Any]:
    model = models[name]
    found = products_of(model)
    kinds = {_kind(product): product for product in found}
    gradient = jax.jit(jax.grad(model.task.loss_fn)).lower(model.params, model.batch).compile()
    work: dict[str, Any] = {kind: isolated(product) for kind, product in kinds.items()}
    work[GRADIENT] = lambda: jax.block_until_ready(gradient(model.params, model.batch))
    for call in work.values():
        call()
    visits = {kind: repeat(call) for kind, call in work.items()}
    seconds = interleave(visits, rounds, window, seed)
    medians = {kind: Spread.of(times).median for kind, times in seconds.items()}
    return {
        "gradient": medians[GRADIENT],
        "products": {kind: medians[kind] for kind in kinds},
        "flops": {"gradient": _flops(found, [gradient_products(p) for p in found])}
        | {scope: _flops(found, extra_products(found, scope)) for scope in ("joint", "block")},
        "seconds": {
            scope: sum(
                count * medians[_kind(product)]
                for count, product in zip(extra_products(found, scope), found, strict=True)
            )
            for scope in ("joint", "block")
        },
    }


def _flops(found: Sequence[Product], counts: Sequence[int]) -> int:
    return sum(count * product.flops for count, product in zip(counts, found, strict=True))


def _kind(product: Product) -> str:
    return " ".join("x".join(map(str, aval.shape)) for aval in product.shapes)


def floor_seconds(result: dict[str, Any], scope: str | None, probes: int, interval: int) -> float:
    """The floor of a step: no estimate, or ``probes`` of them at every ``interval``-th step."""
    if scope is None:
        return result["gradient"]
    return result["gradient"] + probes * result["seconds"][scope] / interval
