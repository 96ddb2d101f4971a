"""What the estimates are held against: the exact trace, or the mean of many that vary little."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lab._models import Batch, Model, Params, Task
from benchmarks.traces._jax import GAUSS_NEWTON, HESSIAN, Estimate, compiled, ours, sums_by_layer
from benchmarks.traces._sums import Sums
from lama_optax import flipout

#: How many estimates: of the Hessian's trace, and of the Gauss-Newton trace where there are outputs
#: too many for `gauss_newton`.
COUNTS = {
    HESSIAN: {"moons": 4000, "mlp": 500, "cnn": 500, "transformer": 20},
    GAUSS_NEWTON: {"transformer": 100},
}


def count(model: str, matrix: str, quick: bool) -> int:
    """How many estimates a reference takes; 0 where `gauss_newton` is exact."""
    found = COUNTS[matrix].get(model, 0)
    return min(found, 2) if quick else found


def reference(model: Model, matrix: str, count: int, seed: int) -> dict[str, Any]:
    """Mean and squared deviations of ``count`` estimates by what varies little."""
    block = ours(flipout(1, scope="block"))
    estimate = block(model) if matrix == HESSIAN else output_probes(model)
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
