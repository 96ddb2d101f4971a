"""The papers' equations as pure functions of arrays, in the papers' order.

Eq. (7) is `lama_optax.hutchinson`, Eq. (8) is `lama_optax.Layers.average`. Arrays have one floating
dtype and any (broadcastable) shape; hyper-parameters are Python numbers or scalar arrays. The terms
stand in the order in which `optax.scale_by_adam` adds them: equal arithmetic gives equal bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Scalar = float | jax.Array


def first_moment(moment: jax.Array, grad: jax.Array, decay: Scalar, weight: Scalar) -> jax.Array:
    """Eq. (1) and Eq. (6): ``m = decay m + weight g``.

    Eq. 1 is ``decay = b1``, Eq. 6 ``decay = alpha b1``, both with ``weight = 1 - b1``. The
    ``"ema"`` form departs from the paper: ``weight = 1 - alpha b1``, a true average.
    """
    return weight * grad + decay * moment


def second_moment(moment: jax.Array, grad: jax.Array, b2: Scalar) -> jax.Array:
    """Eq. (2): ``v = b2 v + (1 - b2) g^2``."""
    return (1 - b2) * grad**2 + b2 * moment


@functools.partial(jax.jit, inline=True)
def bias_corrected(moments: PyTree, decay: Scalar, count: jax.Array) -> PyTree:
    """Eq. (3) and Eq. (4): ``moment / (1 - decay^t)`` after ``t`` steps, for a tree of moments."""
    # `optax.tree.bias_correction` to the bit; that function needs implicit dtype promotion.
    divisor = 1 - jax.lax.pow(jnp.asarray(decay), count)
    return jax.tree.map(lambda moment: moment / divisor.astype(moment.dtype), moments)


def adam_step(m_hat: jax.Array, v_hat: jax.Array, eps: Scalar, eps_root: Scalar = 0.0) -> jax.Array:
    """Eq. (5) without the learning rate: ``m_hat / (sqrt(v_hat) + eps)``; `optax.adam`'s root."""
    return m_hat / (jnp.sqrt(v_hat + eps_root) + eps)


def momentum_factor(
    curvature: jax.Array, alpha_min: Scalar, alpha_max: Scalar, sensitivity: Scalar
) -> jax.Array:
    """Eq. (9): ``alpha = alpha_min + (alpha_max - alpha_min) sigmoid(lambda H)``."""
    alpha = alpha_min + (alpha_max - alpha_min) * jax.nn.sigmoid(sensitivity * curvature)
    return jnp.clip(alpha, alpha_min, alpha_max)  # against rounding


def lam_accumulator(accumulator: jax.Array, squared_grad: jax.Array, decay: Scalar) -> jax.Array:
    """LAM: ``v = (1 - beta) g^2 + beta v``; per layer of the mean g^2 (Property 4)."""
    return (1 - decay) * squared_grad + decay * accumulator


def lam_step(grad: jax.Array, accumulator: jax.Array, eps: Scalar) -> jax.Array:
    """LAM's step without the learning rate: ``g / (sqrt(v) + eps)``, no bias correction.

    Property 1 writes ``sqrt(v + eps)``; the paper's definition, used here, does not.
    """
    return grad / (jnp.sqrt(accumulator) + eps)
