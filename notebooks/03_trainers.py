# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # LAMA in your trainer
#
# Four complete training scripts on scikit-learn's handwritten digits, one for each way of writing
# models in JAX: Flax Linen, Flax NNX, Equinox and plain pytrees. What LAMA needs beyond Adam is one
# keyword, `value_fn`: the loss of this batch as a function of the parameters alone.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lama_optax import hutchinson, lama_adam, layer_report
from lama_optax.flax import TrainState, nnx_value_fn

digits = load_digits()
images = (digits.images / 16.0).astype(np.float32).reshape(-1, 64)
train_x, test_x, train_y, test_y = train_test_split(
    images, digits.target.astype(np.int32), test_size=0.3, random_state=0, stratify=digits.target
)


def batches(epochs, size=64, seed=0):
    """Shuffled batches of equal size, the remainder of an epoch left out."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(train_x))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            yield train_x[rows], train_y[rows]


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def optimizer():
    # A new estimate at every tenth step costs little; two probes and an average smooth it.
    return lama_adam(
        3e-3, estimator=hutchinson(num_probes=2), update_interval=10, curvature_decay=0.9
    )


def check(name, logits):
    accuracy = float(np.mean(np.argmax(logits, axis=-1) == test_y))
    print(f"{name}: test accuracy {accuracy:.1%}")
    assert accuracy > 0.95


# %% [markdown]
# ## Flax Linen, with batch statistics and dropout
#
# `flax.training.train_state.TrainState.apply_gradients` takes no extra arguments for the optimizer;
# `lama_optax.flax.TrainState` passes them on. The loss returns `(value, aux)`: its own gradient
# uses the new batch statistics, `value_fn` the value alone. The dropout key is fixed within a
# step, so that gradient and curvature are of one and the same function.


# %%
class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(64)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(10)(x)


class LinenState(TrainState):
    batch_stats: dict


linen_model = LinenModel()
variables = linen_model.init(jax.random.key(0), train_x[:1], train=False)
linen_state = LinenState.create(
    apply_fn=linen_model.apply,
    params=variables["params"],
    batch_stats=variables["batch_stats"],
    tx=optimizer(),
)


@jax.jit
def linen_step(state, x, y, dropout_key):
    def loss_fn(params):
        logits, updated = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            *(x, True),
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        return cross_entropy(logits, y), updated["batch_stats"]

    (_, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(
        grads=grads, value_fn=lambda params: loss_fn(params)[0], batch_stats=batch_stats
    )


for step, (x, y) in enumerate(batches(epochs=20)):
    linen_state = linen_step(linen_state, x, y, jax.random.fold_in(jax.random.key(1), step))

check(
    "Linen",
    linen_state.apply_fn(
        {"params": linen_state.params, "batch_stats": linen_state.batch_stats}, test_x, False
    ),
)
layer_report(linen_state.opt_state, linen_state.params)

# %% [markdown]
# ## Flax NNX
#
# `nnx.Optimizer.update` passes keywords on; `nnx_value_fn` turns the loss of a model into a
# function of the model's params. Made before the gradient, it draws the same dropout masks.


# %%
class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


nnx_model = NnxModel(nnx.Rngs(0))
nnx_optimizer = nnx.Optimizer(nnx_model, optimizer(), wrt=nnx.Param)


@nnx.jit
def nnx_step(model, optimizer, x, y):
    def loss_fn(model):
        return cross_entropy(model(x), y)

    value_fn = nnx_value_fn(loss_fn, model)
    grads = nnx.grad(loss_fn)(model)
    optimizer.update(model, grads, value_fn=value_fn)


nnx_model.train()
for x, y in batches(epochs=20):
    nnx_step(nnx_model, nnx_optimizer, x, y)

nnx_model.eval()
check("NNX", nnx_model(test_x))
layer_report(nnx_optimizer.opt_state, nnx.state(nnx_model, nnx.Param))

# %% [markdown]
# ## Equinox
#
# The params are the model's arrays, `eqx.filter`; `eqx.combine` puts them back into the model.

# %%
eqx_model = eqx.nn.MLP(64, 10, width_size=64, depth=2, key=jax.random.key(0))
eqx_params, eqx_static = eqx.partition(eqx_model, eqx.is_inexact_array)
eqx_tx = optimizer()


@jax.jit
def eqx_step(params, opt_state, x, y):
    def value_fn(params):
        return cross_entropy(jax.vmap(eqx.combine(params, eqx_static))(x), y)

    grads = jax.grad(value_fn)(params)
    updates, opt_state = eqx_tx.update(grads, opt_state, params, value_fn=value_fn)
    return eqx.apply_updates(params, updates), opt_state


eqx_opt_state = eqx_tx.init(eqx_params)
for x, y in batches(epochs=20):
    eqx_params, eqx_opt_state = eqx_step(eqx_params, eqx_opt_state, x, y)

check("Equinox", jax.vmap(eqx.combine(eqx_params, eqx_static))(test_x))
layer_report(eqx_opt_state, eqx_params)

# %% [markdown]
# ## Plain pytrees


# %%
def plain_init(key, sizes=(64, 64, 10)):
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (m, n)) * jnp.sqrt(2 / m), "b": jnp.zeros(n)}
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def plain_apply(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


plain_tx = optimizer()


@jax.jit
def plain_step(params, opt_state, x, y):
    def value_fn(params):
        return cross_entropy(plain_apply(params, x), y)

    grads = jax.grad(value_fn)(params)
    updates, opt_state = plain_tx.update(grads, opt_state, params, value_fn=value_fn)
    return optax.apply_updates(params, updates), opt_state


plain_params = plain_init(jax.random.key(0))
plain_opt_state = plain_tx.init(plain_params)
history = []
for x, y in batches(epochs=20):
    plain_params, plain_opt_state = plain_step(plain_params, plain_opt_state, x, y)
    history.append(layer_report(plain_opt_state, plain_params))

check("Plain pytrees", plain_apply(plain_params, test_x))
history[-1]

# %% [markdown]
# A logger takes such a dictionary at every step. Here it goes into a picture: a moving average
# of each layer's mean curvature, a new estimate at every tenth step.

# %%
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name in history[0]:
    axes.plot([float(report[name]["curvature"]) for report in history], label=f"layer {name}")
axes.set(xlabel="step", ylabel="trace of the Hessian block / parameters")
axes.set_yscale("log")
axes.legend()
plt.show()
