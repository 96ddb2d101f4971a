"""What estimators and trackers ask for, made from a model and a batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from lama_optax._checks import check_count, check_word, wide_dtype
from lama_optax.curvature.probes import signs
from lama_optax.curvature.protocol import check_batch, of_each_device

PyTree = Any
ApplyFn = Callable[[PyTree, PyTree], jax.Array]


def _softmax_root(outputs: jax.Array, e: jax.Array) -> jax.Array:
    p = jax.nn.softmax(outputs)
    scaled = jnp.sqrt(p) * e
    return scaled - p * jnp.sum(scaled, axis=-1, keepdims=True)


def _sigmoid_root(outputs: jax.Array, e: jax.Array) -> jax.Array:
    return jnp.sqrt(jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs)) * e


# Of each loss: the losses of outputs z and targets; and B e, where B B^T = d^2 l / dz^2.
_LOSSES: dict[str, tuple[Callable[..., jax.Array], Callable[..., jax.Array]]] = {
    "softmax_cross_entropy": (
        optax.losses.softmax_cross_entropy_with_integer_labels,
        _softmax_root,  # B B^T = diag(p) - p p^T
    ),
    "sigmoid_binary_cross_entropy": (
        lambda z, y: optax.losses.sigmoid_binary_cross_entropy(z, y.astype(z.dtype)),
        _sigmoid_root,
    ),
    "squared_error": (
        lambda z, y: jnp.square(z - y.astype(z.dtype)),
        lambda z, e: e * 2**0.5,
    ),
}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["batch"], meta_fields=["apply_fn", "loss"]
)
@dataclasses.dataclass(frozen=True)
class _Task:
    """A model and a batch; a pytree, so that one compilation serves all batches."""

    apply_fn: ApplyFn
    loss: str
    batch: dict[str, PyTree]  # "inputs" and "targets", and where there are any, "weights"

    # The names are those of `supervised`'s entries. They are ignored: optax's line searches refuse
    # an argument of `update` that value_fn does not take.
    def value(
        self,
        params: PyTree,
        *,
        losses_fn: Any = None,
        sampled_losses_fn: Any = None,
        example_value_fn: Any = None,
        batch: Any = None,
        example_output_fn: Any = None,
        output_loss_fn: Any = None,
    ) -> jax.Array:
        losses, weights = self._of_outputs(self._outputs(params), self.batch)
        if weights is None:
            return jnp.mean(losses)
        return jnp.sum(weights * losses) / jnp.sum(weights)

    def losses(self, params: PyTree) -> Any:
        losses, weights = self._of_outputs(self._outputs(params), self.batch)
        return losses if weights is None else (losses, weights)

    def sampled_losses(self, params: PyTree, key: jax.Array) -> Any:
        outputs = self._outputs(params)
        self._check(outputs, self.batch["targets"])
        fixed = jax.lax.stop_gradient(outputs).astype(wide_dtype(outputs))
        e = signs(key, fixed.shape, fixed.dtype, jax.typeof(fixed).sharding)
        gradient = _LOSSES[self.loss][1](fixed, e).astype(outputs.dtype)
        # What masks a class may make its output infinite.
        losses = gradient * jnp.where(gradient == 0, 0, outputs)
        if self.loss == "softmax_cross_entropy":
            losses = jnp.sum(losses, axis=-1)
        weights = self.batch.get("weights")
        return losses if weights is None else (losses, _expanded(weights, losses))

    def example_value(self, params: PyTree, example: PyTree) -> jax.Array:
        return self.output_loss(self.example_outputs(params, example), example)

    def example_outputs(self, params: PyTree, example: PyTree) -> jax.Array:
        return self._apply(params, jax.tree.map(lambda x: x[None], example["inputs"]))[0]

    def output_loss(self, outputs: jax.Array, example: PyTree) -> jax.Array:
        losses, weights = self._of_outputs(outputs, example)
        return jnp.mean(losses if weights is None else weights * losses)

    def _outputs(self, params: PyTree) -> jax.Array:
        return self._apply(params, self.batch["inputs"])

    def _apply(self, params: PyTree, inputs: PyTree) -> jax.Array:
        outputs = self.apply_fn(params, inputs)
        if not isinstance(outputs, jax.Array | np.ndarray):
            raise ValueError(
                f"apply_fn must return one array, the outputs; got {type(outputs).__name__}. Of the"
                " pair that a Flax model returns with mutable=..., take the first."
            )
        return outputs

    def _check(self, outputs: jax.Array, targets: jax.Array) -> None:
        expected = outputs.shape[:-1] if self.loss == "softmax_cross_entropy" else outputs.shape
        if jnp.shape(targets) != expected:
            raise ValueError(
                f"targets must have the shape {expected} for the loss {self.loss!r} of outputs of"
                f" shape {outputs.shape}; got {jnp.shape(targets)}."
            )

    def _of_outputs(self, outputs: jax.Array, batch: PyTree) -> tuple[jax.Array, jax.Array | None]:
        """The losses of predictions, and weights of their shape."""
        targets, weights = batch["targets"], batch.get("weights")
        self._check(outputs, targets)
        if weights is None:
            return _LOSSES[self.loss][0](outputs, targets), None
        # Padding may hold anything, such as the class -100, whose loss is NaN.
        if self.loss == "softmax_cross_entropy":
            wrong = (targets < 0) | (targets >= outputs.shape[-1])
        else:
            wrong = ~jnp.isfinite(targets)
        wrong &= _expanded(weights == 0, targets).astype(bool)
        losses = _LOSSES[self.loss][0](outputs, jnp.where(wrong, 0, targets))
        return losses, _expanded(weights, losses)


def _expanded(weights: jax.Array, losses: jax.Array) -> jax.Array:
    """Weights of the losses' leading axes, brought to their shape and dtype."""
    weights = weights.reshape(*weights.shape, *[1] * (losses.ndim - weights.ndim))
    return jnp.broadcast_to(weights.astype(losses.dtype), losses.shape)


