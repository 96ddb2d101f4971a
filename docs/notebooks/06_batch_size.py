# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How large a batch is worth it?
#
# Twice the batch makes a step twice as dear. Does it also halve the number of steps? The *gradient
# noise scale* of [McCandlish et al.](https://arxiv.org/abs/1812.06162) answers before you try:
#
# $$B_\mathrm{noise} = \frac{\operatorname{tr}(\Sigma)}{\lVert G \rVert^2}, \qquad
# \text{steps}(B) = S_\mathrm{min} \left(1 + \frac{B_\mathrm{noise}}{B}\right).$$
#
# $G$ is the gradient of the loss, and $\Sigma$ the covariance of one example's gradient. Far below
# $B_\mathrm{noise}$ twice the batch nearly halves the steps; far above it saves almost none.
#
# This page trains a small language model, reads its noise scale, predicts how many
# steps other batches need, and trains with them to see.

# %%
import time
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn

from lama_optax import grouped_value_and_grad, noise_report, track_noise_scale

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## A model and its data
#
# A transformer of two blocks that predicts the next character of Python's own help. An example is a
# sequence of 32 characters. One text in ten is kept aside, and the loss is read there.

# %%
TEXTS = [topics[name] for name in sorted(topics)]
LENGTH = 32


def characters(texts):
    return jnp.asarray(np.frombuffer("".join(texts).encode("ascii", "replace"), np.uint8))


TRAIN = characters(text for i, text in enumerate(TEXTS) if i % 10)
TEST = characters(TEXTS[::10])


class Transformer(nn.Module):
    width: int = 48

    @nn.compact
    def __call__(self, tokens):
        mask = nn.make_causal_mask(tokens)
        x = nn.Embed(128, self.width)(tokens)
        x = x + nn.Embed(LENGTH, self.width)(jnp.arange(tokens.shape[-1]))
        for _ in range(2):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(4)(h, h, mask=mask)
            h = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(h)
        return nn.Dense(128)(nn.LayerNorm()(x))


model = Transformer()


def windows(text, starts):
    return text[starts[:, None] + jnp.arange(LENGTH + 1)].astype(jnp.int32)


def loss_fn(params, batch):
    logits = model.apply(params, batch[:, :-1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]))


held_out = windows(TEST, jnp.linspace(0, len(TEST) - LENGTH - 1, 128).astype(int))

# %% [markdown]
# ## Train, and track
#
# `grouped_value_and_grad` takes the batch's gradient as the mean of four groups' gradients, without
# a further pass. How far the four lie apart tells the noise. `track_noise_scale` stands before the
# optimizer and averages it; it changes no update.
#
# A run ends when the loss on the texts kept aside is at `TARGET`.

# %%
TARGET, MOST_STEPS, CHUNK = 2.4, 2000, 10
tx = optax.chain(track_noise_scale(decay=0.98), optax.scale_by_adam())


@jax.jit
def some_steps(carry, starts, rate):
    """One step for each row of ``starts``, and the loss on the texts kept aside."""

    def step(carry, starts):
        params, state = carry
        _, grads, groups = grouped_value_and_grad(loss_fn, 4)(params, windows(TRAIN, starts))
        updates, state = tx.update(
            grads, state, params, group_gradients=groups, batch_size=len(starts)
        )
        return (optax.apply_updates(params, optax.tree.scale(-rate, updates)), state), None

    carry, _ = jax.lax.scan(step, carry, starts)
    return carry, loss_fn(carry[0], held_out)


def train(batch_size, rate, seed=0):
    """Steps to the target, and the report of the noise scale at the end."""
    params = jax.jit(model.init)(jax.random.key(seed), held_out[:1, :-1])
    carry, rng, before = (params, tx.init(params)), np.random.default_rng(seed), np.inf
    for steps in range(CHUNK, MOST_STEPS + 1, CHUNK):
        starts = rng.integers(len(TRAIN) - LENGTH, size=(CHUNK, batch_size))
        carry, loss = some_steps(carry, jnp.asarray(starts), rate)
        if loss < TARGET:
            part = (before - TARGET) / (before - loss) if np.isfinite(before) else 1
            return steps - CHUNK + float(part) * CHUNK, noise_report(carry[1], params)
        before = loss
    return np.inf, noise_report(carry[1], params)


