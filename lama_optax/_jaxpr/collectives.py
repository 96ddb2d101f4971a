"""Tells whether a function speaks with the other devices of a mapped axis."""

from typing import Any

from lama_optax._jaxpr.interpret import names_in

# What JAX names them, in `jax.shard_map` with and without its check of types, and in `jax.pmap`.
_COLLECTIVES = ("psum", "pmax", "pmin", "all_gather", "all_to_all", "reduce_scatter", "ppermute")


def holds_collective(closed: Any) -> bool:
    """Whether a jaxpr sums or gathers over an axis that is mapped around it.

    Collectives of a `jax.shard_map` inside of it do not count. Nor does `jax.lax.axis_index`.
    """
    # An effect carries the name of each axis that is mapped outside.
    is_open = any(hasattr(effect, "name") for effect in closed.effects)
    return is_open and any(name.startswith(_COLLECTIVES) for name in names_in(closed))
