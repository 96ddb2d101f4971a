"""The exact trace of every layer's Gauss-Newton block, by one backward pass for each output.

Of a network z = f(theta) with loss l(z) the Hessian is

    H = J^T (d^2 l / dz^2) J + sum_i (dl / dz_i) (d^2 z_i / dtheta^2),      J = dz / dtheta,

and the first term is the Gauss-Newton matrix.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lama_optax._checks import check_count
from lama_optax._jaxpr.channels_last import channels_last
from lama_optax._jaxpr.interpret import names_in
from lama_optax._jaxpr.weights.evaluate import evaluate
from lama_optax._jaxpr.weights.perturbed import Perturbed, Taps, UsedAgain
from lama_optax.curvature.protocol import LayerCurvature, check_batch, of_each_device
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
        **extra_args: Any,
    ) -> LayerCurvature:
        """The mean over examples of ``trace(J_l^T (d^2 l / dz^2) J_l)``, over N_l."""
        del key, extra_args
        if example_output_fn is None or output_loss_fn is None or batch is None:
            raise ValueError(
                "example_output_fn, output_loss_fn and batch are needed by gauss_newton:"
                " tx.update(grads, state, params, example_output_fn=lambda p, example: outputs of"
                " one example, output_loss_fn=lambda outputs, example: its loss, batch=batch),"
                " where the arrays of batch have the examples along their leading axis."
            )
        batch_size = check_batch(batch)
        network = _Network(example_output_fn, params, batch, layers)
        count = math.prod(network.shape)
        if count > self.max_outputs:
            raise ValueError(
                f"example_output_fn must return at most max_outputs={self.max_outputs} numbers, as"
                f" each costs a backward pass; got shape {network.shape}. flipout() needs none."
            )

        def output_hessian(z: jax.Array, example: PyTree) -> jax.Array:
            def loss(z: jax.Array) -> jax.Array:
                assert output_loss_fn is not None
                value = output_loss_fn(z.reshape(network.shape), example)
                if jnp.shape(value) != ():
                    raise ValueError(
                        "output_loss_fn must return a scalar, the loss of one example; got shape"
                        f" {jnp.shape(value)}."
                    )
                return value

            return jax.hessian(loss)(z)

        def traces(example: PyTree) -> jax.Array:
            outputs = functools.partial(network, example=example)
            z, pull_back, rows = jax.vjp(outputs, network.moves(), has_aux=True)
            (jacobian,) = jax.vmap(pull_back)(of_each_device(jnp.eye(count, dtype=z.dtype), z))
            return network.by_layer(jacobian, rows, output_hessian(z, example))

        of_example = channels_last(traces, network.primitives)
        chunk = max(1, _MAX_ENTRIES // (count * network.entries + 1))
        if chunk >= batch_size:
            of_examples = jax.vmap(of_example)(batch)
        else:
            of_examples = jax.lax.map(of_example, batch, batch_size=chunk)
        trace = jnp.mean(of_examples, axis=0)
        return LayerCurvature.from_trace(layers, trace, jnp.zeros_like(trace))


class _Network:
    """One example's outputs as a function of a move for each leaf, at the moves 0.

    Where a leaf's one use is a product with rows p, the move is added to the product's outputs: the
    derivative by the weight, p^T delta, is never formed where there are fewer rows than inputs.
    Any other leaf moves itself.
    """

    def __init__(
        self,
        output_fn: Callable[[PyTree, PyTree], jax.Array],
        params: PyTree,
        batch: PyTree,
        layers: Layers,
    ):
        example = jax.tree.map(lambda x: x[0], batch)
        self._layers = layers
        out = jax.eval_shape(output_fn, params, example)
        if not hasattr(out, "shape") or not jnp.issubdtype(out.dtype, jnp.floating):
            raise ValueError(f"example_output_fn must return one real array; got {out}.")
        self.shape = out.shape
        self._outputs = output_fn(params, example)
        params = of_each_device(params, self._outputs)
        self._leaves, self._structure = jax.tree.flatten(params)
        self._jaxpr = jax.make_jaxpr(output_fn)(params, example)
        self.primitives = names_in(self._jaxpr)
        # A stacked leaf holds several layers.
        tapped = {i for i, depth in enumerate(layers.leaf_depth) if depth is None}
        self._shapes: dict[int, tuple[int, int]] = dict.fromkeys(tapped, (0, 0))
        while True:
            taps = Taps({})
            try:
                jax.eval_shape(lambda e, taps=taps: self._evaluated({}, taps, e), example)
            except UsedAgain as use:
                del self._shapes[use.leaf]
            else:
                # A leaf that no output depends on moves itself, and nothing.
                self._shapes = {i: taps.shapes[i] for i in self._shapes if i in taps.shapes}
                break

    def moves(self) -> dict[int, jax.Array]:
        """Of each leaf, zeros."""
        zeros = {
            i: jnp.zeros(self._shapes.get(i, leaf.shape), leaf.dtype)
            for i, leaf in enumerate(self._leaves)
        }
        return of_each_device(zeros, self._outputs)

    @property
    def entries(self) -> int:
        """Of all moves."""
        return sum(
            math.prod(self._shapes.get(i, leaf.shape)) for i, leaf in enumerate(self._leaves)
        )

    def __call__(
        self, moves: dict[int, jax.Array], example: PyTree
    ) -> tuple[jax.Array, dict[int, jax.Array]]:
        """The outputs, flat, and the rows p of each leaf that is used in a product."""
        taps = Taps({i: moves[i] for i in self._shapes})
        return self._evaluated(moves, taps, example), taps.rows

    def _evaluated(self, moves: dict[int, jax.Array], taps: Taps, example: PyTree) -> jax.Array:
        args: list[jax.Array | Perturbed] = []
        for i, leaf in enumerate(self._leaves):
            if i in self._shapes:
                unit = jnp.ones((), leaf.dtype)
                args.append(Perturbed(i, leaf, leaf, unit, (), taps))
            else:
                args.append(leaf + moves[i] if i in moves else leaf)
        return evaluate(self._jaxpr, [*args, *jax.tree.leaves(example)])[0].reshape(-1)

    def by_layer(
        self, jacobian: dict[int, jax.Array], rows: dict[int, jax.Array], hessian: jax.Array
    ) -> jax.Array:
        """``sum_ij hessian_ij <J_i, J_j>`` of every layer; the Jacobian by the moves, (C, ...)."""
        dtype = self._layers.dtype
        hessian = hessian.astype(dtype)
        found = []
        for i in range(len(self._leaves)):
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
    a CNN of ten classes, 0.8 for the paper's network (``python -m benchmarks.traces``). The
    standard error is 0.

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
