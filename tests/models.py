"""Small models that the tests share: few enough parameters for the exact Hessian.

Each function returns ``(params, loss_fn)`` in the dtype on request: ``params`` named as Flax
names them, ``loss_fn`` a smooth function of params alone (tanh, softmax), so that every
derivative that a finite difference meets exists. Data and parameters come from NumPy, hence
are the same for every version of jax.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lama_optax import layer_curvature


def _arrays(seed, dtype):
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=1.0):
        return jnp.asarray(scale * rng.normal(size=shape), dtype)

    return draw


def mlp(dtype=jnp.float32, seed=0):
    """A classifier 2-4-1, binary cross-entropy over 16 points: 17 parameters, 2 layers."""
    draw = _arrays(seed, dtype)
    inputs, targets = draw(16, 2), (draw(16) > 0).astype(dtype)
    params = {
        "Dense_0": {"kernel": draw(2, 4), "bias": draw(4, scale=0.5)},
        "Dense_1": {"kernel": draw(4, 1), "bias": draw(1, scale=0.5)},
    }

    def loss_fn(p):
        hidden = jnp.tanh(inputs @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"][None, :])
        logits = (hidden @ p["Dense_1"]["kernel"])[:, 0] + p["Dense_1"]["bias"]
        return jnp.mean(jax.nn.softplus(logits) - targets * logits)

    return params, loss_fn


def convolution(dtype=jnp.float32, seed=0):
    """A 2x2 convolution and a linear head on 4x4 images, least squares: 13 parameters."""
    draw = _arrays(seed, dtype)
    images, targets = draw(4, 4, 4, 1), draw(4)
    params = {
        "Conv_0": {"kernel": draw(2, 2, 1, 2, scale=0.7), "bias": draw(2, scale=0.5)},
        "Dense_0": {"kernel": draw(2), "bias": draw(1)},
    }

    def loss_fn(p):
        maps = jax.lax.conv_general_dilated(
            images,
            p["Conv_0"]["kernel"],
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        features = jnp.mean(jnp.tanh(maps + p["Conv_0"]["bias"][None, None, None]), axis=(1, 2))
        outputs = features @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
        return jnp.mean((outputs - targets) ** 2)

    return params, loss_fn


def attention(dtype=jnp.float32, seed=0):
    """One attention head with a residual on 3 tokens of width 2: 18 parameters, 4 layers."""
    draw = _arrays(seed, dtype)
    tokens, targets = draw(4, 3, 2), draw(4, 3)
    params = {name: {"kernel": draw(2, 2)} for name in ("query", "key", "value")}
    params["out"] = {"kernel": draw(2, 2), "bias": draw(2, scale=0.5)}

    def loss_fn(p):
        query, key, value = (tokens @ p[name]["kernel"] for name in ("query", "key", "value"))
        weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", query, key), axis=-1)
        outputs = jnp.einsum("bqk,bkd->bqd", weights, value) @ p["out"]["kernel"]
        outputs = jnp.sum(jnp.tanh(tokens + outputs + p["out"]["bias"][None, None]), axis=-1)
        return jnp.mean((outputs - targets) ** 2)

    return params, loss_fn


MODELS = {"mlp": mlp, "convolution": convolution, "attention": attention}


def compiled_curvature(params, key=0, **options):
    """`layer_curvature` as one program; operation by operation hundreds would be compiled."""
    return jax.jit(functools.partial(layer_curvature, **options))(params, key)


def over_seeds(seeds, params, loss_fn, *estimators):
    """Estimates for many keys, as NumPy arrays: one compilation, the keys shared by all."""
    keys = jax.random.split(jax.random.key(0), seeds)

    def estimate(key):
        return [
            layer_curvature(params, key, estimator=estimator, value_fn=loss_fn)
            for estimator in estimators
        ]

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(estimate))(keys))
