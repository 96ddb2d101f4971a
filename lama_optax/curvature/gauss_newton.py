"""The exact trace of every layer's Gauss-Newton block, by one backward pass for each output.

Of a network z = f(theta) with loss l(z) the Hessian is

    H = J^T S J + sum_i (dl / dz_i) (d^2 z_i / dtheta^2),      J = dz / dtheta,  S = d^2 l / dz^2,

and the first term is the Gauss-Newton matrix.
"""

import dataclasses
import math
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lama_optax._checks import check_count
from lama_optax._jaxpr.channels_last import channels_last
from lama_optax._jaxpr.interpret import names_in
from lama_optax._jaxpr.weights import Record, Value, Weight, evaluate
from lama_optax.curvature.examples import check_mean, trace_checked
from lama_optax.curvature.probes import laid_out
from lama_optax.curvature.protocol import (
    LayerCurvature,
    check_batch,
    check_visible,
    of_each_device,
)
from lama_optax.layers import Layers

PyTree = Any
# Of the Jacobians of all examples, so many entries are held at once.
_MAX_ENTRIES = 2**24


@dataclasses.dataclass(frozen=True)
class _GaussNewton:
    """Settings of `gauss_newton`."""

    max_outputs: int

    def estimate(
        self,
        key: jax.Array,
        params: PyTree,
        layers: Layers,
        /,
        *,
        example_output_fn: Callable[[PyTree, PyTree], jax.Array] | None = None,
        output_loss_fn: Callable[[jax.Array, PyTree], jax.Array] | None = None,
        batch: PyTree = None,
        value_fn: Callable[[PyTree], Any] | None = None,
        **extra_args: Any,
    ) -> LayerCurvature:
        """The mean over examples of ``trace(J_l^T S J_l)``, over N_l."""
        del key, extra_args
        if example_output_fn is None or output_loss_fn is None or batch is None:
            raise ValueError(
                "example_output_fn, output_loss_fn and batch are needed by gauss_newton:"
                " tx.update(grads, state, params, example_output_fn=lambda p, example: outputs of"
                " one example, output_loss_fn=lambda outputs, example: its loss, batch=batch),"
                " where the arrays of batch have the examples along their leading axis. Flax's own"
                " TrainState passes none on: take lama_optax.flax.TrainState."
            )
        batch_size = check_batch(batch)
        check_visible("example_output_fn", params)

        def checked(p: PyTree, example: PyTree) -> jax.Array:
            out = example_output_fn(p, example)
            if not hasattr(out, "shape") or not jnp.issubdtype(out.dtype, jnp.floating):
                raise ValueError(f"example_output_fn must return one real array; got {out}.")
            return jnp.asarray(out)

        closed = trace_checked("example_output_fn", checked, params, batch)
        shape = closed.out_avals[0].shape
        count = math.prod(shape)
        if count > self.max_outputs:
            raise ValueError(
                f"example_output_fn must return at most max_outputs={self.max_outputs} numbers, as"
                f" each costs a backward pass; got shape {shape}. flipout() needs none."
            )
        rows = _rows(closed, params, batch, layers)
        shapes = [rows.get(i, leaf.shape) for i, leaf in enumerate(jax.tree.leaves(params))]

        def of_example(params: PyTree, example: PyTree) -> tuple[jax.Array, jax.Array]:
            def loss(z: jax.Array) -> jax.Array:
                value = output_loss_fn(z.reshape(shape), example)
                if jnp.shape(value) != ():
                    raise ValueError(
                        "output_loss_fn must return a scalar, the loss of one example; got shape"
                        f" {jnp.shape(value)}."
                    )
                return value

            def outputs(moves: list[jax.Array]) -> jax.Array:
                record = Record(moves={i: moves[i] for i in rows})
                return _evaluated(closed, params, example, record, rows, moves).reshape(-1)

            leaves = jax.tree.leaves(params)
            zeros = [jnp.zeros(s, p.dtype) for s, p in zip(shapes, leaves, strict=True)]
            zeros = of_each_device(zeros, (params, example, closed.consts))
            z, pull_back = jax.vjp(outputs, zeros)
            identity = of_each_device(jnp.eye(count, dtype=z.dtype), z)
            sharding = jax.typeof(z).sharding
            (jacobian,) = jax.vmap(lambda row: pull_back(laid_out(row, sharding)))(identity)
            hessian = jax.hessian(loss)(z).astype(layers.dtype)
            diagonal = []
            for by_leaf in jacobian:
                j = by_leaf.astype(layers.dtype)
                diagonal.append(jnp.sum(j * jnp.tensordot(hessian, j, 1), axis=0))
            return layers.sum(diagonal), loss(z)

        per_example = channels_last(of_example, names_in(closed))
        chunk = max(1, _MAX_ENTRIES // (count * sum(map(math.prod, shapes)) + 1))
        if chunk >= batch_size:
            traces, losses = jax.vmap(per_example, (None, 0))(params, batch)
        else:
            traces, losses = jax.lax.map(
                lambda example: per_example(params, example), batch, batch_size=chunk
            )
        mean = jnp.mean(losses.astype(layers.dtype))
        is_same = check_mean("example_output_fn", mean, value_fn, params, closed)
        trace = is_same * jnp.mean(traces, axis=0)
        return LayerCurvature.from_trace(layers, trace, jnp.zeros_like(trace))


def _rows(closed: Any, params: PyTree, batch: PyTree, layers: Layers) -> dict[int, tuple[int, ...]]:
    """The leaves whose one use is a product with one row h, each with its outputs' shape.

    The derivative by such a weight is the outer product of h and the derivative by the outputs: its
    norm is |h| times the latter's, and it need not be formed.
    """
    whole = {i for i, depth in enumerate(layers.leaf_depth) if depth is None}
    found = Record()

    def find(params: PyTree, example: PyTree) -> jax.Array:
        return _evaluated(closed, params, example, found, whole, jax.tree.leaves(params))

    jax.eval_shape(jax.vmap(find, (None, 0)), params, batch)
    return {i: shape for i, shape in found.rows.items() if found.uses[i] == 1}


def _evaluated(
    closed: Any,
    params: PyTree,
    example: PyTree,
    record: Record,
    followed: Container[int],
    moves: Sequence[jax.Array],
) -> jax.Array:
    """The outputs, where each leaf is followed to its use or moved itself."""
    args: list[Value] = []
    for i, leaf in enumerate(jax.tree.leaves(params)):
        if i in followed:
            args.append(Weight(i, leaf, leaf, jnp.zeros((), leaf.dtype), {}, record))
        else:
            args.append(leaf + moves[i])
    return evaluate(closed, [*args, *jax.tree.leaves(example)])[0]


def gauss_newton(*, max_outputs: int = 256) -> _GaussNewton:
    r"""The trace of each layer's Gauss-Newton block, exactly: no probes, no variance.

    .. math::
      H_l = \frac{1}{N_l B} \sum_{b=1}^{B} \operatorname{tr}\left(
        J_{bl}^\top\, \nabla^2_z \ell_b\, J_{bl} \right),
      \qquad J_{bl} = \frac{\partial z_b}{\partial \theta_l},
      \qquad L = \frac{1}{B} \sum_{b=1}^{B} \ell_b(z_b(\theta))

    It is the trace of the Hessian's block where every output z is piecewise linear in each single
    parameter: dense layers, convolutions, biases and embeddings with ReLU and max- or mean-pooling,
    each weight used once. In other networks it leaves out the terms
    :math:`\partial_z \ell \cdot \nabla^2_\theta z`, and is then not the Hessian's; with a convex
    loss it is never negative, and for cross-entropy it is the Fisher matrix's.

    It costs a forward pass and a backward pass for each output. The derivative by a weight is
    formed, for one example after the other where they are large together; but not where the weight
    is used once, in a product with one row of activations, as in a multilayer perceptron: there
    only its norm is. The standard error is 0.

    BatchNorm in training mode has no outputs of one example. It is refused, and where ``value_fn``
    is given too the losses are compared, as in `flipout`.

    Args:
      max_outputs: the largest number of outputs of one example that is accepted; static.

    Returns:
      An estimator that needs three arguments by keyword, ``example_output_fn(params, example)``,
      the network's outputs for one example, one array; ``output_loss_fn(outputs, example)``, their
      scalar loss; and ``batch``, a pytree of arrays with the examples along the leading axis.

    Raises:
      ValueError: at an estimate, if ``example_output_fn``, ``output_loss_fn`` or ``batch`` is
        missing, or an example has more outputs than ``max_outputs``.

    References:
      Schraudolph, `Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent
      <https://doi.org/10.1162/08997660260028683>`_, 2002; Dangel, Kunstner and Hennig, `BackPACK
      <https://arxiv.org/abs/1912.10985>`_, 2020, for the diagonal in one pass

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from lama_optax import gauss_newton, layer_curvature
      >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
      >>> def example_output_fn(params, x):
      ...     return x @ params["dense"]["kernel"] + params["dense"]["bias"]
      >>> estimate = layer_curvature(
      ...     params,
      ...     0,
      ...     estimator=gauss_newton(),
      ...     example_output_fn=example_output_fn,
      ...     output_loss_fn=lambda z, x: jnp.sum(z**2),
      ...     batch=jnp.ones((4, 3)),
      ... )
      >>> estimate.mean.tolist(), estimate.std_error.tolist()
      ([2.0], [0.0])
    """
    check_count("max_outputs", max_outputs)
    return _GaussNewton(max_outputs)
