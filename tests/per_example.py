"""Losses of single examples: each function returns ``(params, loss, batch, layers)``."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from lama_optax import stacked


def batch_loss(loss, batch):
    """The loss over the batch from that of one example."""
    return lambda p: jnp.mean(jax.vmap(lambda example: loss(p, example))(batch))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def mlp():
    params = {
        "first": {"kernel": 0.5 * normal(0, 6, 8), "bias": 0.1 * normal(1, 8)},
        "second": {"kernel": 0.5 * normal(2, 8, 3), "bias": jnp.zeros(3)},
    }

    def loss(p, example):
        x, y = example
        h = jnp.tanh(x @ p["first"]["kernel"] + p["first"]["bias"])
        return jnp.mean((h @ p["second"]["kernel"] + p["second"]["bias"] - y) ** 2)

    return params, loss, (normal(3, 12, 6), normal(4, 12, 3)), "module"


class _Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (3, 3))(x))
        x = nn.tanh(nn.Conv(5, (3, 3), strides=2)(x))
        return nn.Dense(3)(x.reshape(-1))


def cnn():
    model, images = _Convolutions(), normal(1, 10, 6, 6, 2)
    params = jax.jit(model.init)(jax.random.key(0), images[0])

    def loss(p, example):
        return jnp.sum((model.apply(p, example[0]) - example[1]) ** 2)

    return params, loss, (images, normal(2, 10, 3)), "module"


class _Transformer(nn.Module):
    """Two blocks with attention; the embedding is tied to the output."""

    @nn.compact
    def __call__(self, tokens):
        embedding = nn.Embed(11, 8)
        x = embedding(tokens)
        for _ in range(2):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(2)(h, h)
            x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return embedding.attend(nn.LayerNorm()(x))


def transformer():
    model = _Transformer()
    tokens = jax.random.randint(jax.random.key(1), (6, 5), 0, 11)
    params = jax.jit(model.init)(jax.random.key(0), tokens[0, :-1])

    def loss(p, example):
        logits = model.apply(p, example[:-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, example[1:]).mean()

    return params, loss, tokens, "module"


def rnn():
    """`lax.scan` over time: every step uses the same weights, so the same probe."""
    params = {
        "cell": {"w": 0.4 * normal(0, 5, 5), "u": 0.5 * normal(1, 3, 5), "b": jnp.zeros(5)},
        "out": {"w": normal(2, 5, 2)},
    }

    def loss(p, xs):
        def step(h, x):
            return jnp.tanh(h @ p["cell"]["w"] + x @ p["cell"]["u"] + p["cell"]["b"]), None

        h, _ = jax.lax.scan(step, jnp.zeros(5), xs)
        return jnp.sum((h @ p["out"]["w"]) ** 2)

    return params, loss, normal(3, 7, 4, 3), "module"


def stacked_scan():
    """`lax.scan` over depth: the weights' leading axis is sliced."""
    params = {
        "blocks": {"w": 0.5 * normal(0, 3, 5, 5), "b": 0.1 * normal(4, 3, 5)},
        "out": {"w": normal(1, 5, 2)},
    }

    def loss(p, x):
        def step(h, block):
            return jnp.tanh(h @ block["w"] + block["b"]), None

        h, _ = jax.lax.scan(step, x, p["blocks"])
        return jnp.sum((h @ p["out"]["w"]) ** 2)

    return params, loss, normal(2, 9, 5), stacked("blocks")


def tied():
    """One weight transposed, reshaped, sliced and rematerialised, and one used elementwise."""
    params = {"w": 0.5 * normal(0, 6, 4), "gate": normal(1, 4, 4)}

    def loss(p, x):
        h = jax.checkpoint(lambda h: jnp.tanh(h @ p["w"]))(x)
        back = (
            h @ p["w"].T
            + x[:4].reshape(2, 2).reshape(-1)
            @ p["w"].reshape(2, 3, 4)[:, 1].T
            @ (p["w"][:2])
            @ p["w"].T
        )
        return jnp.sum(back**2) + jnp.sum(jnp.sin(p["gate"]) @ h)

    return params, loss, normal(2, 8, 6), "module"