def supervised(
    apply_fn: ApplyFn,
    inputs: PyTree,
    targets: jax.Array,
    *,
    loss: str = "softmax_cross_entropy",
    weights: jax.Array | None = None,
) -> dict[str, Any]:
    r"""Makes every argument that an estimator may ask for, from one model and one batch.

    The loss is the mean over predictions, :math:`L(\theta) = \sum_i w_i \ell(z_i(\theta), y_i) /
    \sum_i w_i`, with weights 1 unless others are given. A prediction is an entry of ``targets``; an
    example is a row, along the leading axis.

    ``sampled_losses_fn``, for `fisher`, returns :math:`b_i \cdot z_i(\theta)` with random
    :math:`b_i = B_i e_i`, where :math:`B_i B_i^\top = \nabla_z^2 \ell_i` and e holds signs: only
    their gradients mean anything. Gradients of losses with drawn targets have the same covariance,
    and more variance in their squares where predictions are sure. With probabilities p of classes,
    :math:`B e = u - p \sum_k u_k` where :math:`u_k = \sqrt{p_k} e_k`.

    Args:
      apply_fn: ``apply_fn(params, inputs) -> outputs``, such as
        ``lambda params, x: model.apply({"params": params}, x)``. Hand in the same function at every
        call: `jax.jit` compiles anew for another one.
      inputs: array, or a pytree of arrays, with n examples along the leading axis.
      targets: for ``"softmax_cross_entropy"`` integers of the outputs' shape without the last axis,
        (n,) or for sequences (n, t); for ``"sigmoid_binary_cross_entropy"`` numbers in [0, 1] and
        for ``"squared_error"``, :math:`(z - y)^2`, any, of the outputs' shape.
      loss: one of these three.
      weights: at least 0, of the targets' shape or of its leading axes: 0 for padding, whose
        targets may be anything.

    Returns:
      A dict for ``tx.update(grads, state, params, **task)``, ``layer_curvature(..., **task)`` and
      ``batches=``. Each entry is a plain function or array, which you may replace by your own:

      * ``value_fn(params)``: the loss, for the gradient and for `hutchinson` and `exact_trace`;
      * ``losses_fn(params)``: the losses of predictions, not reduced, or ``(losses, weights)``;
      * ``sampled_losses_fn(params, key)``: random losses of the same shapes, for `fisher`;
      * ``example_value_fn(params, example)`` and ``batch``, for `flipout`;
      * ``example_output_fn(params, example)`` and ``output_loss_fn(outputs, example)``, for
        `gauss_newton`.

    Raises:
      ValueError: if ``apply_fn`` is no function, ``loss`` none of the three, or ``targets`` or
        ``weights`` have not the shape or dtype that it asks for.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from lama_optax import exact_trace, gauss_newton, layer_curvature, supervised
      >>> apply_fn = lambda params, x: x @ params["w"]
      >>> x, y = jax.random.normal(jax.random.key(0), (8, 2)), jnp.arange(8) % 3
      >>> task = supervised(apply_fn, x, y, loss="softmax_cross_entropy")
      >>> params = {"w": jnp.zeros((2, 3))}
      >>> for estimator in (exact_trace(), gauss_newton()):
      ...     estimate = layer_curvature(params, 0, estimator=estimator, **task)
      ...     print(round(float(estimate.mean[0]), 4))
      0.3108
      0.3108
    """
    if not callable(apply_fn):
        raise ValueError(
            f"apply_fn must be a function (params, inputs) -> outputs; got {apply_fn!r}."
        )
    check_word("loss", loss, tuple(_LOSSES))
    dtype, shape = jnp.result_type(targets), jnp.shape(targets)
    if loss == "softmax_cross_entropy" and not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            "targets must be integers, the classes' numbers, for the loss 'softmax_cross_entropy';"
            f" got {dtype} of shape {shape}."
        )
    batch = {"inputs": inputs, "targets": jnp.asarray(targets)}
    by_example = batch
    if weights is not None:
        weights = jnp.asarray(weights)
        if weights.ndim == 0 or weights.shape != shape[: weights.ndim]:
            raise ValueError(
                f"weights must have the shape of targets, {shape}, or of its leading axes; got"
                f" {weights.shape}."
            )
        if not jnp.issubdtype(weights.dtype, jnp.floating):
            weights = weights.astype(jnp.float32)  # a mask
        # An example's loss is the product, whose mean over the examples is the value.
        by_example = batch | {"weights": weights / jnp.mean(weights)}
        batch = batch | {"weights": weights}
    check_batch(batch)
    task, model = _Task(apply_fn, loss, batch), _Task(apply_fn, loss, {})
    return {
        "value_fn": Partial(_Task.value, task),
        "losses_fn": Partial(_Task.losses, task),
        "sampled_losses_fn": Partial(_Task.sampled_losses, task),
        "example_value_fn": Partial(_Task.example_value, model),
        "batch": by_example,
        "example_output_fn": Partial(_Task.example_outputs, model),
        "output_loss_fn": Partial(_Task.output_loss, model),
    }


