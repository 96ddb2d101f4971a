"""Estimates of every layer's trace in JAX: ours, and matfree's and traceax's own calls.

Each is a function of a seed that returns the traces, in the order of `layer_names`.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks.lab._environment import NOT_INSTALLED
from benchmarks.lab._models import Batch, Model, Params
from lama_optax import (
    Estimator,
    fisher,
    flipout,
    gauss_newton,
    hutchinson,
    layer_curvature,
    layer_names,
)

#: Estimates the traces of all layers; a new seed gives a new, independent estimate.
Estimate = Callable[[int], np.ndarray]
#: Builds an estimate for a model, or raises what keeps it from working.
Maker = Callable[[Model], Estimate]

EXACT, QUARTER = "gauss_newton", "flipout joint, a quarter of the batch"
TEN_PROBES = "hutchinson joint, K=10"
OURS: dict[str, Estimator] = {
    "hutchinson joint": hutchinson(1),
    "hutchinson joint, Gaussian": hutchinson(1, probe="gaussian"),
    TEN_PROBES: hutchinson(10),
    "hutchinson block": hutchinson(1, scope="block"),
    "hutchinson block, Gaussian": hutchinson(1, scope="block", probe="gaussian"),
    "flipout joint": flipout(1, scope="joint"),
    "flipout joint, K=10": flipout(10, scope="joint"),
    "flipout block": flipout(1, scope="block"),
    "flipout block, K=10": flipout(10, scope="block"),
    EXACT: gauss_newton(),
}
#: Of the Gauss-Newton matrix; `gauss_newton`, without variance, is in both tables.
FISHER, TEN_SAMPLES = "fisher", "fisher, 10 samples"
OF_GAUSS_NEWTON: dict[str, Estimator] = {
    FISHER: fisher(1),
    TEN_SAMPLES: fisher(10),
    EXACT: gauss_newton(),
}
#: Labels of all our own rows.
OWN = (*OURS, QUARTER, *OF_GAUSS_NEWTON)
#: The product of a matrix of curvature with v, at a point of which ``merge`` makes parameters.
Products = Callable[[Model, Callable[[Any], Params], Any, Batch], Callable[[Any], Any]]


def ours(estimator: Estimator, part: int = 1) -> Maker:
    """One of this library's estimators, given the gradient, which a training step has at hand.

    With ``part`` it sees one ``part``-th of the batch, other examples for each seed.
    """

    def make(model: Model) -> Estimate:
        task = model.task
        gradient = jax.jit(jax.grad(task.loss_fn))(model.params, model.batch)

        def estimate(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
            if part > 1:
                size = len(batch[0])
                rows = jax.random.choice(jax.random.fold_in(key, 1), size, (size // part,), False)
                batch = tuple(array[rows] for array in batch)
            # Not both: a loss of the batch beside that of an example would be compared with it.
            if isinstance(estimator, type(hutchinson())):
                of_loss: dict[str, Any] = {"value_fn": lambda p: task.loss_fn(p, batch)}
            else:
                of_loss = {"example_value_fn": task.loss_fn, "batch": batch}
            found = layer_curvature(
                params,
                key,
                estimator=estimator,
                example_output_fn=task.output_fn,
                output_loss_fn=task.output_loss,
                updates=gradient,
                **of_loss,
            )
            return found.mean * found.size

        return compiled(model, estimate)

    return make


def makers() -> dict[str, Maker]:
    """Every contender that estimates the Hessian's traces in JAX."""
    return {label: ours(estimator) for label, estimator in OURS.items()} | {
        QUARTER: ours(flipout(1, scope="joint"), part=4),
        "matfree": matfree(1, hessian),
        "matfree, K=10": matfree(10, hessian),
        "traceax, v * Hv by layer": _traceax_joint,
        "traceax, a layer at a time": traceax_blocks("hutchinson", hessian),
        "traceax XTrace, 16 products": traceax_blocks("xtrace", hessian),
    }


def hessian(
    model: Model, merge: Callable[[Any], Params], at: Any, batch: Batch
) -> Callable[[Any], Any]:
    """Forwards over backwards, as users write it."""
    gradient = jax.grad(lambda x: model.task.loss_fn(merge(x), batch))
    return lambda v: jax.jvp(gradient, (at,), (v,))[1]


