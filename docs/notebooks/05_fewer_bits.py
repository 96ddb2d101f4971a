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
# # Which layers can do with fewer bits?
#
# A trained model is to become smaller, without training again. Rounding the weights of a layer
# moves them by $\Delta\theta_l$. The loss rises by about half of curvature times squared change,
#
# $$\Delta L \approx \sum_l \tfrac{1}{2} H_l \lVert \Delta\theta_l \rVert^2 ,$$
#
# where $H_l$ is the layer's average curvature. Errors of rounding have no preferred sign, so that
# the gradient's part averages out, and so do products of two different errors. Layers whose
# curvature is low can do with few bits; layers whose curvature is high need more.
#
# This page trains a small language model, measures the curvature of its layers, shows
# that the formula predicts the rise, and then chooses bits by it.

# %%
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from scipy.stats import spearmanr

from lama_optax import fisher, layer_curvature, layer_names, supervised
from lama_optax.rounding import allocate_bits, loss_increase, round_symmetric

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## A model to be made smaller
#
# A transformer of four blocks that predicts the next character of Python's own help. Of ten texts
# eight are for training, one is for choosing, and one is kept aside for the judgement at the end.

# %%
TEXTS = [topics[name] for name in sorted(topics)]
LENGTH, WIDTH, DEPTH, STEPS, BATCH = 32, 48, 4, 600, 32


def characters(kinds):
    chosen = [text for i, text in enumerate(TEXTS) if i % 10 in kinds]
    return jnp.asarray(np.frombuffer("".join(chosen).encode("ascii", "replace"), np.uint8))


TRAIN, CHOOSE, TEST = characters(range(2, 10)), characters([1]), characters([0])


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        mask = nn.make_causal_mask(tokens)
        x = nn.Embed(128, WIDTH, name="characters")(tokens)
        x = x + nn.Embed(LENGTH, WIDTH, name="positions")(jnp.arange(LENGTH))
        for i in range(DEPTH):
            h = nn.LayerNorm()(x)
            attend = nn.MultiHeadDotProductAttention(4, use_bias=False, name=f"attention_{i}")
            x = x + attend(h, h, mask=mask)
            h = nn.Dense(4 * WIDTH, name=f"up_{i}")(nn.LayerNorm()(x))
            x = x + nn.Dense(WIDTH, name=f"down_{i}")(nn.gelu(h))
        return nn.Dense(128, name="head")(nn.LayerNorm()(x))


model = Transformer()


def windows(text, starts):
    """Inputs and targets: LENGTH characters, and those that follow them."""
    rows = text[starts[:, None] + jnp.arange(LENGTH + 1)].astype(jnp.int32)
    return rows[:, :-1], rows[:, 1:]


def mean_loss(params, inputs, targets):
    logits = model.apply({"params": params}, inputs)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def spread(text):
    """256 sequences, evenly from the whole text."""
    return windows(text, jnp.linspace(0, len(text) - LENGTH - 1, 256).astype(int))


tx = optax.adamw(optax.cosine_decay_schedule(5e-3, STEPS))


@jax.jit
def train(params, starts):
    def step(carry, starts):
        params, state = carry
        value, grads = jax.value_and_grad(mean_loss)(params, *windows(TRAIN, starts))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, tx.init(params)), starts)[0][0]


rng = np.random.default_rng(0)
params = jax.jit(model.init)(jax.random.key(0), spread(TEST)[0][:1])["params"]
params = train(params, rng.integers(len(TRAIN) - LENGTH, size=(STEPS, BATCH)))
choosing_loss = jax.jit(lambda params: mean_loss(params, *spread(CHOOSE)))
test_loss = jax.jit(lambda params: mean_loss(params, *spread(TEST)))
LOSS = float(test_loss(params))
print(f"loss on the texts kept aside: {LOSS:.3f}")

# %% [markdown]
# ## Measure the curvature
#
# `fisher()` estimates the trace of each layer's Gauss-Newton matrix from one backward pass. Sixteen
# batches of the training data are enough here. With `layers="leaf"` each array is a layer of its
# own: a kernel and its bias have different curvature, and only kernels and embeddings are rounded.


# %%
def apply_fn(params, inputs):
    return model.apply({"params": params}, inputs)


batches = [windows(TRAIN, rng.integers(len(TRAIN) - LENGTH, size=BATCH)) for _ in range(16)]
curvature = layer_curvature(
    params,
    0,
    estimator=fisher(),
    layers="leaf",
    batches=[supervised(apply_fn, *batch) for batch in batches],
)

names = layer_names(params, "leaf")
leaves, treedef = jax.tree.flatten(params)
MATRICES = [i for i, leaf in enumerate(leaves) if leaf.ndim > 1]
for i in sorted(MATRICES, key=lambda i: -curvature.mean[i]):
    print(f"{names[i]:32s} {curvature.mean[i]:.1e} +- {curvature.std_error[i]:.0e}")

# %% [markdown]
# ## Predicted against measured
#
# Sixty times we round every matrix to a width drawn from 3, 4, 5, 6 and 8 bits. `loss_increase`
# predicts the rise from the curvature alone; beside it is the rise that the texts kept aside show.


# %%
def rounded(widths):
    """The parameters with each matrix at its width."""
    new = list(leaves)
    for i, width in zip(MATRICES, widths, strict=True):
        new[i] = round_symmetric(leaves[i], width)
    return jax.tree.unflatten(treedef, new)


