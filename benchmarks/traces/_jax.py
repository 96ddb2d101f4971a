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

HESSIAN, GAUSS_NEWTON = "hessian", "gauss-newton"
FISHER, EXACT = "fisher", "gauss_newton"
#: Ours by matrix. `gauss_newton`, without variance, is in both: in networks of ReLU, which are
#: linear piece by piece, the two matrices have one trace.
OURS: dict[str, dict[str, Estimator]] = {
    HESSIAN: {
        "hutchinson joint": hutchinson(1),
        "hutchinson block": hutchinson(1, scope="block"),
        "flipout joint": flipout(1, scope="joint"),
        "flipout block": flipout(1, scope="block"),
        EXACT: gauss_newton(),
    },
    GAUSS_NEWTON: {FISHER: fisher(1), "fisher, 10 samples": fisher(10), EXACT: gauss_newton()},
}
#: XTrace makes 16 products a layer: where there are more layers it would take hundreds of
#: gradients, and is left out.
XTRACE_LAYERS = 8
#: The product of a matrix of curvature with v, at a point of which ``merge`` makes parameters.
Products = Callable[[Model, Callable[[Any], Params], Any, Batch], Callable[[Any], Any]]


def makers(matrix: str) -> dict[str, Maker]:
    """Every contender that estimates the matrix's traces in JAX."""
    products = {HESSIAN: hessian_products, GAUSS_NEWTON: gauss_newton_products}[matrix]
    return {label: ours(estimator) for label, estimator in OURS[matrix].items()} | {
        "matfree": _matfree(products),
        "traceax, a layer at a time": _traceax("hutchinson", products),
        "traceax XTrace, 16 products": of_few_layers(_traceax("xtrace", products)),
    }


def ours(estimator: Estimator) -> Maker:
    """One of this library's estimators, given the gradient, which a training step has at hand."""

    def make(model: Model) -> Estimate:
        gradient = jax.jit(jax.grad(model.value_fn))(model.params)

        def estimate(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
            task = model.task.supervised(batch)
            if not isinstance(estimator, type(hutchinson())):
                del task["value_fn"]  # it would be compared with the examples' losses
            found = layer_curvature(params, key, estimator=estimator, updates=gradient, **task)
            return found.mean * found.size

        return compiled(model, estimate)

    return make


def of_few_layers(make: Maker) -> Maker:
    """Raises where there are many layers."""

    def made(model: Model) -> Estimate:
        count = len(layer_names(model.params))
        if count > XTRACE_LAYERS:
            raise ValueError(f"16 products for each of {count} layers are hundreds of gradients")
        return make(model)

    return made


def hessian_products(
    model: Model, merge: Callable[[Any], Params], at: Any, batch: Batch
) -> Callable[[Any], Any]:
    """The function v -> H v, forwards over backwards, as users write it."""
    gradient = jax.grad(lambda x: model.task.loss_fn(merge(x), batch))
    return lambda v: jax.jvp(gradient, (at,), (v,))[1]


def gauss_newton_products(
    model: Model, merge: Callable[[Any], Params], at: Any, batch: Batch
) -> Callable[[Any], Any]:
    """The function v -> J^T S J v, which evaluates the network once for all v."""
    task = model.task
    outputs, forward = jax.linearize(lambda x: task.output_fn(merge(x), batch), at)
    backward = jax.linear_transpose(forward, at)
    gradient = jax.grad(lambda z: task.output_loss(z, batch))
    return lambda v: backward(jax.jvp(gradient, (outputs,), (forward(v),))[1])[0]


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


def _matfree(products: Products) -> Maker:
    """Its Monte-Carlo estimator with signs; the integrand sums v * Hv by layer."""

    def make(model: Model) -> Estimate:
        require("matfree")
        from matfree import stochtrace

        diagonal = stochtrace.monte_carlo_diagonal()

        def integrand(matvec: Any, v: Params) -> jax.Array:
            return sums_by_layer(model, diagonal(matvec, v))

        def estimate(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
            sampler = stochtrace.sampler_signs(params, num=1)
            estimator = stochtrace.estimator_monte_carlo(integrand, sampler)
            return estimator(products(model, lambda p: p, params, batch), key)

        return compiled(model, estimate)

    return make


def _traceax(method: str, products: Products) -> Maker:
    """Its estimators, as they are called, on one operator for each layer's Hessian block."""

    def make(model: Model) -> Estimate:
        require("traceax")
        import lineax
        import traceax

        names = layer_names(model.params)
        # Its default sampler draws integers, which an operator on floats refuses.
        signs = traceax.RademacherSampler(float)
        estimator, num_products = {
            "hutchinson": (traceax.HutchinsonEstimator(signs), 1),
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
