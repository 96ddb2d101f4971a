"""Curvature outside an optimizer: of one batch, of a whole data set, or until it is known well."""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lama_optax._checks import check_count, check_number
from lama_optax.curvature.protocol import Estimator, LayerCurvature, as_typed_key, check_estimator
from lama_optax.layers import Layers, LayerSpec, resolve_layers

PyTree = Any
# A spread from fewer estimates is too uncertain to decide by that the mean is known well.
_FIRST_LOOK = 30


def layer_curvature(
    params: PyTree,
    key: int | jax.Array,
    *,
    estimator: Estimator,
    layers: LayerSpec = "module",
    batches: Iterable[Mapping[str, Any]] | None = None,
    relative_error: float | None = None,
    max_samples: int = 10_000,
    share: float = 1.0,
    **estimator_args: Any,
) -> LayerCurvature:
    """Estimates each layer's average curvature outside an optimizer: once, or again and again.

    Args:
      params: pytree of real floating-point arrays, any mixture of dtypes.
      key: a seed or a PRNG key. The i-th of several estimates uses ``fold_in(key, i)``.
      estimator: for instance `fisher`, `hutchinson` or `exact_trace`.
      layers: what one layer is, see `layer_names`.
      batches: an iterable of what the estimator needs, one dict a batch, for one estimate each: a
        data loader's, as ``(supervised(apply_fn, x, y) for x, y in loader)``. Each counts alike, so
        let them have the same size. One is in memory at a time. The estimate is compiled once where
        their shapes are equal and the functions are the same objects, as `supervised` makes them.
      relative_error: estimate until the standard error is at most this part of the mean's absolute
        value, in (0, 1), or ``batches`` end.
      max_samples: the most estimates that ``relative_error`` may take.
      share: the part of the layers, in (0, 1], that has to be known that well.
      **estimator_args: what the estimator needs, by name: ``value_fn``, or all of ``supervised``.

    Returns:
      A `LayerCurvature` of three ``(L,)`` arrays, in the order of `layer_names`, the mean over the
      estimates, its standard error from the spread between them (of one: the estimator's own, NaN
      with ``batches``), which holds the noise of the batches too, and the sizes. The trace of a
      layer's Hessian block is ``mean * size``.

    Raises:
      ValueError: if an argument of the estimator is missing, ``params`` has a leaf that is
        not real floating point, ``batches`` are empty, or an estimate among several is not finite.

    Warns:
      UserWarning: if layers are not known to ``relative_error`` in the end, with their names; and
        if an interruption (Ctrl-C) ends it early: it then returns what it has.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lama_optax import exact_trace, hutchinson, layer_curvature
      >>> params = {"a": jnp.ones(3), "b": jnp.ones(2)}
      >>> loss = lambda p: jnp.sum(p["a"] ** 2) + 2 * jnp.sum(p["b"] ** 2)
      >>> layer_curvature(params, 0, estimator=exact_trace(), value_fn=loss).mean.tolist()
      [2.0, 4.0]
      >>> estimate = layer_curvature(params, 0, estimator=hutchinson(), value_fn=loss)
      >>> estimate.mean.tolist(), estimate.std_error.tolist(), estimate.size.tolist()
      ([2.0, 4.0], [0.0, 0.0], [3, 2])
    """
    check_estimator(estimator)
    partition = resolve_layers(layers, params)
    key = as_typed_key(key)
    if batches is None and relative_error is None:
        return estimator.estimate(key, params, partition, **estimator_args)
    if relative_error is not None:
        check_number("relative_error", relative_error, "in (0, 1)", low=1e-30, high=1)
        check_count("max_samples", max_samples)
        check_number("share", share, "in (0, 1]", low=1e-30, high=1 + 1e-12)
    found: Iterable[dict[str, Any]] = itertools.repeat(estimator_args)
    if batches is not None:
        found = (estimator_args | dict(batch) for batch in batches)
    if relative_error is not None:
        found = itertools.islice(found, max_samples)
    total = len(batches) if isinstance(batches, Sized) else None
    estimate = _compiled_once(estimator, params, partition)
    last: LayerCurvature | None = None

    def means() -> Iterator[np.ndarray]:
        nonlocal last
        for i, arguments in enumerate(_with_progress(found, total)):
            last = estimate(jax.random.fold_in(key, i), arguments)
            yield np.asarray(last.mean, np.float64)

    samples = _collected(means(), partition.names, relative_error, share)
    if len(samples) == 1 and batches is None and last is not None:
        return last
    size = np.asarray(partition.sizes, np.float64)
    trace, error = np.mean(samples, axis=0) * size, None
    if len(samples) > 1:
        error = jnp.asarray(_error(samples) * size, partition.dtype)
    return LayerCurvature.from_trace(partition, jnp.asarray(trace, partition.dtype), error)