def squared_error(changed):
    return optax.global_norm(jax.tree.map(jnp.subtract, params, changed)) ** 2


trees = [rounded([int(w) for w in rng.choice([3, 4, 5, 6, 8], len(MATRICES))]) for _ in range(60)]
measured = np.array([float(test_loss(tree)) - LOSS for tree in trees])
predicted = np.array(
    [loss_increase(curvature, params, t, layers="leaf")["total"]["increase"] for t in trees]
)
plain = np.array([float(squared_error(tree)) for tree in trees])

RANKS = {"curvature": spearmanr(predicted, measured)[0], "plain": spearmanr(plain, measured)[0]}
print(f"rank correlation with the measured rise: {RANKS['curvature']:.2f} by curvature,")
print(f"  {RANKS['plain']:.2f} by squared error of the weights alone")
print(f"predicted over measured, median: {np.median(predicted / measured):.2f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.9), sharey=True, layout="constrained")
for axes, x in ((left, plain), (right, predicted)):
    axes.loglog(x, measured, "o", color="#0072B2", markersize=5, alpha=0.8)
ends = np.array([predicted.min(), predicted.max()])
right.plot(ends, ends, color="#D55E00", zorder=0)
right.text(*ends[[0, 0]] * [1.25, 0.95], "predicted = measured", color="#D55E00")
left.set(xlabel="squared error of the weights", ylabel="measured rise in held-out loss")
right.set(xlabel="rise predicted from curvature")
left.set_title(f"Without curvature: rank correlation {RANKS['plain']:.2f}", fontsize=10)
right.set_title(f"With curvature: rank correlation {RANKS['curvature']:.2f}", fontsize=10)
figure.suptitle("Curvature predicts what rounding costs, before anything is rounded", fontsize=12)
left.set_xticks([5, 10, 20, 50], ["5", "10", "20", "50"])
for axis in (left.yaxis, right.xaxis):
    axis.set_ticks([0.01, 0.02, 0.05, 0.1, 0.2], ["0.01", "0.02", "0.05", "0.1", "0.2"])
for axes in (left, right):
    axes.minorticks_off()
plt.show()

# %% [markdown]
# ## Choose, verify, compare
#
# `allocate_bits` solves for the widths of least predicted rise within a budget. With `value_fn` it
# measures what it chose, on the texts for choosing, and returns the uniform width if that is
# better there. The comparison is on the texts kept aside, which no part of this has seen.

# %%
WIDTHS = (2, 3, 4, 5, 6, 8)
uniform = {b: float(test_loss(rounded([b] * len(MATRICES)))) - LOSS for b in (3, 4, 5)}
chosen, found = {}, {}
for budget in (3, 3.5, 4, 4.5, 5):
    found[budget] = allocate_bits(
        curvature, params, mean_bits=budget, bits=WIDTHS, layers="leaf", value_fn=choosing_loss
    )
    chosen[budget] = float(test_loss(found[budget].params)) - LOSS

print("rise in held-out loss\nmean bits  uniform  chosen  ratio")
for budget in (3, 4, 5):
    ratio = chosen[budget] / uniform[budget]
    print(f"{budget:9d}  {uniform[budget]:.4f}   {chosen[budget]:.4f}  {ratio:.2f}")

print("\nbits at a mean of 4:")
for name, width in sorted(found[4].bits.items(), key=lambda item: -item[1]):
    print(f"{width:3d}  {name}")

# %%
figure, axes = plt.subplots(figsize=(5.6, 3.5), layout="constrained")
axes.plot(uniform.keys(), uniform.values(), "s--", color="#777777", label="one width for all")
axes.plot(chosen.keys(), chosen.values(), "o-", color="#0072B2", label="chosen by curvature")
axes.set(yscale="log", xlabel="bits of a weight, mean", ylabel="rise in held-out loss")
axes.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2], ["0.01", "0.02", "0.05", "0.1", "0.2"])
axes.minorticks_off()
share = chosen[4] / uniform[4]
axes.set_xticks([3, 3.5, 4, 4.5, 5], ["3", "3.5", "4", "4.5", "5"])
axes.set_title(f"At a mean of 4 bits, choosing leaves {share:.2f} of the rise", fontsize=11)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# What is won is won at few bits. With more the rise is small, and then the luck of one rounding is
# as large: the gradient's part averages out over many roundings, but it is linear in the step, so
# that it is what is left of a small one.
#
# ## What it does not do
#
# - It predicts a small step's rise. At 2 bits a layer's weights have moved far,
#   and a quadratic says little there. `allocate_bits` does not trust a width that moves a
#   layer by more than `max_change`, 0.4 of its norm: with `value_fn` it measures what that layer
#   costs at that width, without it the width is not offered.
# - It rounds to nearest and trains nothing. Methods that adjust the remaining weights, such as
#   GPTQ, or that train with rounding get further at the same bits. They too have to be told how
#   many bits each layer gets.
# - Where all layers have about the same curvature there is nothing to choose, and where the
#   training loss is near zero the curvature changes within the step. Verify, as above.
# - Activations stay as they are, and the arrays here are rounded, not packed.
#   `lama_optax.rounding.qwix_rules` hands the widths to [Qwix](https://github.com/google/qwix),
#   which stores integers.
