"""Flax beside `track_curvature` and LAMA: a Linen train state and a helper for NNX.

Needs flax (``pip install .[flax]``), which the rest of the package does not.
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

    ``examples/linen.py`` is a script with BatchNorm and dropout.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import linen as nn
      >>> from lama_optax import fisher, supervised, track_curvature
      >>> from lama_optax.flax import TrainState
      >>> model, x, y = nn.Dense(3), jnp.ones((4, 2)), jnp.arange(4) % 3
      >>> tx = optax.chain(track_curvature(fisher()), optax.adamw(1e-2))
      >>> params = model.init(jax.random.key(0), x)
      >>> state = TrainState.create(apply_fn=model.apply, tx=tx, params=params)
      >>> task = supervised(state.apply_fn, x, y)
      >>> grads = jax.grad(task["value_fn"])(state.params)
      >>> int(state.apply_gradients(grads=grads, **task).step)
      1
    """

    def apply_gradients(self, *, grads: PyTree, **kwargs: Any) -> Self:
        """The state after one step.

        Args:
          grads: gradients, shaped like ``params``.
          **kwargs: fields (``batch_stats=...``) are replaced, as in Flax; every other name
            (``value_fn=...``, all of `supervised`) goes to ``tx.update``.
        """
        names = {field.name for field in dataclasses.fields(self)}
        fields = {name: value for name, value in kwargs.items() if name in names}
        extra_args = {name: value for name, value in kwargs.items() if name not in names}
        update = functools.partial(optax.with_extra_args_support(self.tx).update, **extra_args)
        bound = self.replace(tx=optax.GradientTransformation(self.tx.init, update))
        new = super(TrainState, bound).apply_gradients(grads=grads, **fields)
        return new.replace(tx=self.tx)


def nnx_apply_fn(
    model: nnx.Module,
    fn: Callable[..., Any] | None = None,
    wrt: nnx.filterlib.Filter = nnx.Param,
) -> Callable[..., Any]:
    """Turns a function of an NNX model into a function of its params, which estimators ask for.

    Args:
      model: the model as it is now. It is not changed: each evaluation gets a copy, with all that
        is not params (batch statistics, dropout's counters). So dropout draws the same mask at
        every evaluation. Call this before the gradient, which advances the model's counters, and
        the gradient sees that mask too.
      fn: ``fn(model, *args)``, such as a loss; by default the model's call, ``model(*args)``.
      wrt: which variables are params, as for `nnx.Optimizer`.

    Returns:
      A function ``(params, *args) -> fn(model with these params, *args)``, where params are what
      ``nnx.state(model, wrt)`` returns.

    Raises:
      ValueError: if ``model`` holds no variable that ``wrt`` selects.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from lama_optax import fisher, supervised, track_curvature
      >>> from lama_optax.flax import nnx_apply_fn
      >>> model, x, y = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.ones((4, 2)), jnp.arange(4) % 3
      >>> tx = optax.chain(track_curvature(fisher()), optax.adamw(1e-2))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> task = supervised(nnx_apply_fn(model), x, y)
      >>> grads = jax.grad(task["value_fn"])(nnx.state(model, nnx.Param))
      >>> _ = optimizer.update(model, grads, **task)
      >>> int(optimizer.step[...])
      1

      A loss of your own is as short: ``value_fn=nnx_apply_fn(model, loss_fn)``.
    """
    graphdef, *states = nnx.split(model, wrt, ...)
    selected, rest = states
    if not selected:
        raise ValueError(f"wrt must select variables of the model; {wrt!r} selects none.")

    def apply_fn(params: PyTree, *args: Any) -> Any:
        # Copied: an evaluation advances counters (dropout, batch statistics) of its own model.
        copied = nnx.merge(graphdef, params, rest, copy=True)
        return copied(*args) if fn is None else fn(copied, *args)

    return apply_fn