BATCH = 16
began = time.perf_counter()
RATES = {rate: train(BATCH, rate) for rate in (2e-3, 4e-3, 8e-3)}
for rate, (steps, _) in RATES.items():
    print(f"batch {BATCH}, rate {rate}: {steps:.0f} steps to a loss of {TARGET}")

# %% [markdown]
# ## Read the noise scale
#
# Of the best rate's run. Every layer has its own, with a 95 % interval; `total` is the one that
# tells about the batch. It is an average over about the last fifty steps.

# %%
BEST = min(RATES, key=lambda rate: RATES[rate][0])
STEPS, report = RATES[BEST]
total = report["total"]


def show(value):
    return "not known" if value is None else f"{value:.0f}"


print(f"{'layer':32s} noise scale      95 % interval")
for name, row in report.items():
    low, high = show(row["at_least"]), show(row["at_most"])
    print(f"{name:32s} {show(row['noise_scale']):>11s}  {low:>9s} to {high:>9s}")

# %% [markdown]
# ## Predict
#
# One run fixes $S_\mathrm{min}$, and the formula gives the steps at any other batch. Examples are
# steps times the batch: what you pay if a batch is not spread over more devices.

# %%
NOISE = total["noise_scale"]


def predicted(batch, noise=NOISE):
    return STEPS * (1 + noise / batch) / (1 + noise / BATCH)


BATCHES = (4, 32, 64)
for batch in BATCHES:
    steps = predicted(batch)
    print(f"batch {batch:3d}: {steps:5.0f} steps, {steps * batch / 1000:5.1f} thousand examples")

# %% [markdown]
# ## Train, and see
#
# Each batch at the best of three rates, about the square root of the batch apart, as Adam wants it.

# %%
measured = {BATCH: STEPS}
for batch in BATCHES:
    rates = [BEST * (batch / BATCH) ** 0.5 * factor for factor in (0.6, 1.0, 1.6)]
    found = {rate: train(batch, rate)[0] for rate in rates}
    measured[batch] = min(found.values())
    off = measured[batch] / predicted(batch) - 1
    print(f"batch {batch:3d}: {measured[batch]:5.0f} steps, {100 * off:+.0f} % off the prediction")
print(f"all of this took {(time.perf_counter() - began) / 60:.0f} minutes")

# %%
figure, axes = plt.subplots(figsize=(6.2, 3.6), layout="constrained")
line = np.geomspace(4, 64, 100)
axes.plot(line, predicted(line), color="#D55E00", label=f"predicted from batch {BATCH}")
ends = [predicted(line, total[end]) for end in ("at_least", "at_most")]
axes.fill_between(line, *ends, color="#D55E00", alpha=0.2, linewidth=0, label="its 95 % interval")
axes.plot(*zip(*sorted(measured.items()), strict=True), "o", color="#0072B2", label="measured")
axes.set(
    xscale="log",
    yscale="log",
    xlabel="batch (sequences)",
    ylabel=f"steps to a loss of {TARGET}",
    title=f"The noise scale at batch {BATCH} predicts what other batches buy",
)
axes.set_xticks(sorted(measured), [str(batch) for batch in sorted(measured)])
axes.set_yticks([100, 200, 500, 1000], ["100", "200", "500", "1000"])
axes.minorticks_off()
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Where it ends
#
# - The noise scale grows while the loss falls. Read it where you are, not at the start, and expect
#   the average to lag where it grows fast.
# - The formula is that of SGD at its best rate. Adam divides by the gradient's size, so that the
#   layers do not weigh as they do in `total`. The lines above say how far off the prediction was.
# - At the end of a learning rate's decay most of what is left is noise, so the noise scale says
#   little of the batch then.
# - In fine-tuning, or on very small data, the mean gradient is soon near zero and its square is not
#   known. The report then says `None`, and `at_least` is all there is.
# - It counts steps, not seconds: what a larger batch costs is your machine's affair.
