"""The exact trace of every layer's Gauss-Newton block, by one backward pass for each output.

Of a network z = f(theta) with loss l(z) the Hessian is

    H = J^T (d^2 l / dz^2) J + sum_i (dl / dz_i) (d^2 z_i / dtheta^2),      J = dz / dtheta,

and the first term is the Gauss-Newton matrix.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lama_optax._checks import check_count
from lama_optax._jaxpr.channels_last import channels_last
from lama_optax._jaxpr.interpret import names_in
from lama_optax._jaxpr.weights.follow import Value, evaluate
from lama_optax._jaxpr.weights.taps import Tapped, Taps
from lama_optax.curvature.examples import check_mean, trace_checked
from lama_optax.curvature.probes import laid_out
from lama_optax.curvature.protocol import (
    LayerCurvature,
    check_batch,
    check_visible,
    of_each_device,
)
from lama_optax.layers import Layers, LayerSpec, resolve_layers

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
        """The mean over examples of ``trace(J_l^T (d^2 l / dz^2) J_l)``, over N_l."""
        del key, extra_args
        network = _Network(example_output_fn, output_loss_fn, params, batch, layers)
        count = math.prod(network.shape)
        if count > self.max_outputs:
            raise ValueError(
                f"example_output_fn must return at most max_outputs={self.max_outputs} numbers, as"
                f" each costs a backward pass; got shape {network.shape}. flipout() needs none."
            )

        def of_example(params: PyTree, example: PyTree) -> tuple[jax.Array, jax.Array]:
            def loss(z: jax.Array) -> jax.Array:
                return network.loss(z, example)

            def outputs(moves: dict[int, jax.Array]) -> Any:
                return network(moves, params, example)

            z, pull_back, rows = jax.vjp(outputs, network.moves(params, example), has_aux=True)
            identity = of_each_device(jnp.eye(count, dtype=z.dtype), z)
            sharding = jax.typeof(z).sharding
            (jacobian,) = jax.vmap(lambda row: pull_back(laid_out(row, sharding)))(identity)
            return network.by_layer(jacobian, rows, jax.hessian(loss)(z)), loss(z)

        per_example = channels_last(of_example, network.primitives)
        chunk = max(1, _MAX_ENTRIES // (count * network.entries + 1))
        if chunk >= check_batch(batch):
            traces, losses = jax.vmap(per_example, (None, 0))(params, batch)
        else:
            traces, losses = jax.lax.map(
                lambda example: per_example(params, example), batch, batch_size=chunk
            )
        is_same = check_mean(
            "example_output_fn",
            jnp.mean(losses.astype(layers.dtype)),
            value_fn,
            params,
            network.closed,
        )
        trace = is_same * jnp.mean(traces, axis=0)
        return LayerCurvature.from_trace(layers, trace, jnp.zeros_like(trace))

    def explain(
        self,
        params: PyTree,
        *,
        layers: LayerSpec = "module",
        example_output_fn: Callable[[PyTree, PyTree], jax.Array] | None = None,
        output_loss_fn: Callable[[jax.Array, PyTree], jax.Array] | None = None,
        batch: PyTree = None,
        **extra_args: Any,
    ) -> dict[str, dict[str, Any]]:
        """Says how `estimate` would take each layer's derivatives, without computing anything.

        Args:
          params: as for `layer_curvature`; shapes (`jax.ShapeDtypeStruct`) are enough.
          layers: as for `layer_curvature`.
          example_output_fn: as for the estimate.
          output_loss_fn: as for the estimate.
          batch: as for the estimate; shapes are enough.
          **extra_args: ignored.

        Returns:
          name of the layer -> ``{"path": ..., "why": [...]}``. The path is ``"rows"`` where no
          derivative by a weight is formed, else ``"jacobian"``; "why" lists the leaves whose
          derivatives are formed, each with the use that asked for it.
        """
        del extra_args
        partition = resolve_layers(layers, params)
        network = _Network(example_output_fn, output_loss_fn, params, batch, partition)
        report: dict[str, dict[str, Any]] = {}
        for layer, name in enumerate(partition.names):
            why = network.formed(layer)
            report[name] = {"path": "jacobian" if why else "rows", "why": why}
        return report


class _Network:
    """One example's outputs as a function of a move for each leaf, at the moves 0.

    Where a leaf's one use is a product with rows p, the move is added to the product's outputs: the
    derivative by the weight, p^T delta, is never formed where there are fewer rows than inputs.
    Any other leaf moves itself.
    """

    def __init__(
        self,
        output_fn: Callable[[PyTree, PyTree], jax.Array] | None,
        loss_fn: Callable[[jax.Array, PyTree], jax.Array] | None,
        params: PyTree,
        batch: PyTree,
        layers: Layers,
    ):
        """Traces the outputs once and finds, on shapes alone, how each leaf is used."""
        if output_fn is None or loss_fn is None or batch is None:
            raise ValueError(
                "example_output_fn, output_loss_fn and batch are needed by gauss_newton:"
                " tx.update(grads, state, params, example_output_fn=lambda p, example: outputs of"
                " one example, output_loss_fn=lambda outputs, example: its loss, batch=batch),"
                " where the arrays of batch have the examples along their leading axis."
            )
        check_batch(batch)
        check_visible("example_output_fn", params)

        def checked(p: PyTree, example: PyTree) -> jax.Array:
            out = output_fn(p, example)
            if not hasattr(out, "shape") or not jnp.issubdtype(out.dtype, jnp.floating):
                raise ValueError(f"example_output_fn must return one real array; got {out}.")
            return jnp.asarray(out)

        self._layers, self._loss_fn = layers, loss_fn
        self.closed = trace_checked("example_output_fn", checked, params, batch)
        self.primitives = names_in(self.closed)
        self.shape = self.closed.out_avals[0].shape
        paths_and_leaves, self._structure = jax.tree_util.tree_flatten_with_path(params)
        self._names = [jax.tree_util.keystr(path) for path, _ in paths_and_leaves]
        self._sizes = [math.prod(leaf.shape) for _, leaf in paths_and_leaves]
        # A stacked leaf holds several layers.
        self._shapes: dict[int, tuple[int, int]] = {
            i: (0, 0) for i, depth in enumerate(layers.leaf_depth) if depth is None
        }
        found = Taps({})

        def find(params: PyTree, example: PyTree) -> jax.Array:
            return self._evaluated({}, params, example, found)

        jax.eval_shape(jax.vmap(find, (None, 0)), params, batch)
        self._lost = found.lost
        self._shapes = {i: shape for i, shape in found.shapes.items() if i not in found.lost}

    @property
    def entries(self) -> int:
        """Of all moves."""
        return sum(math.prod(self._shapes.get(i, (size,))) for i, size in enumerate(self._sizes))

    def formed(self, layer: int) -> list[str]:
        """The leaves of a layer whose derivatives are formed, and why."""
        leaves = zip(self._names, self._layers.leaf_layer, self._layers.leaf_depth, strict=True)
        return [
            f"{name}: {self._lost.get(i, 'it has no use' if depth is None else 'it is stacked')}"
            for i, (name, first, depth) in enumerate(leaves)
            if first <= layer < first + (depth or 1) and i not in self._shapes
        ]

    def loss(self, z: jax.Array, example: PyTree) -> jax.Array:
        """The loss of one example's outputs, which are flat."""
        value = self._loss_fn(z.reshape(self.shape), example)
        if jnp.shape(value) != ():
            raise ValueError(
                "output_loss_fn must return a scalar, the loss of one example; got shape"
                f" {jnp.shape(value)}."
            )
        return value

    def moves(self, params: PyTree, example: PyTree) -> dict[int, jax.Array]:
        """Of each leaf, zeros."""
        zeros = {
            i: jnp.zeros(self._shapes.get(i, leaf.shape), leaf.dtype)
            for i, leaf in enumerate(jax.tree.leaves(params))
        }
        return of_each_device(zeros, (params, example, self.closed.consts))

    def __call__(
        self, moves: dict[int, jax.Array], params: PyTree, example: PyTree
    ) -> tuple[jax.Array, dict[int, jax.Array]]:
        """The outputs, flat, and the rows p of each leaf that is used in a product."""
        taps = Taps({i: moves[i] for i in self._shapes})
        return self._evaluated(moves, params, example, taps), taps.rows

    def _evaluated(
        self, moves: dict[int, jax.Array], params: PyTree, example: PyTree, taps: Taps
    ) -> jax.Array:
        args: list[Value] = []
        for i, leaf in enumerate(jax.tree.leaves(params)):
            if i in self._shapes:
                args.append(Tapped(i, leaf, taps))
            else:
                args.append(leaf + moves[i] if i in moves else leaf)
        return evaluate(self.closed, [*args, *jax.tree.leaves(example)])[0].reshape(-1)

    def by_layer(
        self, jacobian: dict[int, jax.Array], rows: dict[int, jax.Array], hessian: jax.Array
    ) -> jax.Array:
        """``sum_ij hessian_ij <J_i, J_j>`` of every layer; the Jacobian by the moves, (C, ...)."""
        dtype = self._layers.dtype
        hessian = hessian.astype(dtype)
        found = []
        for i in range(len(self._names)):
            j = jacobian[i].astype(dtype)
            weighted = jnp.tensordot(hessian, j, 1)
            if i in rows:
                p = rows[i].astype(dtype)
                if p.shape[0] <= p.shape[1]:
                    weighted = jnp.einsum("pq,cqo->cpo", p @ p.T, weighted)
                else:
                    j, weighted = (jnp.einsum("pk,cpo->cko", p, x) for x in (j, weighted))
                found.append(jnp.sum(j * weighted))
            else:
                found.append(jnp.sum(j * weighted, axis=0))
        return self._layers.sum(jax.tree.unflatten(self._structure, found))


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

    It costs a forward pass and a backward pass for each output, but forms no derivative by a weight
    where an example meets it in fewer rows than it has inputs: 2.3 gradients for an MLP and 12 for
    a CNN of ten classes, 0.8 for the paper's network (``python -m benchmarks.traces``). Other uses
    of a weight form the derivative; ``gauss_newton().explain(params, ...)`` says which. The
    standard error is 0.

    BatchNorm in training mode has no outputs of one example. It is refused, and where ``value_fn``
    is given too the losses are compared, as in `flipout`.

    Args:
      max_outputs: the largest number of outputs of one example that is accepted; static.

    Returns:
      An estimator that needs three arguments by keyword: ``example_output_fn(params, example)``,
      the network's outputs for one example, one array; ``output_loss_fn(outputs, example)``, their
      scalar loss; and ``batch``, a pytree of arrays with the examples along the leading axis.

    Raises:
      ValueError: naming the argument, its value and what is allowed.

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
