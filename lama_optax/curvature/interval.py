"""When a tracker estimates, of which layers, from which key and on which device."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lama_optax._checks import check_count
from lama_optax.curvature.protocol import as_typed_key, check_key, of_each_device
from lama_optax.layers import Layers, LayerSpec, check_layers, resolve_layers

PyTree = Any
State = TypeVar("State")


@dataclasses.dataclass(frozen=True)
class Interval:
    """What all trackers do alike; their states have a ``count`` and the raw first ``key``."""

    layers: LayerSpec
    update_interval: ArrayLike
    axis_name: str | None
    key: int | jax.Array

    def __post_init__(self) -> None:
        check_layers(self.layers)
        check_count("update_interval", self.update_interval)
        if not isinstance(self.axis_name, str | tuple | None):
            raise ValueError(
                f"axis_name must be None or the name of a mapped axis; got {self.axis_name!r}."
            )
        # The key is made at `init`: a construction must not wake JAX's devices.
        check_key(self.key)

    def raw_key(self) -> jax.Array:
        """Raw, since typed keys break checkpoints; in a buffer of its own."""
        return jnp.copy(jax.random.key_data(as_typed_key(self.key)))

    def partition(self, params: PyTree | None, num_layers: int) -> Layers:
        """The layers of ``params``, of which `init` saw ``num_layers``."""
        if params is None:
            raise ValueError("params is missing: call tx.update(grads, state, params, ...).")
        partition = resolve_layers(self.layers, params)
        if len(partition.names) != num_layers:
            raise ValueError(
                f"params must have the layers that `init` saw, {num_layers}; got"
                f" {len(partition.names)}, {partition.names}. Call tx.init(params) again when the"
                " model changes."
            )
        return partition

    def when_due(self, state: State, estimate: Callable[[jax.Array], State]) -> State:
        """``estimate(key of this step)`` at every n-th step, from the first; else ``state``."""
        count, first_key = state.count, state.key  # type: ignore[attr-defined]  # see Interval

        def now() -> State:
            impl = jax.random.key_impl(as_typed_key(self.key))
            return estimate(
                jax.random.fold_in(jax.random.wrap_key_data(first_key, impl=impl), count)
            )

        if isinstance(self.update_interval, int) and self.update_interval == 1:
            return now()
        due = count % jnp.asarray(self.update_interval, count.dtype) == 0
        latest: State = jax.lax.cond(due, now, lambda: state)
        return latest

    def of_this_device(self, params: PyTree, key: jax.Array) -> tuple[PyTree, jax.Array]:
        """With ``axis_name``: derivatives of this device's part of the batch, draws of its own."""
        if self.axis_name is None:
            return params, key
        device = jax.lax.axis_index(self.axis_name)
        return of_each_device(params, device), jax.random.fold_in(key, device)
