"""A character language model: a small Flax transformer on the text of `pydoc_data.topics`.

The text ships with Python and differs from version to version, so its hash is part of every
record, and results of different texts are never mixed.
"""

import functools
import hashlib
import pydoc_data.topics
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.study._workload import Workload, batch_order, take_batch

PyTree = Any

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;()[]{}'\"-=_*`/|<>+#%@\\"
WIDTH, HEADS, BLOCKS, CONTEXT = 24, 2, 1, 32
BATCH, STEPS = 8, 120
#: Neighbouring sequences stay together, so that no test sequence continues a training one.
GROUP = 16
SEQUENCES = {"train": 1024, "validation": 64, "test": 128}

#: sha256 of the text -> the versions of Python that are known to ship it.
KNOWN_TEXTS = {
    "2a95af4ac93f5b719944030ce3769070ddf827d847cba42192afa8da989e5dc4": "3.11.7",
    "b0796031be1d1b35e6efa46b7944effd47a0c52a48087d470dde314fe2d66968": "3.11.2",
    "b5bb57d637a700f50d8c7309e7340f40a333fdf2cba89d3f1da81c1b74ee8952": "3.12.1",
    "4b7ff11aae42ee979a50edb5d279a88ae9d80d7216e9ba99add988136ded5fb2": "3.13.0",
}


@functools.cache
def text() -> tuple[str, str]:
    """The text and its sha256."""
    topics = pydoc_data.topics.topics
    joined = "\n".join(topics[name] for name in sorted(topics))
    return joined, hashlib.sha256(joined.encode()).hexdigest()


def unknown_text_note() -> str | None:
    """What to tell a user whose Python ships a text that is not in `KNOWN_TEXTS`."""
    joined, digest = text()
    if digest in KNOWN_TEXTS:
        return None
    known = ", ".join(KNOWN_TEXTS.values())
    return (
        f"char_lm: this Python's pydoc_data.topics ({len(joined)} characters, sha256 {digest[:12]})"
        f" is not one of the known texts (Python {known}): the figures are valid in themselves but"
        " not comparable with those of other texts."
    )


@functools.cache
def _sequences() -> np.ndarray:
    """Shape (groups, GROUP, CONTEXT + 1); characters that are not in the alphabet share one."""
    number = {character: i for i, character in enumerate(ALPHABET)}
    codes = np.array([number.get(c, len(ALPHABET)) for c in text()[0].lower()], np.int32)
    length = GROUP * (CONTEXT + 1)
    return codes[: len(codes) // length * length].reshape(-1, GROUP, CONTEXT + 1)


def _make(seed: int) -> tuple[dict[str, PyTree], np.ndarray]:
    rng = np.random.default_rng(seed)
    groups = rng.permutation(len(_sequences()))
    data, start = {}, 0
    for part, count in SEQUENCES.items():
        chosen = groups[start : start + count // GROUP]
        data[part] = {"tokens": _sequences()[chosen].reshape(count, -1)}
        start += count // GROUP
    return data, batch_order(rng, SEQUENCES["train"], BATCH, STEPS)


class Transformer(nn.Module):
    """Pre-norm decoder; returns the logits of every next character."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits, shape (N, T, characters), of tokens (N, T)."""
        length = tokens.shape[1]
        x = nn.Embed(len(ALPHABET) + 1, WIDTH)(tokens)
        x = x + nn.Embed(CONTEXT, WIDTH, name="Position")(jnp.arange(length))
        mask = nn.make_causal_mask(tokens)
        for _ in range(BLOCKS):
            x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=mask)
            hidden = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
            x = x + nn.Dense(WIDTH)(hidden)
        return nn.Dense(len(ALPHABET) + 1)(nn.LayerNorm()(x))


def _loss(params: PyTree, batch: PyTree) -> jax.Array:
    return _evaluate(params, batch)[0]


def _evaluate(params: PyTree, part: PyTree) -> tuple[jax.Array, jax.Array]:
    tokens = part["tokens"]
    logits = jnp.asarray(Transformer().apply({"params": params}, tokens[:, :-1]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses), jnp.mean(jnp.argmax(logits, axis=-1) == tokens[:, 1:])


@jax.jit
def _init(key: jax.Array) -> PyTree:
    return Transformer().init(key, jnp.zeros((1, CONTEXT), jnp.int32))["params"]


def language_workload() -> Workload:
    """The character language model."""
    return Workload(
        name="char_lm",
        metric_name="accuracy of the next character",
        steps=STEPS,
        batch_size=BATCH,
        trials=24,
        tune_seeds=2,
        final_seeds=24,
        chunk=24,
        step_microseconds=1300,
        make=_make,
        init=_init,
        loss=_loss,
        evaluate=_evaluate,
        prepare=take_batch,
        data_hash=text()[1],
    )
