"""Numbers and params that users pass: checks, and the dtype they are used in."""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike


def check_number(
    name: str, value: Any, allowed: str, *, low: float = -np.inf, high: float = np.inf
) -> None:
    """Raises `ValueError` unless ``value`` is a traced scalar or in ``[low, high)``."""
    if high == 1 and isinstance(value, jax.Array) and value.dtype.itemsize < 4:
        raise ValueError(
            f"{name} came as {value.dtype}, which rounds decays such as 0.999 to 1. Pass"
            " hyperparam_dtype=jnp.float32 to optax.inject_hyperparams."
        )
    if isinstance(value, jax.core.Tracer) and value.shape == ():
        return
    if callable(value):
        raise ValueError(
            f"{name} must be a number, {allowed}; got the function {value!r}. To schedule it, wrap"
            f" the optimizer: optax.inject_hyperparams(lama_adam)(..., {name}=schedule)."
        )
    is_number = isinstance(value, int | float | np.number | np.ndarray | jax.Array)
    is_scalar = is_number and np.shape(value) == () and np.isfinite(value)
    if not is_scalar or not low <= float(value) < high:
        raise ValueError(f"{name} must be {allowed}; got {value!r}.")


def check_count(name: str, value: Any) -> None:
    """Raises `ValueError` unless ``value`` is a traced array or an integer of at least 1."""
    if isinstance(value, jax.core.Tracer):
        return
    is_integer = isinstance(value, int | np.integer) or (
        isinstance(value, np.ndarray | jax.Array) and np.issubdtype(value.dtype, np.integer)
    )
    if isinstance(value, bool) or not is_integer or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1; got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Raises `ValueError` unless ``value`` is a boolean."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False; got {value!r}.")


def check_float_dtype(name: str, value: Any) -> None:
    """Raises `ValueError` unless ``value`` names a real floating-point dtype."""
    try:
        is_float = jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        is_float = False
    if not is_float:
        raise ValueError(f"{name} must be None or a real floating-point dtype; got {value!r}.")


def check_range(low_name: str, low: Any, high_name: str, high: Any) -> None:
    """Raises `ValueError` if both limits are known and the lower one is above the upper one."""
    traced = isinstance(low, jax.core.Tracer) or isinstance(high, jax.core.Tracer)
    if not traced and low > high:
        raise ValueError(f"{low_name} must be at most {high_name}; got {low!r} > {high!r}.")


def check_word(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raises `ValueError` unless ``value`` is one of the ``allowed`` words."""
    if not isinstance(value, str) or value not in allowed:
        words = ", ".join(repr(word) for word in allowed)
        raise ValueError(f"{name} must be one of {words}; got {value!r}.")


def check_floating(paths_and_leaves: Sequence[tuple[tuple[Any, ...], Any]]) -> None:
    """Raises `ValueError` unless all leaves of params are real floating-point arrays."""
    for path, leaf in paths_and_leaves:
        try:
            # JAX takes a dtype's name for a dtype: "float32" is no array.
            dtype = None if isinstance(leaf, str | type | np.dtype) else jnp.result_type(leaf)
        except TypeError:
            dtype = None
        if dtype is None:
            remedy = (
                "keep arrays alone; of an Equinox module take params, static ="
                " eqx.partition(model, eqx.is_inexact_array)"
            )
        elif jnp.issubdtype(dtype, jnp.floating):
            continue
        elif jnp.issubdtype(dtype, jnp.complexfloating):
            remedy = (
                "keep its real and its imaginary part as two leaves, and join them in the loss,"
                " jax.lax.complex(real, imag) (optax.contrib.split_real_and_imaginary splits the"
                " params that value_fn is called with)"
            )
        else:
            remedy = (
                "keep what is not trained out of params, and let the loss close over it: value_fn ="
                " lambda trained: loss_fn({**frozen, **trained}). optax.masked would hide it from"
                " value_fn too"
            )
        raise ValueError(
            "params must hold real floating-point arrays; the leaf"
            f" params{jax.tree_util.keystr(path)} is"
            f" {f'{leaf!r}, no array' if dtype is None else dtype}: {remedy}."
        )


def wide_dtype(leaf: jax.Array) -> np.dtype:
    """The dtype of a leaf's arithmetic: its own, but at least float32."""
    return jnp.dtype(jnp.float64 if jnp.result_type(leaf) == jnp.float64 else jnp.float32)


def as_scalar(x: ArrayLike, dtype: DTypeLike) -> float | jax.Array:
    """A hyper-parameter in ``dtype``; a plain number stays one, whose ``1 - b`` is a double's."""
    return float(x) if isinstance(x, int | float) else jnp.asarray(x, dtype)