def _collected(
    means: Iterable[np.ndarray],
    names: Sequence[str],
    relative_error: float | None,
    share: float,
) -> list[np.ndarray]:
    """All of the estimates, or so many that the layers are known to ``relative_error``."""
    samples: list[np.ndarray] = []
    next_look = _FIRST_LOOK
    try:
        for mean in means:
            if not np.isfinite(mean).all():
                unknown = [name for name, x in zip(names, mean, strict=True) if not np.isfinite(x)]
                raise ValueError(f"estimate {len(samples)} is not finite for the layers {unknown}.")
            samples.append(mean)
            if relative_error is not None and len(samples) == next_look:
                if np.mean(_is_known(samples, relative_error)) >= share:
                    break
                # Looking rarely: each look is another chance to stop at a spread too small by luck.
                next_look += -(-next_look // 4)
    except KeyboardInterrupt:
        if not samples:
            raise
        warnings.warn(f"interrupted: the mean is over {len(samples)} estimates.", stacklevel=3)
    if not samples:
        raise ValueError("batches must hold at least one batch; got none.")
    if relative_error is not None and not (known := _is_known(samples, relative_error)).all():
        unknown = [name for name, ok in zip(names, known, strict=True) if not ok]
        warnings.warn(
            f"not known to a relative error of {relative_error} after {len(samples)} estimates:"
            f" {', '.join(unknown)}.",
            stacklevel=3,
        )
    return samples


def _error(samples: list[np.ndarray]) -> np.ndarray:
    return np.std(samples, axis=0, ddof=1) / len(samples) ** 0.5


def _is_known(samples: list[np.ndarray], relative_error: float) -> np.ndarray:
    if len(samples) < 2:
        return np.zeros(samples[0].shape, bool)
    return _error(samples) <= relative_error * np.abs(np.mean(samples, axis=0))


def _compiled_once(
    estimator: Estimator, params: PyTree, layers: Layers
) -> Callable[[jax.Array, dict[str, Any]], LayerCurvature]:
    """The estimate as a function of a key and arguments: arrays are traced, functions static."""

    @functools.partial(jax.jit, static_argnums=3)
    def compiled(key: jax.Array, params: PyTree, traced: Any, fixed: Any) -> LayerCurvature:
        return estimator.estimate(key, params, layers, **traced, **dict(fixed))

    def estimate(key: jax.Array, arguments: dict[str, Any]) -> LayerCurvature:
        traced = {name: x for name, x in arguments.items() if _is_traced(x)}
        fixed = tuple((name, x) for name, x in arguments.items() if name not in traced)
        return compiled(key, params, traced, fixed)

    return estimate


def _is_traced(argument: Any) -> bool:
    kinds = jax.Array | np.ndarray | np.number | int | float
    return all(isinstance(leaf, kinds) for leaf in jax.tree.leaves(argument))


def _with_progress(items: Iterable[Any], total: int | None) -> Iterable[Any]:
    """With a bar where tqdm is installed and a person looks."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, total=total, desc="curvature", disable=None, leave=False)
