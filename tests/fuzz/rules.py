"""What the parts share: random numbers, and derivative rules as users write their own.

A part takes random numbers and the shape (t, d) of the activations; it returns the name of its
form, its weights and a function ``(weights, activations, example) -> activations``. An example
holds ``x`` of shape (t, d), ``y``, ``ids`` (four integers from 0 to 3) and the positive number
``s``.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


def form_of(r, forms):
    """One of several ways to write the same, and its name for the report."""
    name = r.pick(*forms)
    return name, forms[name]


class Draw:
    """Random numbers and choices, the same for every version of jax."""

    def __init__(self, seed):
        self._rng = np.random.default_rng(seed)

    def __call__(self, *shape):
        return jnp.asarray(0.6 * self._rng.normal(size=shape), jnp.float64)

    def pick(self, *options):
        return options[self._rng.integers(len(options))]


def frozen_sigma(w):
    """The largest singular value by power iteration in a loop that has no gradient."""
    w = jax.lax.stop_gradient(w.reshape(w.shape[0], math.prod(w.shape[1:])))

    def step(state):
        i, u = state
        v = w.T @ (w @ u)
        return i + 1, v / (1e-3 + jnp.linalg.norm(v))

    u = jnp.ones(w.shape[1], w.dtype)
    return jnp.linalg.norm(w @ jax.lax.while_loop(lambda s: s[0] < 4, step, (0, u))[1])


# Derivative rules of the user's own: of second order, and not always the function's.
@jax.custom_jvp
def round_through(x):
    return jnp.round(2 * x) / 2


round_through.defjvp(lambda x, dx: (round_through(*x), dx[0] * (1 - jnp.tanh(x[0]) ** 2)))


@jax.custom_vjp
def fused_tanh(x):
    return jnp.tanh(x)


fused_tanh.defvjp(lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, g: (g * (1 - y**2),))


@jax.custom_vjp
def clip_gradient(x):
    return x


clip_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.tanh(g),))


@jax.custom_vjp
def fused_dense(x, w):
    return x @ w


fused_dense.defvjp(lambda x, w: (x @ w, (x, w)), lambda xw, g: (g @ xw[1].T, xw[0].T @ g))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def powered(n, x):
    return x**n


powered.defjvp(lambda n, x, dx: (powered(n, *x), n * x[0] ** (n - 1) * dx[0]))