def mean_value_fn(
    loss_fn: Callable[[PyTree, PyTree], jax.Array], micro_batches: PyTree
) -> Callable[[PyTree], jax.Array]:
    r"""The mean loss over micro-batches as a function of params, in the memory of one of them.

    .. math::
      L(\theta) = \frac{1}{n} \sum_{i=1}^{n} \mathrm{loss}(\theta, B_i)

    This is the way to accumulate gradients: its gradient is the accumulated one, and a curvature
    estimated from it that of all micro-batches. `optax.MultiSteps` would estimate at each of them.

    Args:
      loss_fn: ``loss_fn(params, micro_batch) -> scalar``, a mean over equally many examples.
      micro_batches: pytree of arrays with a leading axis of n micro-batches.

    Returns:
      ``value_fn``, a function of params alone. Each micro-batch is evaluated in turn and again
      during differentiation (`jax.checkpoint`).

    Raises:
      ValueError: if ``micro_batches`` holds no array, or ``loss_fn`` returns more than the loss.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from lama_optax import mean_value_fn
      >>> loss_fn = lambda params, x: jnp.mean((params["w"] - x) ** 2)
      >>> value_fn = mean_value_fn(loss_fn, jnp.arange(8.0).reshape(4, 2))
      >>> jax.grad(value_fn)({"w": jnp.zeros(())})["w"].tolist()
      -7.0
    """
    if not jax.tree.leaves(micro_batches):
        raise ValueError(f"micro_batches must hold at least one array; got {micro_batches!r}.")

    def value_fn(params: PyTree) -> jax.Array:
        losses = jax.lax.map(jax.checkpoint(lambda b: loss_fn(params, b)), micro_batches)
        if isinstance(losses, tuple):
            raise ValueError("loss_fn must return the loss alone; got a tuple: leave aux out.")
        return jnp.mean(losses)

    return value_fn


