"""`lama_optax.flax`: extra arguments through Linen's train state, and functions of NNX params."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

from lama_optax import (
    exact_trace,
    flipout,
    layer_curvature,
    layer_report,
    supervised,
    track_curvature,
)
from lama_optax.flax import TrainState, nnx_apply_fn

# Flax and optax promote implicitly.
pytestmark = pytest.mark.standard_promotion

X = jnp.asarray([[1.0, 0.0], [0.5, 2.0], [-1.0, 1.0], [0.0, -0.5]])
Y = jnp.asarray([0, 1, 2, 0])


def optimizer():
    return optax.chain(track_curvature(exact_trace()), optax.sgd(0.1))


def tracked(opt_state, params):
    return [row["curvature"] for row in layer_report(opt_state, params).values()]


def head_curvature(logits_fn, params):
    """The mean diagonal entry of the loss's Hessian in the entries of ``params``."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def loss(flat):
        logits = logits_fn(unravel(flat))
        return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()

    return float(jnp.trace(jax.jit(jax.hessian(loss))(flat))) / flat.size


def test_train_state_with_batch_norm_and_dropout():
    """The curvature is that of the training forward pass; the running means are kept."""

    class State(TrainState):
        batch_stats: dict

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False, use_bias=False, use_scale=False)(x)
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(x))

    model, dropout = Model(), {"dropout": jax.random.key(1)}
    variables = jax.jit(model.init)({"params": jax.random.key(0)} | dropout, X)
    state = State.create(apply_fn=model.apply, tx=optimizer(), **variables)

    def forward(params, x):
        return state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            *(x,),
            rngs=dropout,
            mutable=["batch_stats"],
        )

    @jax.jit
    def step(state):
        task = supervised(lambda params, x: forward(params, x)[0], X, Y)
        grads = jax.grad(task["value_fn"])(state.params)
        batch_stats = forward(state.params, X)[1]["batch_stats"]
        return state.apply_gradients(grads=grads, batch_stats=batch_stats, **task)

    new = step(state)
    assert int(new.step) == 1
    assert new.tx is state.tx
    running = new.batch_stats["BatchNorm_0"]["mean"]  # Flax's momentum is 0.99, from 0
    assert running.tolist() == pytest.approx((0.01 * X.mean(axis=0)).tolist(), rel=1e-5)
    expected = head_curvature(lambda params: forward(params, X)[0], state.params)
    assert tracked(new.opt_state, new.params) == pytest.approx([expected], rel=1e-5)


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nnx.BatchNorm(2, use_bias=False, use_scale=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(2, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(self.norm(x)))


def test_nnx_apply_fn_is_one_function_and_leaves_the_model_alone():
    """Every evaluation has the dropout mask that the gradient is about to draw."""
    model = Net()
    apply_fn, params = nnx_apply_fn(model), nnx.state(model, nnx.Param)
    before = nnx.state(model)
    first, second = apply_fn(params, X), apply_fn(params, X)
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), before, nnx.state(model))
    assert all(jax.tree.leaves(same))
    drawn, moved_on = model(X), model(X)
    assert first.tolist() == second.tolist() == drawn.tolist()
    assert drawn.tolist() != moved_on.tolist()


def test_nnx_apply_fn_of_a_loss():
    model = Net()
    value_fn = nnx_apply_fn(model, lambda model, x: jnp.mean(model(x) ** 2))
    params = nnx.state(model, nnx.Param)
    assert float(value_fn(params, X)) == pytest.approx(float(jnp.mean(model(X) ** 2)), rel=1e-6)


def test_nnx_optimizer_tracks_the_curvature():
    model = Net()
    optimizer_ = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
    apply_fn, params = nnx_apply_fn(model), nnx.state(model, nnx.Param)
    task = supervised(apply_fn, X, Y)
    expected = head_curvature(lambda params: apply_fn(params, X), params)
    optimizer_.update(model, jax.grad(task["value_fn"])(params), **task)
    assert tracked(optimizer_.opt_state, params) == pytest.approx([expected], rel=1e-5)


def test_flipout_with_dropout_sees_one_mask():
    """For each example as it is called; the mask is the same at every evaluation."""

    class Small(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.dropout, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(2, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(self.dropout(x))

    model = Small()
    params, task = nnx.state(model, nnx.Param), supervised(nnx_apply_fn(model), X, Y)

    def of_examples(params):
        return jnp.mean(jax.vmap(lambda e: task["example_value_fn"](params, e))(task["batch"]))

    @jax.jit
    def both(params):
        exact = layer_curvature(params, 0, estimator=exact_trace(), value_fn=of_examples)
        return exact.mean, layer_curvature(params, 1, estimator=flipout(300), **task)

    exact, found = both(params)
    assert (jnp.abs(found.mean - exact) < 5 * found.std_error).all()
    assert (found.std_error < 0.1 * exact).all()


def test_wrt_that_selects_nothing():
    with pytest.raises(ValueError, match=r"wrt must select variables.*LoRAParam.*selects none"):
        nnx_apply_fn(Net(), wrt=nnx.LoRAParam)
