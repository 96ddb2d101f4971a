"""Compares the estimators on one program with the program's exact matrices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from lama_optax import flipout, gauss_newton, layer_curvature

# Independent estimates, whose own spread is the standard error: one that an estimator says of
# itself cannot hide a bias.
_NUM_ESTIMATES = 512
# What is further off than so many standard errors is estimated again, 8 times as often and with
# other keys.
_SUSPICIOUS, _BIASED = 3, 5
_AGAIN = 8
# Weights and activations are of the order of one: what is smaller than this is rounding.
_TINY = 1e-12


class Exact(NamedTuple):
    """Of each layer: the trace of a block, and the size of what it is computed from."""

    hessian: np.ndarray
    hessian_size: np.ndarray
    gauss_newton: np.ndarray
    gauss_newton_size: np.ndarray


def exact(program):
    """By `jax.hessian` of the mean loss, and by the outputs' Jacobian, over all parameters."""
    flat, unravel = ravel_pytree(program.params)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(program.params)[0]]
    keys = [path[:-1] if program.layers == "module" else path for path in paths]
    sizes = [leaf.size for leaf in jax.tree.leaves(program.params)]
    owner = np.repeat([list(dict.fromkeys(keys)).index(key) for key in keys], sizes)
    member = jnp.asarray(np.arange(len(set(keys)))[:, None] == owner[None], flat.dtype)

    def mean_loss(flat):
        params = unravel(flat)
        return jnp.mean(jax.vmap(lambda e: program.example_value_fn(params, e))(program.batch))

    def of_example(flat, e):
        outputs = lambda flat: program.example_output_fn(unravel(flat), e)  # noqa: E731
        jacobian = jax.jacrev(outputs)(flat)
        hessian = jax.hessian(program.output_loss_fn)(outputs(flat), e)
        sizes = jnp.einsum("cn,cd,dn->n", *map(jnp.abs, (jacobian, hessian, jacobian)))
        return jnp.einsum("cn,cd,dn->n", jacobian, hessian, jacobian), sizes

    @jax.jit
    def matrices(flat):
        hessian = jax.hessian(mean_loss)(flat)
        examples = jax.vmap(of_example, in_axes=(None, 0))(flat, program.batch)
        found = jnp.diag(hessian), jnp.abs(hessian).sum(0), *(x.mean(0) for x in examples)
        return [member @ x for x in found]

    result = Exact(*map(np.asarray, matrices(flat)))
    if not all(np.isfinite(x).all() for x in result):
        raise AssertionError("the program itself is not finite: mend the fuzz")
    return result


def _traces(program, estimator, key):
    """An estimate's trace of each layer, and its standard error as it says itself."""
    estimate = layer_curvature(
        program.params,
        key,
        estimator=estimator,
        layers=program.layers,
        example_value_fn=program.example_value_fn,
        example_output_fn=program.example_output_fn,
        output_loss_fn=program.output_loss_fn,
        batch=program.batch,
        updates=program.updates,
    )
    size = estimate.size.astype(estimate.mean.dtype)
    return estimate.mean * size, estimate.std_error * size


def _flipout(program, scope, found):
    @jax.jit
    def run(keys):
        return jax.lax.map(lambda key: _traces(program, flipout(2, scope=scope), key), keys)

    def errors(seed, repeats):
        keys = jax.random.split(jax.random.key(seed), (repeats, _NUM_ESTIMATES))
        traces, own = (np.concatenate(x) for x in zip(*map(run, keys), strict=True))
        mean, root = traces.mean(0), np.sqrt(len(traces))
        # At least rounding, so that an estimate without any variance has a standard error too.
        size = found.hessian_size + 1e-3 * found.hessian_size.sum()
        floor = _TINY + (1e-10 + program.rounding) * size
        spread = traces.std(0, ddof=1)
        z = (mean - found.hessian) / np.maximum(spread / root, floor)
        claimed = np.sqrt((own**2).mean(0))
        return mean, z, spread / np.maximum(claimed, floor)

    mean, z, ratio = errors(program.seed, 1)
    # Not `z > 3`: NaN is a failure.
    if (np.abs(z) <= _SUSPICIOUS).all() and not (ratio > 2).any():
        return []
    mean, z, ratio = errors(program.seed + 1000, _AGAIN)
    messages = []
    for layer in range(len(z)):
        if not abs(z[layer]) <= _BIASED:
            messages.append(
                f"layer {layer}: {mean[layer]:.5g}, exact {found.hessian[layer]:.5g},"
                f" {z[layer]:.1f} standard errors"
            )
        elif ratio[layer] > 2:
            messages.append(f"layer {layer}: spread {ratio[layer]:.1f} times its standard error")
    return messages


def _gauss_newton(program, found):
    trace, _ = jax.jit(lambda key: _traces(program, gauss_newton(), key))(jax.random.key(0))
    size = found.gauss_newton_size + 1e-3 * found.gauss_newton_size.sum()
    tolerance = _TINY + (1e-9 + 5 * program.rounding) * size
    return [
        f"layer {layer}: {a:.5g}, exact {b:.5g}"
        for layer, (a, b, tol) in enumerate(zip(trace, found.gauss_newton, tolerance, strict=True))
        if not abs(a - b) <= tol
    ]


def failures(program):
    """What is wrong, a line for each estimator and layer; empty if nothing is."""
    found = exact(program)
    checks = {
        "flipout joint": lambda: _flipout(program, "joint", found),
        "flipout block": lambda: _flipout(program, "block", found),
        "gauss_newton": lambda: _gauss_newton(program, found),
    }
    messages = []
    for name, check in checks.items():
        try:
            messages += [f"{name}: {message}" for message in check()]
        except Exception as error:
            text = str(error).strip().split("\n")[0][:150]
            messages.append(f"{name}: {type(error).__name__}: {text}")
    return messages
