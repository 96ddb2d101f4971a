"""Random probes v with E[v v^T] = I, one tree shaped like the parameters.

Each leaf's probe has that leaf's dtype, so that mixed bfloat16 and float32 parameters work.
Different leaves get independent bits, and the bits do not depend on how a leaf is sharded.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lama_optax.layers import Layers

PyTree = Any


def rademacher(key: jax.Array, params: PyTree, layers: Layers) -> PyTree:
    """Entries +1 or -1: the least variance for a diagonal Hessian, none."""
    del layers
    return optax.tree.random_like(key, params, signs)


def signs(key: jax.Array, shape: tuple[int, ...], dtype: Any, out_sharding: Any = None) -> Any:
    """Rademacher numbers from one random bit each; `jax.random.rademacher` draws 64 for each.

    Every device draws all words, 1/32 of the entries, and keeps its part: nothing is sent.
    """
    if not shape:
        return signs(key, (1,), dtype).reshape(())
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 32)), jnp.uint32)
    place = jax.lax.broadcasted_iota(words.dtype, (*words.shape, 32), words.ndim)
    bits = jnp.right_shift(words[..., None], place) & 1
    flat = bits.reshape(*shape[:-1], words.shape[-1] * 32)[..., : shape[-1]]
    return laid_out((1 - 2 * flat.astype(jnp.int8)).astype(dtype), out_sharding)


def along_examples(drawn: jax.Array, batch: PyTree) -> jax.Array:
    """Numbers for each example, of shape (batch_size, n), where the examples of ``batch`` are."""
    sharding = jax.typeof(jax.tree.leaves(batch)[0]).sharding
    spec = PartitionSpec(*sharding.spec[:1], *[None] * (drawn.ndim - 1))
    return laid_out(drawn, NamedSharding(sharding.mesh, spec))


def laid_out(drawn: jax.Array, sharding: Any) -> jax.Array:
    """An array spread over the devices like another, which meshes with explicit axes ask for."""
    if sharding is not None and AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(drawn, sharding)
    return drawn


def gaussian(key: jax.Array, params: PyTree, layers: Layers) -> PyTree:
    """Entries from N(0, 1): ``Var[v^T H v] = 2 ||H||_F^2`` for symmetric H.

    Drawn in `Layers.dtype`: jax's normal numbers in bfloat16 have a mean of -0.012.
    """
    return optax.tree.cast_like(_normal(key, params, layers), params)


def sphere(key: jax.Array, params: PyTree, layers: Layers) -> PyTree:
    """Each layer's block uniform on the sphere of radius sqrt(N_l).

    Exact for a multiple of the identity. Blocks are normalised layer by layer, so that one
    layer's length carries no noise of the others.
    """
    normal = _normal(key, params, layers)
    squared_norm = layers.sum(jax.tree.map(jnp.square, normal))
    # A layer without parameters has norm 0 and no entry to scale.
    scale = jnp.sqrt(layers.size_array() / jnp.where(squared_norm > 0, squared_norm, 1))
    probe = jax.tree.map(jnp.multiply, normal, layers.spread(scale, params))
    return optax.tree.cast_like(probe, params)


def _normal(key: jax.Array, params: PyTree, layers: Layers) -> PyTree:
    return optax.tree.random_like(key, optax.tree.cast(params, layers.dtype), jax.random.normal)


PROBES: dict[str, Callable[[jax.Array, PyTree, Layers], PyTree]] = {
    "rademacher": rademacher,
    "gaussian": gaussian,
    "sphere": sphere,
}