def grouped_value_and_grad(
    loss_fn: Callable[..., Any], num_groups: int, *, has_aux: bool = False
) -> Callable[[PyTree, PyTree], tuple[Any, PyTree, PyTree]]:
    r"""The batch's loss and gradient, and the gradients of groups of its examples on the way.

    .. math::
      g_k = \nabla_\theta\, \mathrm{loss}(\theta, B_k), \qquad
      \bar g = \frac{1}{G} \sum_{k=1}^{G} g_k

    It does the arithmetic of the whole batch's gradient in G smaller parts (a step took 1.18 times
    as long in ``python -m benchmarks.noise_scale``), in the memory of G gradients.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``, a mean over the batch's examples.
      num_groups: G, at least 2 (1 where devices are the groups). With explicit mesh
        axes along the batch, a multiple of their devices.
      has_aux: whether it returns ``(scalar, aux)``.

    Returns:
      ``fn(params, batch) -> (value, grads, group_gradients)``: the means over the groups, and their
      gradients with a leading axis of G. The batch's arrays have the examples, in random order,
      along the leading axis; consecutive ones are a group. With ``has_aux`` value is
      ``(value, aux)``, aux with a leading axis of G. Inside `jax.shard_map` all are this device's
      own: average value and grads over the devices before the update.

    Raises:
      ValueError: for an argument that is not allowed, or a batch that does not divide.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from lama_optax import grouped_value_and_grad, track_noise_scale
      >>> loss_fn = lambda params, x: jnp.mean((params["w"] - x) ** 2)
      >>> params, batch = {"w": jnp.zeros(())}, jnp.arange(8.0)
      >>> value, grads, groups = grouped_value_and_grad(loss_fn, 4)(params, batch)
      >>> float(grads["w"]), groups["w"].tolist()
      (-7.0, [-1.0, -5.0, -9.0, -13.0])
      >>> arguments = {"group_gradients": groups, "batch_size": 8}
      >>> tx = track_noise_scale()
      >>> updates, state = tx.update(grads, tx.init(params), params, **arguments)
    """
    check_count("num_groups", num_groups)
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function (params, batch) -> loss; got {loss_fn!r}.")

    def fn(params: PyTree, batch: PyTree) -> tuple[Any, PyTree, PyTree]:
        num_examples = check_batch(batch)
        if num_examples % num_groups:
            raise ValueError(
                f"batch must divide into num_groups={num_groups} equal groups; got"
                f" {num_examples} examples."
            )
        groups = jax.tree.map(lambda x: x.reshape(num_groups, -1, *x.shape[1:]), batch)
        own_params = of_each_device(params, batch)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=has_aux)
        found, grads = jax.vmap(grad_fn, (None, 0))(own_params, groups)
        value = (jnp.mean(found[0]), found[1]) if has_aux else jnp.mean(found)
        return value, jax.tree.map(lambda g: jnp.mean(g, axis=0), grads), grads

    return fn