def sums_by_layer(model: Model, tree: Params) -> jax.Array:
    """Sums a tree like the parameters by layer, in the order of `layer_names`."""
    names = layer_names(model.params)
    sums = dict.fromkeys(names, jnp.zeros(()))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        sums[layer_of(path)] += jnp.sum(leaf)
    return jnp.stack([sums[name] for name in names])


def layer_of(path: Any) -> str:
    """The layer's name of a leaf's path in Flax's parameters."""
    return "/".join(entry.key for entry in path[1:-1])


def compiled(model: Model, function: Callable[[Params, Batch, jax.Array], jax.Array]) -> Estimate:
    """The function of (params, batch, key) as one of a seed."""

    def of_seed(params: Params, batch: Batch, seed: jax.Array) -> jax.Array:
        return function(params, batch, jax.random.key(seed))

    program = jax.jit(of_seed).lower(model.params, model.batch, jnp.uint32(0)).compile()
    return lambda seed: np.asarray(program(model.params, model.batch, np.uint32(seed)))


def require(package: str) -> None:
    """Raises `ModuleNotFoundError` where ``package`` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(NOT_INSTALLED)


def matfree(num_probes: int, products: Products) -> Maker:
    """Its Monte-Carlo estimator with signs; the integrand sums v * Hv by layer."""

    def make(model: Model) -> Estimate:
        require("matfree")
        from matfree import stochtrace

        diagonal = stochtrace.monte_carlo_diagonal()

        def integrand(matvec: Any, v: Params) -> jax.Array:
            return sums_by_layer(model, diagonal(matvec, v))

        def estimate(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
            sampler = stochtrace.sampler_signs(params, num=num_probes)
            estimator = stochtrace.estimator_monte_carlo(integrand, sampler)
            return estimator(products(model, lambda p: p, params, batch), key)

        return compiled(model, estimate)

    return make


def _signs(traceax: Any) -> Any:
    """Its default sampler draws integers, which an operator on floats refuses."""
    return traceax.RademacherSampler(float)


def _traceax_joint(model: Model) -> Estimate:
    """Its sampler and an operator of the whole Hessian; it returns no parts of a trace itself."""
    require("traceax")
    import lineax
    import traceax

    def estimate(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        flat, unravel = ravel_pytree(params)
        product = hessian(model, unravel, flat, batch)
        operator = lineax.FunctionLinearOperator(product, jax.eval_shape(lambda: flat))
        v = _signs(traceax)(key, flat.size, 1)[:, 0]
        return sums_by_layer(model, unravel(v * operator.mv(v)))

    return compiled(model, estimate)


def traceax_blocks(method: str, products: Products) -> Maker:
    """Its estimators, as they are called, on one operator for each layer's Hessian block."""

    def make(model: Model) -> Estimate:
        require("traceax")
        import lineax
        import traceax

        names = layer_names(model.params)
        estimator, num_products = {
            "hutchinson": (traceax.HutchinsonEstimator(_signs(traceax)), 1),
            "xtrace": (traceax.XTraceEstimator(), 16),
        }[method]

        def estimate(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
            traces = []
            for number, name in enumerate(names):
                flat, merge = _block(params, name)
                operator = lineax.FunctionLinearOperator(
                    products(model, merge, flat, batch), jax.eval_shape(lambda at=flat: at)
                )
                # XTrace's products must be fewer than the layer's parameters.
                count = min(num_products, 2 * (flat.size // 4))
                trace, _ = estimator(jax.random.fold_in(key, number), operator, max(1, count))
                traces.append(trace)
                # XLA cannot know that this is always the same: else it holds all products at once.
                key = jax.random.fold_in(key, jnp.isinf(trace))
            return jnp.stack(traces)

        return compiled(model, estimate)

    return make


def _block(params: Params, name: str) -> tuple[jax.Array, Callable[[jax.Array], Params]]:
    """A layer's parameters as one vector, and all parameters with that vector put in."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    inside = [i for i, (path, _) in enumerate(leaves) if layer_of(path) == name]
    flat, unravel = ravel_pytree([leaves[i][1] for i in inside])

    def merge(vector: jax.Array) -> Params:
        values = [leaf for _, leaf in leaves]
        for i, value in zip(inside, unravel(vector), strict=True):
            values[i] = value
        return jax.tree.unflatten(structure, values)

    return flat, merge
