"""The language model of the benchmarks: a GPT of bytes, in Flax Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.lab._corpus import VALUES


class Block(nn.Module):
    """Attention and two dense layers, each after a layer norm."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Vectors of the same shape, (..., t, width)."""
        h = nn.LayerNorm(name="norm_1")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(h, h, mask=mask)
        h = nn.Dense(4 * self.width, name="up")(nn.LayerNorm(name="norm_2")(x))
        return x + nn.Dense(self.width, name="down")(nn.gelu(h))


class GPT(nn.Module):
    """A decoder: of width 32 it has 67 k parameters, of 96 0.50 M, of 384 7.3 M."""

    width: int = 96
    depth: int = 4
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next byte, shape (..., t, 256), of bytes, shape (..., t)."""
        mask = nn.make_causal_mask(tokens)
        positions = jnp.arange(tokens.shape[-1])
        x = nn.Embed(VALUES, self.width, name="bytes")(tokens)
        x = x + nn.Embed(tokens.shape[-1], self.width, name="positions")(positions)
        for i in range(self.depth):
            x = Block(self.width, self.heads, name=f"block_{i}")(x, mask)
        return nn.Dense(VALUES, name="head")(nn.LayerNorm(name="norm")(x))
