"""What an estimator is, what it returns, and what it checks of its arguments."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from lama_optax._jaxpr.collectives import holds_collective
from lama_optax._jaxpr.interpret import names_in
from lama_optax.layers import Layers, is_masked

PyTree = Any


class LayerCurvature(NamedTuple):
    """Each layer's average curvature ``trace(H_l) / N_l`` (Eq. 8) and how well it is known."""

    mean: jax.Array  #: shape=(L,), float32 (float64 where a parameter is); trace = mean * size
    std_error: jax.Array  #: shape=(L,), same dtype; one standard error of `mean`, NaN if unknown
    size: jax.Array  #: shape=(L,); number of parameters N_l, int32 (`mean.dtype` from 2^31 on)

    @classmethod
    def from_trace(
        cls, layers: Layers, trace: jax.Array, std_error: jax.Array | None
    ) -> "LayerCurvature":
        """From each layer's trace, shape (L,), and the trace's standard error, None if unknown."""
        mean = layers.average(trace)
        # From numpy: `jax.debug_nans` looks for NaN in what JAX computes, `jnp.asarray` too.
        unknown = jax.device_put(np.full(mean.shape, np.nan, mean.dtype))
        dtype = np.int32 if max(layers.sizes, default=0) < 2**31 else layers.dtype
        size = jnp.asarray(np.asarray(layers.sizes, dtype))
        return cls(mean, unknown if std_error is None else layers.average(std_error), size)


@runtime_checkable
class Estimator(Protocol):
    """A record of static settings with one method; never itself callable, as a schedule is."""

    def estimate(
        self, key: jax.Array, params: PyTree, layers: Layers, /, **extra_args: Any
    ) -> LayerCurvature:
        """Estimates every layer's average curvature at ``params``.

        Args:
          key: PRNG key for this estimate alone.
          params: pytree of real floating-point arrays.
          layers: the partition of its leaves.
          **extra_args: what ``update`` was passed, and its ``updates``; an estimator names what it
            needs and ignores the rest.
        """
        ...


def check_estimator(estimator: Any) -> None:
    """Raises `ValueError` unless ``estimator`` is a record with an ``estimate`` method."""
    if isinstance(estimator, type) or not isinstance(estimator, Estimator):
        raise ValueError(
            "estimator must be a record with an `estimate` method, such as"
            f" hutchinson(num_probes=10); got {estimator!r}."
        )


def check_key(key: Any) -> None:
    """Raises `ValueError` unless ``key`` is a seed, raw key data or a typed key."""
    if isinstance(key, int | np.integer) and not -(2**31) <= key < 2**32:
        # Without 64 bits JAX drops those above: 2^32 would draw what 0 draws.
        raise ValueError(f"key must be a seed of 32 bits, in [-2^31, 2^32); got {key!r}.")
    if isinstance(key, int | np.integer | np.ndarray | jax.Array) and not isinstance(key, bool):
        dtype, shape = jnp.result_type(key), jnp.shape(key)
        is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key) or jnp.issubdtype(dtype, jnp.integer)
        if (shape == () and is_key) or (len(shape) == 1 and dtype == jnp.uint32):
            return
    raise ValueError(
        f"key must be an integer seed, one typed PRNG key or the raw data of one; got {key!r}."
    )


def as_typed_key(key: int | jax.Array) -> jax.Array:
    """A typed PRNG key from a seed, raw key data or a typed key."""
    check_key(key)
    if jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        return jnp.asarray(key)
    return jax.random.wrap_key_data(jnp.asarray(key)) if jnp.ndim(key) else jax.random.key(key)


def standard_error(samples: jax.Array) -> jax.Array | None:
    """Of the mean of independent samples (K, ...), shape (...); one sample has none."""
    num_samples = samples.shape[0]
    if num_samples == 1:
        return None
    return jnp.std(samples, axis=0, ddof=1) / jnp.sqrt(jnp.asarray(num_samples, samples.dtype))


def check_batch(batch: PyTree) -> int:
    """The number of examples along the leading axis of all arrays of ``batch``."""
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise ValueError(
            "batch must hold arrays with the same number of examples along their leading axis;"
            f" got shapes {[jnp.shape(x) for x in jax.tree.leaves(batch)]}."
        )
    return lengths.pop()[0]


def of_each_device(tree: PyTree, like: PyTree) -> PyTree:
    """``tree``, but no longer shared by the devices: JAX sums derivatives by what is over them."""
    typed = jax.dtypes.prng_key  # as of dropout, in which there is no number
    numbers = [x for x in jax.tree.leaves(like) if not jnp.issubdtype(x.dtype, typed)]
    zero = sum((jnp.zeros_like(jnp.sum(x), jnp.float32) for x in numbers), jnp.float32(0))
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def check_visible(name: str, params: PyTree) -> None:
    """Raises `ValueError` if a part of ``params`` is hidden, so that ``name`` cannot be called."""
    if any(is_masked(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_masked)):
        raise ValueError(
            f"{name} cannot be evaluated here: optax.masked or optax.partition has hidden a part"
            " of params (MaskedNode). Estimate on the whole params and pass the result, shaped like"
            " params, as curvature=: c = layer_curvature(params, key, estimator=hutchinson(),"
            " layers='leaf', value_fn=...); tx.update(grads, state, params,"
            " curvature=jax.tree.unflatten(jax.tree.structure(params), c.mean))."
        )


