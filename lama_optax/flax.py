"""Flax beside LAMA: a Linen train state and an NNX helper that pass ``value_fn`` on.

Needs flax, which the rest of the package does not.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import optax
from flax import nnx
from flax.training import train_state

PyTree = Any


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` that passes extra arguments on to the optimizer.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from lama_optax import lama_adam
      >>> from lama_optax.flax import TrainState
      >>> model = nn.Dense(1)
      >>> x, y = jnp.ones((4, 2)), jnp.zeros((4, 1))
      >>> variables = model.init(jax.random.key(0), x)
      >>> state = TrainState.create(
      ...     apply_fn=model.apply, params=variables["params"], tx=lama_adam(1e-2)
      ... )
      >>> value_fn = lambda params: jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)
      >>> grads = jax.grad(value_fn)(state.params)
      >>> state = state.apply_gradients(grads=grads, value_fn=value_fn)
      >>> int(state.step)
      1
    """

    def apply_gradients(self, *, grads: PyTree, **kwargs: Any) -> Self:
        """Updates params, optimizer state and step.

        Args:
          grads: gradients, shaped like ``params``.
          **kwargs: names of fields (``batch_stats=...``) replace these, as in Flax; every other
            name (``value_fn=...``, ``curvature=...``) goes to ``tx.update``.

        Returns:
          The new state.
        """
        names = {field.name for field in dataclasses.fields(self)}
        fields = {name: value for name, value in kwargs.items() if name in names}
        extra_args = {name: value for name, value in kwargs.items() if name not in names}
        update = functools.partial(optax.with_extra_args_support(self.tx).update, **extra_args)
        bound = self.replace(tx=optax.GradientTransformation(self.tx.init, update))
        new = super(TrainState, bound).apply_gradients(grads=grads, **fields)
        return new.replace(tx=self.tx)


def nnx_value_fn(
    loss_fn: Callable[[Any], Any], model: nnx.Module, wrt: nnx.filterlib.Filter = nnx.Param
) -> Callable[[PyTree], Any]:
    """Turns a loss of an NNX model into a function of its params, for ``value_fn``.

    Args:
      loss_fn: ``loss_fn(model) -> scalar``.
      model: the model as it is now; it is not changed. Dropout draws the same mask at every
        evaluation, so that one estimate differentiates one function: call this before the
        gradient, which advances the model's counters, and both see the same mask.
      wrt: which variables are params, as for `nnx.Optimizer`.

    Returns:
      A function of the state that ``nnx.state(model, wrt)`` returns.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from lama_optax import lama_adam
      >>> from lama_optax.flax import nnx_value_fn
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, lama_adam(1e-2), wrt=nnx.Param)
      >>> loss_fn = lambda model: jnp.mean(model(jnp.ones((4, 2))) ** 2)
      >>> value_fn = nnx_value_fn(loss_fn, model)
      >>> grads = nnx.grad(loss_fn)(model)
      >>> _ = optimizer.update(model, grads, value_fn=value_fn)
    """
    graphdef, *states = nnx.split(model, wrt, ...)
    rest = states[1]
    # Copied: an evaluation advances counters (dropout, batch statistics) of its own model only.
    return lambda params: loss_fn(nnx.merge(graphdef, params, rest, copy=True))
