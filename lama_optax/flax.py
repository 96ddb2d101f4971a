"""Flax beside `track_curvature` and LAMA: a Linen train state and a helper for NNX.

Needs flax (``pip install lama-optax[flax]``), which the rest of the package does not.
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

    BatchNorm keeps running means in a second collection, ``batch_stats``. One function returns
    outputs and updated collections; the gradient's loss takes both, `supervised` the outputs
    alone. ``examples/linen.py`` is such a script, with dropout.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import linen as nn
      >>> from lama_optax import fisher, supervised, track_curvature
      >>> from lama_optax.flax import TrainState
      >>> class State(TrainState):
      ...     batch_stats: dict
      >>> model = nn.Sequential([nn.BatchNorm(use_running_average=False), nn.Dense(3)])
      >>> x, y = jnp.arange(8.0).reshape(4, 2), jnp.arange(4) % 3
      >>> variables = model.init(jax.random.key(0), x)
      >>> tx = optax.chain(track_curvature(fisher()), optax.adamw(1e-2))
      >>> state = State.create(apply_fn=model.apply, tx=tx, **variables)
      >>> @jax.jit
      ... def train_step(state, x, y):
      ...     def forward(params, x):
      ...         variables = {"params": params, "batch_stats": state.batch_stats}
      ...         return state.apply_fn(variables, x, mutable=["batch_stats"])
      ...     def loss_fn(params):
      ...         outputs, updated = forward(params, x)
      ...         losses = optax.softmax_cross_entropy_with_integer_labels(outputs, y)
      ...         return losses.mean(), updated["batch_stats"]
      ...     grads, batch_stats = jax.grad(loss_fn, has_aux=True)(state.params)
      ...     task = supervised(lambda params, x: forward(params, x)[0], x, y)
      ...     return state.apply_gradients(grads=grads, batch_stats=batch_stats, **task)
      >>> state = train_step(state, x, y)
      >>> int(state.step)
      1
    """

    def apply_gradients(self, *, grads: PyTree, **kwargs: Any) -> Self:
        """Updates params, optimizer state and step.

        Args:
          grads: gradients, shaped like ``params``.
          **kwargs: names of fields (``batch_stats=...``) replace these, as in Flax; every other
            name (``value_fn=...``, all of `supervised`) goes to ``tx.update``.

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
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from lama_optax import fisher, supervised, track_curvature
      >>> from lama_optax.flax import nnx_apply_fn
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> tx = optax.chain(track_curvature(fisher()), optax.adamw(1e-2))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x, y):
      ...     def loss_fn(model):
      ...         return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()
      ...     task = supervised(nnx_apply_fn(model), x, y)
      ...     optimizer.update(model, nnx.grad(loss_fn)(model), **task)
      >>> train_step(model, optimizer, jnp.ones((4, 2)), jnp.arange(4) % 3)
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