def operations_of_own_part(name: str, fn: Callable[..., Any], *args: PyTree) -> frozenset[str]:
    """The names of all operations in the function ``name`` of params and what follows."""
    check_visible(name, args[0])
    closed = jax.make_jaxpr(fn)(*args)
    if holds_collective(closed):
        raise ValueError(
            f"{name} holds a collective (a psum or all_gather over a mapped axis):"
            " its devices' draws could not be told apart. Let it return the losses of this"
            " device's part of the batch, or train under jax.jit with sharded arrays."
        )
    return names_in(closed)


def unreduced(name: str, out: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The losses and the weights that the function ``name`` returned, in ``dtype``."""
    losses, weights = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
    shape, is_array = jnp.shape(losses), jax.tree_util.all_leaves([losses])
    if not is_array or not shape or not jnp.issubdtype(jnp.result_type(losses), jnp.floating):
        raise ValueError(
            f"{name} must return the losses of all predictions, not reduced (without jnp.mean), or"
            f" (losses, weights); got {jax.tree.map(jnp.shape, out)}."
        )
    if weights is not None and jnp.shape(weights) != shape:
        raise ValueError(
            f"{name} must return weights of the losses' shape {shape}; got {jnp.shape(weights)}."
        )
    losses = jnp.asarray(losses, dtype)
    if weights is None:
        return losses, jnp.ones_like(losses)
    weights = jax.lax.stop_gradient(jnp.asarray(weights, dtype))
    weights = jnp.where(weights < 0, jnp.nan, weights)  # nothing is known of a negative one
    return jnp.where(weights > 0, losses, 0), weights  # padding may hold anything


def scalar_objective(
    value_fn: Callable[[PyTree], Any] | None,
    params: PyTree,
    has_aux: bool,
    name: str = "value_fn",
) -> Callable[[PyTree], jax.Array]:
    """``value_fn``, which users know by ``name``, checked and without its auxiliary output."""
    if value_fn is None:
        raise ValueError(
            "value_fn is missing: the curvature is estimated from it. Pass the loss as a function"
            " of params alone, for instance tx.update(grads, state, params,"
            " value_fn=lambda p: loss_fn(p, batch)), or pass curvature=... A wrapper that passes no"
            " extra arguments on (optax.lookahead, optax.contrib.sam) needs it bound:"
            " functools.partial(tx.update, value_fn=...). Flax's own TrainState passes none on:"
            " take lama_optax.flax.TrainState."
        )
    if not callable(value_fn):
        raise ValueError(f"value_fn must be a function of params; got {value_fn!r}.")
    check_visible("value_fn", params)

    def objective(p: PyTree) -> jax.Array:
        try:
            value = value_fn(p)
        except Exception as error:
            error.add_note(
                f"lama_optax: raised while {name} was evaluated on params of structure"
                f" {jax.tree.structure(p)} alone: bind what else it takes, value_fn=lambda p:"
                " loss_fn(p, batch). If a wrapper such as optax.flatten has reshaped params, leave"
                " it out: it hides the layers."
            )
            raise
        if has_aux and not (isinstance(value, tuple) and len(value) == 2):
            raise ValueError(
                f"value_fn must return (value, aux) with has_aux=True; got {type(value)}."
            )
        if isinstance(value, tuple) and not has_aux:
            remedy = "If that is (value, aux), return the value alone."
            if name == "value_fn":
                remedy = (
                    "If that is (value, aux), use has_aux=True, for instance"
                    " estimator=hutchinson(has_aux=True)."
                )
            raise ValueError(f"{name} must return a scalar; it returned a tuple. {remedy}")
        value = value[0] if has_aux else value
        found = f"{type(value)}"
        if jax.tree_util.all_leaves([value]):
            found = f"shape {jnp.shape(value)} and dtype {jnp.result_type(value)}"
            if jnp.shape(value) == () and jnp.issubdtype(jnp.result_type(value), jnp.floating):
                return jnp.asarray(value)
        raise ValueError(
            f"{name} must return a real floating-point scalar; got {found}. Reduce the loss, for"
            " instance with jnp.mean."
        )

    return objective


def primitive_names(objective: Callable[[PyTree], jax.Array], params: PyTree) -> frozenset[str]:
    """The names of all operations in ``objective``, found by one abstract evaluation."""
    return names_in(jax.make_jaxpr(objective)(params))


def has_custom_vjp(primitives: frozenset[str]) -> bool:
    """Whether there is a `jax.custom_vjp`, which has no forward derivative, among them."""
    return any(name.startswith("custom_vjp") for name in primitives)


def check_twice_differentiable(
    objective: Callable[[PyTree], jax.Array], params: PyTree, primitives: frozenset[str]
) -> None:
    """Raises `ValueError` where JAX would, far from here: a custom_vjp without a derivative."""
    if not has_custom_vjp(primitives):
        return

    def along_params(p: PyTree) -> PyTree:
        return jax.jvp(jax.grad(objective), (p,), (p,))[1]

    cause: Exception | None = None
    try:
        # What is left of a custom_vjp that was to be differentiated forwards.
        has_derivative = "custom_lin" not in names_in(jax.make_jaxpr(along_params)(params))
    except (TypeError, ValueError, NotImplementedError) as error:
        if "custom_vjp" not in str(error) and "JVP" not in str(error):
            raise
        has_derivative, cause = False, error
    if not has_derivative:
        raise ValueError(
            "value_fn holds an operation that cannot be differentiated twice (a jax.custom_vjp"
            " without a JVP). Use hutchinson(hvp='finite_difference') or fisher(), which need"
            " gradients alone, or pass a value_fn that does without the operation: for an ODE"
            " solver, one that differentiates through its steps instead of by an adjoint."
        ) from cause
