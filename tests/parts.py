"""What the tests of single operations share: small models around one, and the exact Hessian."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


class Part(NamedTuple):
    """A small model with the part in question."""

    params: object
    value_fn: object
    has_aux: bool = False
    reference: object = None  # the same function where `value_fn` has no second derivative


def draw(seed):
    rng = np.random.default_rng(seed)
    return lambda *shape: jnp.asarray(rng.normal(size=shape))


def with_activation(activation, seed, reference=jnp.tanh):
    params = {"inner": {"kernel": draw(seed)(2, 3)}, "outer": {"kernel": draw(seed + 1)(3, 1)}}
    x, y = draw(seed + 2)(6, 2), draw(seed + 3)(6, 1)

    def loss_with(activation):
        def value_fn(p):
            h = activation(x @ p["inner"]["kernel"])
            return jnp.mean((h @ p["outer"]["kernel"] - y) ** 2)

        return value_fn

    return Part(params, loss_with(activation), reference=loss_with(reference))


@jax.custom_vjp
def tanh_with_vjp(x):
    """Its rules are plain JAX and can be differentiated again."""
    return jnp.tanh(x)


tanh_with_vjp.defvjp(
    lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, cotangent: (cotangent * (1 - y**2),)
)


def exact_means(params, value_fn):
    """The mean of the Hessian's diagonal over each module; modules in order, as jax flattens."""
    flat, unravel = ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda x: value_fn(unravel(x))))(flat)
    diagonal = unravel(jnp.diag(hessian))
    return np.asarray([ravel_pytree(diagonal[name])[0].mean() for name in sorted(diagonal)])


# Of one example, two rows of ROWS: what stands between `dense` and `squared_error` is in question.


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"a": {"w": normal(0, 3, 4), "b": normal(1, 4)}, "o": {"w": normal(2, 4, 2)}}
ROWS = normal(3, 6, 2, 3)


def dense(p, x):
    return x @ p["a"]["w"] + p["a"]["b"]


def squared_error(p, h):
    return jnp.sum((jnp.tanh(h) @ p["o"]["w"] - 1) ** 2)
