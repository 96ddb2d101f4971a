"""Small classifiers that the tests of estimators share: ``(params, apply_fn, inputs, targets)``.

Flax's names, NumPy's numbers: the same for every version of jax.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np


def _draw(seed, dtype):
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=None):
        scale = 1 / np.sqrt(shape[0]) if scale is None else scale
        return jnp.asarray(scale * rng.normal(size=shape), dtype)

    return draw, rng


def mlp(n=12, dtype=jnp.float32, seed=0):
    draw, rng = _draw(seed, dtype)
    widths = (4, 5, 5, 3)
    params = {
        f"Dense_{i}": {"kernel": draw(m, w), "bias": draw(w, scale=0.3)}
        for i, (m, w) in enumerate(itertools.pairwise(widths))
    }

    def apply_fn(p, x):
        for i in range(3):
            x = x @ p[f"Dense_{i}"]["kernel"] + p[f"Dense_{i}"]["bias"][None]
            x = jnp.tanh(x) if i < 2 else x
        return x

    return params, apply_fn, draw(n, 4, scale=1.0), jnp.asarray(rng.integers(0, 3, n))


def cnn(n=12, dtype=jnp.float32, seed=0):
    draw, rng = _draw(seed, dtype)
    params = {
        "Conv_0": {"kernel": draw(3, 3, 1, 2, scale=0.5), "bias": draw(2, scale=0.3)},
        "Conv_1": {"kernel": draw(3, 3, 2, 3, scale=0.4), "bias": draw(3, scale=0.3)},
        "Dense_0": {"kernel": draw(3, 3), "bias": draw(3, scale=0.3)},
    }

    def apply_fn(p, x):
        for name in ("Conv_0", "Conv_1"):
            x = jax.lax.conv_general_dilated(
                x, p[name]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + p[name]["bias"][None, None, None])
        return jnp.mean(x, (1, 2)) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"][None]

    return params, apply_fn, draw(n, 4, 4, 1, scale=1.0), jnp.asarray(rng.integers(0, 3, n))


def transformer(n=6, dtype=jnp.float32, seed=0, blocks=1):
    """Causal, with norms before attention and MLP; the output matrix is the embedding's."""
    draw, rng = _draw(seed, dtype)
    vocabulary, length, width = 4, 5, 4
    params = {"embed": {"table": draw(vocabulary, width, scale=1.0)}}
    for i in range(blocks):
        for name in ("query", "key", "value", "out"):
            params[f"{name}_{i}"] = {"kernel": draw(width, width)}
        params[f"up_{i}"] = {"kernel": draw(width, 6)}
        params[f"down_{i}"] = {"kernel": draw(6, width)}

    def norm(h):
        centred = h - jnp.mean(h, -1, keepdims=True)
        return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)

    def apply_fn(p, tokens):
        h = p["embed"]["table"][tokens]
        causal = jnp.tril(jnp.ones((length, length), bool))[None]
        for i in range(blocks):
            y = norm(h)
            q, k, v = (y @ p[f"{name}_{i}"]["kernel"] for name in ("query", "key", "value"))
            scores = jnp.where(causal, jnp.einsum("btd,bsd->bts", q, k) / 2, -1e9)
            h = h + (jax.nn.softmax(scores) @ v) @ p[f"out_{i}"]["kernel"]
            h = h + jax.nn.gelu(norm(h) @ p[f"up_{i}"]["kernel"]) @ p[f"down_{i}"]["kernel"]
        return norm(h) @ p["embed"]["table"].T

    tokens = rng.integers(0, vocabulary, (n, length + 1))
    return params, apply_fn, jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])


def rnn(n=6, dtype=jnp.float32, seed=0):
    draw, rng = _draw(seed, dtype)
    params = {"in": draw(2, 4), "state": draw(4, 4), "out": draw(4, 3)}

    def apply_fn(p, x):
        def turn(h, row):
            h = jnp.tanh(row @ p["in"] + h @ p["state"])
            return h, h @ p["out"]

        _, outputs = jax.lax.scan(turn, jnp.zeros((x.shape[0], 4), x.dtype), jnp.moveaxis(x, 1, 0))
        return jnp.moveaxis(outputs, 0, 1)

    return params, apply_fn, draw(n, 5, 2, scale=1.0), jnp.asarray(rng.integers(0, 3, (n, 5)))
