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
# # Quickstart: curvature beside AdamW, then LAMA-Adam
#
# This page trains a small Flax network with AdamW and watches the curvature of its layers. Then it
# trains the same network with LAMA-Adam, whose momentum follows that curvature, and looks at what
# this changes. It runs in half a minute on a laptop.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from sklearn.datasets import make_moons
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from lama_optax import fisher, hutchinson, lama_adam, layer_report, supervised, track_curvature
from lama_optax.plot import plot_report

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## The data and the network
#
# 1000 points on two interleaved half circles, and a network of 65 parameters in two layers.

# %%
x, y = make_moons(n_samples=1000, noise=0.2, random_state=42)
train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.3, random_state=42)
scaler = StandardScaler().fit(train_x)
train_x, test_x = (jnp.asarray(scaler.transform(part), "float32") for part in (train_x, test_x))
train_y, test_y = (jnp.asarray(part, "float32") for part in (train_y, test_y))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, points):
        hidden = nn.relu(nn.Dense(16)(points))
        return nn.Dense(1)(hidden)[:, 0]


model = MLP()
initial_params = model.init(jax.random.key(42), train_x[:1])["params"]


def apply_fn(params, points):
    return model.apply({"params": params}, points)


# %% [markdown]
# ## The training step
#
# It is the one you know from Optax, with one thing more: `supervised` makes from the model and the
# batch all that an estimator of curvature may ask for, and `tx.update` takes it by keyword.


# %%
def train(tx, epochs=50, batch_size=64):
    """The trained parameters, and a report of every epoch's end."""

    def step(carry, rows):
        params, state = carry
        loss = "sigmoid_binary_cross_entropy"
        task = supervised(apply_fn, train_x[rows], train_y[rows], loss=loss)
        value, grads = jax.value_and_grad(task["value_fn"])(params)
        updates, state = tx.update(grads, state, params, **task)
        return (optax.apply_updates(params, updates), state), value

    @jax.jit
    def epoch(params, state, key):
        batches = len(train_x) // batch_size
        order = jax.random.permutation(key, len(train_x))[: batches * batch_size]
        (params, state), values = jax.lax.scan(step, (params, state), order.reshape(batches, -1))
        return params, state, values.mean()

    params, state = initial_params, tx.init(initial_params)
    history = []
    for i in range(epochs):
        params, state, loss = epoch(params, state, jax.random.key(i))
        numbers = layer_report(state, params, flat=True)
        history.append({"step": (i + 1) * (len(train_x) // batch_size), "loss": loss} | numbers)
    return params, history


def accuracy(params):
    return float(jnp.mean((apply_fn(params, test_x) > 0) == (test_y > 0.5)))


# %% [markdown]
# ## Curvature beside AdamW
#
# `track_curvature` stands before the optimizer. It measures at every tenth step, averages, and
# changes no update. `fisher()` estimates the trace of the Gauss-Newton matrix from one backward
# pass. For this network, of ReLU, it is the Hessian's trace.

# %%
tx = optax.chain(track_curvature(fisher(), update_interval=10), optax.adamw(1e-2))
params, history = train(tx)
print(f"AdamW: loss {history[-1]['loss']:.3f}, test accuracy {accuracy(params):.1%}")
for name in ("Dense_0", "Dense_1"):
    value, error = (history[-1][f"{k}/{name}"] for k in ("curvature", "curvature_std_error"))
    print(f"{name}: curvature {value:.4f} +- {error:.4f}")

figure = plot_report(history)
figure.suptitle("Training brings the layers' curvatures together (band: 95 %)", fontsize=11)
plt.show()

# %% [markdown]
# `curvature` is $H_l$, the trace of the layer's block over its number of parameters: how fast the
# loss rises if a parameter of that layer moves. The band is 1.96 standard errors. It comes from the
# spread of the estimates in the average, so it holds the noise of the batches and the movement of
# the parameters too. Before the second estimate there is none.
#
# A larger `curvature_decay` averages over more estimates: a smaller error, and a later answer.
#
# ## LAMA-Adam
#
# LAMA-Adam is Adam with one change: the momentum of each layer follows its curvature,
#
# $$\alpha_l = \alpha_{\min} + (\alpha_{\max} - \alpha_{\min})\,\mathrm{sigmoid}(\lambda H_l),
# \qquad m_l \leftarrow \alpha_l b_1\, m_l + (1 - b_1)\, g_l .$$
#
# $\lambda$ is the argument `sensitivity`: how strongly curvature moves the momentum. The document
# uses 0.01. We train with that and, to see something move, with 10.

# %%
runs = {}
for sensitivity in (0.01, 10.0):
    tx = lama_adam(
        1e-2,
        sensitivity=sensitivity,
        estimator=hutchinson(num_probes=10),
        update_interval=1,
        curvature_decay=0.9,
    )
    runs[sensitivity] = train(tx)

print("lambda   loss  accuracy  momentum of Dense_0, Dense_1")
for sensitivity, (params, history) in runs.items():
    last = history[-1]
    print(
        f"{sensitivity:6}  {last['loss']:.3f}     {accuracy(params):.1%}"
        f"  {last['momentum/Dense_0']:.4f}, {last['momentum/Dense_1']:.4f}"
    )

# %%
COLOURS = {"Dense_0": "#0072B2", "Dense_1": "#D55E00"}
LINES = {0.01: "--", 10.0: "-"}

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for sensitivity, (_, history) in runs.items():
    steps = jnp.array([row["step"] for row in history])

    def column(key, history=history):
        return jnp.array([row[key] for row in history])

    for name, colour in COLOURS.items():
        look = {"color": colour, "ls": LINES[sensitivity], "label": f"{name}, λ = {sensitivity:g}"}
        curvature = column(f"curvature/{name}")
        error = 1.96 * column(f"curvature_std_error/{name}")
        left.plot(steps, curvature, **look)
        left.fill_between(
            steps, curvature - error, curvature + error, color=colour, alpha=0.15, lw=0
        )
        right.plot(steps, column(f"alpha/{name}"), **look)
left.set(xlabel="step", ylabel="curvature $H_l$ (loss per parameter squared)")
left.set_title("Curvature of each layer, with 95 % bands", fontsize=11)
right.set(xlabel="step", ylabel=r"factor $\alpha_l$; Adam's is 1")
right.set_title("λ = 0.01 leaves the momentum alone", fontsize=11)
figure.legend(
    *right.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
)
plt.show()

# %% [markdown]
# - With the document's $\lambda$ both factors stay at 1 to three digits: LAMA-Adam is then Adam.
#   Curvatures of this size need a larger $\lambda$ to matter.
# - With $\lambda = 10$ the factor is clearly above 1. Under Eq. 6, the rule for $m_l$ above, that
#   raises the step size too: the gradient's weight stays $1 - b_1$ while the memory grows. Before
#   you credit the curvature with an improvement, compare with Adam at a larger learning rate, or
#   use `momentum="ema"`, which keeps the step size.
#
# ## Where to go from here
#
# - In your own model: `supervised` for the usual losses, or pass what the estimator needs yourself.
# - `layer_curvature` measures the same outside an optimizer, over a whole data loader, and
#   `exact_trace()` without sampling.
# - Notebook 02 compares exact Hessian-vector products with the document's finite differences, 04
#   looks at the stability of LAMA, 05 rounds weights by curvature, and 06 chooses the batch.
