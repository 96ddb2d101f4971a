"""Estimates of every layer's Gauss-Newton trace, and what they are held against.

That is another matrix than the Hessian of `_measure`: J^T S J, with the derivative J of all outputs
by a layer's parameters and the loss's second derivative S by the outputs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lab._jobs import Job, Models, Settings
from benchmarks.lab._models import Batch, Model, Params, Task
from benchmarks.lab._training import describe
from benchmarks.traces import _torch
from benchmarks.traces._jax import (
    EXACT,
    FISHER,
    OF_GAUSS_NEWTON,
    Estimate,
    Maker,
    compiled,
    matfree,
    ours,
    sums_by_layer,
    traceax_blocks,
)
from benchmarks.traces._measure import GRADIENT, Contenders, Rounds, Sums
from lama_optax import Estimator, flipout, layer_curvature, layer_names

#: What a quick look is content with.
QUICK = (FISHER, EXACT, "matfree")
#: XTrace makes 16 products a layer: where there are more layers it would take hundreds of
#: gradients, and is left out.
XTRACE_LAYERS = 8
#: Estimates that a reference is the mean of: of the Gauss-Newton trace and the Hessian's.
REFERENCE = {"moons": (0, 4000), "mlp": (0, 500), "cnn": (0, 500), "transformer": (100, 20)}
QUICK_REFERENCE = {"moons": (2, 2), "mlp": (2, 2)}


def rounds(quick: bool) -> Rounds:
    """How much is measured."""
    if quick:
        return Rounds(blocks=1, rounds=3, window=0, fewest=2, compared=2)
    return Rounds(blocks=5, rounds=20, fewest=10)


def jobs(settings: Settings, models: Models) -> Iterator[Job]:
    """Units of the sections ``"compile"``, ``"gauss-newton"`` and ``"reference"``."""
    how = rounds(settings.quick)
    known = makers()
    if settings.quick:
        known = {label: known[label] for label in QUICK}
    for name, task in models.tasks.items():
        contenders = Contenders(
            models, name, known, how, settings.seed, (FISHER, GRADIENT), steps=()
        )
        shared = {"model": name, "task": describe(task), "seed": settings.seed}
        unit = {"section": "compile", "matrix": "gauss-newton", "contenders": list(known), **shared}
        yield Job(unit, contenders.compile_seconds)
        for block in range(how.blocks):
            unit = {"section": "gauss-newton", **shared, "block": block, **dataclasses.asdict(how)}
            yield Job(unit, functools.partial(contenders.measure, block))
        counts = (QUICK_REFERENCE if settings.quick else REFERENCE)[name]
        for matrix, count in zip(("gauss-newton", "hessian"), counts, strict=True):
            if count:
                unit = {"section": "reference", "matrix": matrix, "count": count, **shared}
                measure = functools.partial(_reference, models, name, matrix, count, settings.seed)
                yield Job(unit, measure)


def makers() -> dict[str, Maker]:
    """Every contender that estimates the Gauss-Newton matrix's traces."""
    operator = "GGNLinearOperator"
    return {
        **{label: _ours(estimator) for label, estimator in OF_GAUSS_NEWTON.items()},
        "matfree": matfree(1, gauss_newton_products),
        "matfree, K=10": matfree(10, gauss_newton_products),
        "traceax, a layer at a time": traceax_blocks("hutchinson", gauss_newton_products),
        "traceax XTrace, 16 products": _of_few_layers(
            traceax_blocks("xtrace", gauss_newton_products)
        ),
        "curvlinops, diagonal by layer": _torch.curvlinops_diagonal(operator),
        "curvlinops, a layer at a time": _torch.curvlinops_blocks(operator),
        "curvlinops XTrace, 16 products": _of_few_layers(
            _torch.curvlinops_blocks(operator, "xtrace", 16)
        ),
        "BackPACK, diagonal by layer": _torch.backpack_diagonal(),
    }


def gauss_newton_products(
    model: Model, merge: Callable[[Any], Params], at: Any, batch: Batch
) -> Callable[[Any], Any]:
    """The function v -> J^T S J v, which evaluates the network once for all v."""
    task = model.task
    outputs, forward = jax.linearize(lambda x: task.output_fn(merge(x), batch), at)
    backward = jax.linear_transpose(forward, at)
    gradient = jax.grad(lambda z: task.output_loss(z, batch))
    return lambda v: backward(jax.jvp(gradient, (outputs,), (forward(v),))[1])[0]


def _ours(estimator: Estimator) -> Maker:
    def make(model: Model) -> Estimate:
        def estimate(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
            task = model.task.supervised(batch)
            del task["value_fn"]  # it would be compared with the examples' losses
            found = layer_curvature(params, key, estimator=estimator, **task)
            return found.mean * found.size

        return compiled(model, estimate)

    return make


def _of_few_layers(make: Maker) -> Maker:
    def made(model: Model) -> Estimate:
        count = len(layer_names(model.params))
        if count > XTRACE_LAYERS:
            raise ValueError(f"16 products for each of {count} layers are hundreds of gradients")
        return make(model)

    return made


def _reference(models: Models, name: str, matrix: str, count: int, seed: int) -> dict[str, Any]:
    """Mean and squared deviations of ``count`` estimates by what varies little."""
    model = models[name]
    if matrix == "hessian":
        estimate = ours(flipout(1, scope="block"))(model)
    else:
        estimate = output_probes(model)
    sums = Sums(iter(np.random.default_rng([seed, 7]).integers(2**32, size=count).tolist()))
    for _ in range(count):
        sums.visit(estimate, 0)
    return sums.result() | {"seconds": []}


def output_probes(model: Model) -> Estimate:
    r"""E |J^T B e|^2 = tr(J^T S J), where e holds random signs and B B^T = S.

    It draws no targets and squares each example's sum by itself, so that it does not share
    fisher's ways to be wrong and varies a few times less.
    """
    task = model.task

    def of_example(params: Params, example: Batch, key: jax.Array) -> jax.Array:
        outputs, pull_back = jax.vjp(lambda p: task.output_fn(p, example), params)
        e = jax.random.rademacher(key, outputs.shape, outputs.dtype)
        (gradient,) = pull_back(root_times(task, outputs, e))
        return sums_by_layer(model, jax.tree.map(jnp.square, gradient))

    def estimate(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, len(batch[0]))
        of_examples = jax.vmap(of_example, (None, 0, 0))(params, batch, keys)
        return jnp.mean(of_examples, axis=0)

    return compiled(model, estimate)


def root_times(task: Task, outputs: jax.Array, e: jax.Array) -> jax.Array:
    """B e for the loss of one example's outputs, the mean over its predictions."""
    if task.loss == "binary":
        p = jax.nn.sigmoid(outputs)
        return jnp.sqrt(p * (1 - p) / outputs.size) * e
    p = jax.nn.softmax(outputs)
    root = jnp.sqrt(p)
    # B = diag(root) - p root^T, whose B B^T is diag(p) - p p^T.
    moved = root * e - p * jnp.sum(root * e, axis=-1, keepdims=True)
    return moved / jnp.sqrt(jnp.asarray(outputs[..., 0].size, outputs.dtype))
