"""What the tests of Optax's contract share: every optimizer, and a loss of known curvature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lama_optax import exact_trace, lam, lam_scale, lama_adam, lama_scale

# The exact trace compiles in a third of the time that random probes take.
LAMA = {
    "lama_scale": functools.partial(lama_scale, estimator=exact_trace()),
    "lama_adam": functools.partial(lama_adam, 1e-2, estimator=exact_trace(), update_interval=1),
}
LAM = {
    "lam_scale-weight": lam_scale,
    "lam_scale-layer": functools.partial(lam_scale, granularity="layer"),
    "lam-weight": functools.partial(lam, 1e-2),
    "lam-layer": functools.partial(lam, 1e-2, granularity="layer"),
}
FACTORIES = {**LAMA, **LAM}
every_optimizer = pytest.mark.parametrize("name", FACTORIES)
# They chain the others with a learning rate.
ALIASES = ("lama_adam", "lam-weight", "lam-layer")
every_alias = pytest.mark.parametrize("name", ALIASES)

PARAMS = {
    "a": {"kernel": jnp.asarray([[0.5, 1.0], [-1.0, 0.5]]), "bias": jnp.asarray([-0.5, 0.5])},
    "b": {"kernel": jnp.asarray([[0.25], [0.5]]), "bias": jnp.asarray([2.0])},
}


def update_once(tx, grads, params, **extra_args):
    """The first update; compiled, unless it is of a few operations that the tests share."""
    update = functools.partial(tx.update, **extra_args)
    if "curvature" not in extra_args:
        update = jax.jit(update)
    return update(grads, tx.init(params), params)


def loss(params):
    """A quadratic with another curvature for every leaf."""
    terms = [(i + 1) * jnp.sum(leaf**2) for i, leaf in enumerate(jax.tree.leaves(params))]
    return functools.reduce(jnp.add, terms)


def curvature_of(params):
    """The params-shaped tree of `loss`'s average curvatures, known in closed form."""
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, [2.0 * (i + 1) for i in range(len(leaves))])


def shapes(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def assert_all_close(actual, expected, rtol=1e-5, atol=1e-7):
    """By default ten to a hundred roundings of float32, those of jit's reordering."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)
