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
# # Is it stable? Step size, divergence and momentum by layer
#
# LAMA's momentum is Eq. 6, $m_l \leftarrow \alpha_l b_1\, m_l + (1 - b_1)\, g_l$. Its unit-gain
# form (`momentum="ema"`) is $m_l \leftarrow b_l m_l + (1 - b_l)\, g_l$ with $b_l = \alpha_l b_1$.
# Here is what we find, each derived and then measured:
#
# 1. **Gain.** Under Eq. 6 $\alpha$ multiplies the step size by $(1-b_1)/(1-\alpha b_1)$.
# 2. **Divergence.** Above $\alpha b_1 = 1$ the momentum grows without end. A constant in front of
#    the loss, which Adam ignores, is enough. The cap `max_momentum` stops it.
# 3. **Stability.** With $q$ the learning rate times the preconditioned curvature, one mode is
#    stable if and only if $q < 2(1+b)/w$, where $w$ is the gradient's weight. Coupled layers, each
#    with its own $b_l$, have an exact bound too. It needs constant $b_l$.
# 4. **Sensitivity.** An error in the curvature moves $\alpha$ by at most
#    $(\alpha_{\max} - \alpha_{\min}) |\lambda| / 4$ times that error.
#
# An `assert` holds each number to its formula; all are float64.

# %%
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy.special import logit
from sklearn.datasets import make_moons

from lama_optax import exact_trace, hutchinson, lama_scale, layer_curvature

jax.config.update("jax_enable_x64", True)
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
B1, B2, ALPHA_MIN, ALPHA_MAX = 0.9, 0.999, 0.5, 1.5  # the document's


def with_momentum(b, form="paper", max_momentum=None, **options):
    """LAMA whose alpha b1 is ``b``, one entry a layer: Eq. 9 inverted gives the curvature."""
    tx = lama_scale(
        b1=B1, b2=B2, alpha_min=0.0, alpha_max=2.0, sensitivity=1.0, momentum=form,
        max_momentum=max_momentum, **options,
    )  # fmt: skip
    return tx, jnp.asarray(logit(np.asarray(b) / (2.0 * B1)))


# %% [markdown]
# ## 1. The gain of Eq. 6
#
# Let the gradient be constant, $g$, and write $d = \alpha b_1 < 1$. Eq. 6 sums a geometric series,
# and Eq. 3 divides by $1 - b_1^t$:
#
# $$\hat m_t = \frac{1 - b_1}{1 - d} \cdot \frac{1 - d^t}{1 - b_1^t}\, g
# \;\longrightarrow\; \frac{1 - b_1}{1 - \alpha b_1}\, g .$$
#
# Adam's denominator does not depend on $\alpha$, so this is a factor of the learning rate, another
# one for each layer. We run the library on a gradient of 1:

# %%
ALPHAS = np.array([0.5, 0.9, 0.99, 1.0, 1.01, 1.05, 1.1])


def gains(form, steps=400):
    """Updates over the steps for a gradient of 1: the second moment is 1, the update is m_hat."""
    params = {f"alpha = {alpha}": jnp.zeros(()) for alpha in ALPHAS}
    tx, curvature = with_momentum(ALPHAS * B1, form)

    def step(state, _):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return state, jnp.stack(jax.tree.leaves(updates))

    return np.asarray(jax.lax.scan(step, tx.init(params), None, length=steps)[1])


t, d = np.arange(1, 401)[:, None], ALPHAS * B1
paper, ema = gains("paper"), gains("ema")
# eps = 1e-8 beside a root of 1, and rounding of 400 sums.
np.testing.assert_allclose(paper, (1 - B1) / (1 - d) * (1 - d**t) / (1 - B1**t), rtol=1e-7)
np.testing.assert_allclose(ema, 1, rtol=1e-7)

print("alpha   gain at step 1     10    400   (1-b1)/(1-alpha b1)   unit-gain form")
for i, alpha in enumerate(ALPHAS):
    print(
        f"{alpha:5.2f} {paper[0, i]:16.3f} {paper[9, i]:6.3f} {paper[-1, i]:6.3f}"
        f" {(1 - B1) / (1 - d[i]):21.3f} {ema[-1, i]:16.3f}"
    )

# %% [markdown]
# Near $\alpha = 1$ one per cent of $\alpha$ is nine per cent of step size. Before crediting the
# curvature with a gain, compare with another learning rate.
#
# ## 2. Where Eq. 6 diverges, and the cap
#
# $\alpha b_1 > 1$ needs, with the document's numbers,
#
# $$\lambda H > \ln \frac{1/b_1 - \alpha_{\min}}{\alpha_{\max} - 1/b_1}
# = \ln \frac{11}{7} = 0.452 .$$
#
# $H$ is in units of the loss: for any $\lambda > 0$ and $H > 0$ a loss multiplied by
# $c > 0.452 / (\lambda H)$ is beyond. We train the document's network, 2-16-1 with ReLU, on two
# moons with its $\lambda = 0.01$, full batches and $K = 10$. All that we change is the constant $c$
# in front of the loss.

# %%
x, y = make_moons(n_samples=200, noise=0.2, random_state=42)
moons_x, moons_y = jnp.asarray((x - x.mean(0)) / x.std(0)), jnp.asarray(y, float)


def dense_layers(sizes, seed=0):
    """Kernels and biases uniform in +-1/sqrt(fan_in), as the document's framework has them."""
    rng = np.random.default_rng(seed)
    layers = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        draw = rng.uniform(-1, 1, (fan_in + 1, fan_out)) / np.sqrt(fan_in)
        layers[f"Dense_{i}"] = {"kernel": jnp.asarray(draw[1:]), "bias": jnp.asarray(draw[0])}
    return layers


def moons_loss(params, points=moons_x, labels=moons_y):
    first, last = params.values()
    hidden = jax.nn.relu(points @ first["kernel"] + first["bias"])
    logits = (hidden @ last["kernel"] + last["bias"])[:, 0]
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


moons_params = dense_layers([2, 16, 1])


@jax.jit
def moons_run(c, sensitivity, cap, curvature=None):
    """400 steps on c times the loss: loss / c, momenta and norms of mu, by layer.

    Every argument is traced, so that one compilation serves all; a cap of inf is none.
    """
    options = {"estimator": hutchinson(10), "update_interval": 1}
    tx = lama_scale(sensitivity=sensitivity, max_momentum=cap, **options)

    def loss(params):
        return c * moons_loss(params)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        extra = {"value_fn": loss} if curvature is None else {"curvature": curvature}
        updates, state = tx.update(grads, state, params, **extra)
        params = jax.tree.map(lambda p, u: p - 1e-3 * u, params, updates)
        norms = jnp.stack([optax.global_norm(layer) for layer in state.mu.values()])
        return (params, state), (value / c, state.momentum, norms)

    return jax.lax.scan(step, (moons_params, tx.init(moons_params)), None, length=400)[1]


exact = layer_curvature(moons_params, 0, estimator=exact_trace(), value_fn=moons_loss).mean
threshold = np.log((1 / B1 - ALPHA_MIN) / (ALPHA_MAX - 1 / B1))
critical = threshold / (0.01 * exact.max())
print(f"alpha b1 passes 1 at the start from c = {critical:.0f}")
print("      c   largest alpha b1   loss: highest, last    with max_momentum: highest, last")
runs = {}
for c in (1, 100, 1000, 10_000):
    free, capped = (moons_run(float(c), 0.01, cap) for cap in (np.inf, 0.999))
    runs[c] = free, capped
    print(
        f"{c:7} {free[1].max():18.3f} {free[0].max():16.3f} {free[0][-1]:9.3f}"
        f" {capped[0].max():24.3f} {capped[0][-1]:9.3f}"
    )
    assert capped[0][-1] < capped[0][0]
assert runs[10_000][0][0].max() > 20 * runs[1][0][0][0]

HELD = 1.2
held = moons_run(1.0, 0.01, np.inf, jnp.full(2, logit(HELD / B1 - ALPHA_MIN) / 0.01))[2]
held_rate = np.exp(np.polyfit(np.arange(200, 400), np.log(held[200:]), 1)[0])
# After 200 steps of growth what the gradients add is below rounding.
np.testing.assert_allclose(held_rate, HELD, rtol=1e-6)

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.semilogy(held[:, 1] / held[0, 1], color=ORANGE)
left.semilogy(HELD ** np.arange(400.0), "k--", lw=1)
left.text(85, 1e4, "dashed: 1.2ᵗ")
left.set(xlim=(0, 150), ylim=(0.1, 1e13), xlabel="step t", ylabel="norm of m, first step = 1")
left.set_title(r"Held at $\alpha b_1 = 1.2$, the momentum grows for ever", fontsize=11)
for cap, colour, name, height in (
    (0, ORANGE, "no cap", 60),
    (1, BLUE, "max_momentum = 0.999", 0.7),
):
    right.semilogy(runs[10_000][cap][0], color=colour)
    right.text(400, height, name, color=colour, ha="right")
right.set(xlabel="step", ylabel="loss / c")
right.set_title("A loss times 10 000: the cap keeps it training", fontsize=11)
plt.show()

# %% [markdown]
# Without a cap the loss rises hundreds of times, if not for ever: where the momentum throws the
# parameters, the loss is flat or linear, $H$ is small and $\alpha b_1$ below 1 again, until the
# next burst. With the cap, which is the default, it trains.
#
# ## 3. The stability bound with a momentum for each layer
#
# Assumptions, those of Cohen et al., *Adaptive gradient methods at the edge of stability*
# (arXiv 2207.14484): the loss is its quadratic model with Hessian $H$, the preconditioner
# $P = 1/(\sqrt{\hat v} + \varepsilon)$ is frozen, the bias corrections are over. We add that every
# layer's $b_l$ is constant. With $\theta = P^{1/2} x$ and the learning rate $\eta$ the step is
#
# $$m \leftarrow B m + W A x, \qquad x \leftarrow x - m, \qquad
# A = \eta\, P^{1/2} H P^{1/2} .$$
#
# $B$ and $W$ are diagonal and constant on each layer: $W = 1 - B$ is the unit-gain form,
# $W = 1 - b_1$ with $B = \alpha b_1$ is Eq. 6.
#
# **One mode** of curvature $q$, an eigenvalue of $A$, has the characteristic polynomial
# $z^2 - (1 + b - w q) z + b$. By the Schur-Cohn conditions it is stable if and only if
#
# $$0 < q < S(b) = \frac{2 (1 + b)}{w}: \qquad
# \text{unit gain } \frac{2(1+b)}{1-b}, \quad \text{Eq. 6 } \frac{2(1 + \alpha b_1)}{1 - b_1} .$$
#
# **Coupled layers.** An eigenvalue $z \ne 0$ with vector $x$ satisfies $(A + D(z)) x = 0$, where
# $D_i(z) = (z - 1)(z - b_i) / (w_i z)$. For $z = e^{i\varphi}$ multiply by $x^*$: $A$ is symmetric,
# so the imaginary part is $\sin\varphi \sum_i |x_i|^2 (1 - b_i)/w_i = 0$. With all $b_i < 1$ that
# leaves $z = 1$, where $A x = 0$, and $z = -1$, where $A x = S x$. So for a positive definite $A$
# that is raised from 0 the roots leave the circle where $S - A$ is singular, and stay outside:
#
# $$\boxed{\text{stable} \iff \rho = \lambda_{\max}\big(S^{-1/2} A\, S^{-1/2}\big) < 1}, \qquad
# \max_l\, q_l / S_l \;\le\; \rho \;\le\; \sum_l q_l / S_l ,$$
#
# with $q_l$ the largest eigenvalue of layer $l$'s own block. So no layer may pass its own bound,
# and that alone is not enough: three layers, each at a third of its bound, can be unstable
# together. The average curvature of a layer is much smaller than $q_l$, and says nothing of
# stability below.
#
# We check it by the library's own update, differentiated at a minimum, and by bisection on the
# scale of random matrices $A$, which knows no formula.

# %%
FORMS = {"unit gain": lambda b: 1 - b, "Eq. 6": lambda b: np.full_like(b, 1 - B1)}


def companion(a, b, w):
    """Maps (x, m) to the next (x, m), for matrices a (..., n, n) and rows b and w (..., n)."""
    wa, decay = w[..., None] * a, b[..., None] * np.eye(b.shape[-1])
    return np.block([[np.eye(b.shape[-1]) - wa, -decay], [wa, decay]])


def bisect(a, b, w, low=1e-3, high=1e3):
    """Largest stable scale of ``a``, by 60 halvings of a ratio, for a batch of problems."""
    low, high = np.full(len(a), low), np.full(len(a), high)
    for _ in range(60):
        middle = np.sqrt(low * high)
        roots = np.linalg.eigvals(companion(middle[:, None, None] * a, b, w))
        stable = np.abs(roots).max(-1) < 1
        low, high = np.where(stable, middle, low), np.where(stable, high, middle)
    return low


def library_matrix(a, b, form):
    """The library's step on x A x / 2, one parameter a layer, differentiated at its minimum."""
    tx, curvature = with_momentum(b, form, eps=0.0)
    names = [f"layer_{i}" for i in range(len(b))]

    def step(z):
        params, mu = ({k: row[i] for i, k in enumerate(names)} for row in z.reshape(2, -1))
        state = tx.init(params)
        # Long after the start; the next v is 1, so that P = 1 and the rate, 1, is in A.
        tracker = state.tracker._replace(count=jnp.asarray(10**6, jnp.int32))
        late = state._replace(tracker=tracker, weight_sum=jnp.ones_like(state.weight_sum))
        late = late._replace(mu=mu, nu=jax.tree.map(lambda p: jnp.full_like(p, 1 / B2), params))
        x = jnp.stack([params[k] for k in names])
        grads = dict(zip(names, a @ x, strict=True))
        updates, late = tx.update(grads, late, params, curvature=curvature)
        x = x - jnp.stack([updates[k] for k in names])
        return jnp.concatenate([x, jnp.stack([late.mu[k] for k in names])])

    return jax.jit(jax.jacfwd(step))(jnp.zeros(2 * len(b)))


rng = np.random.default_rng(0)
PROBLEMS, SIZE, LAYERS = 200, 6, 3
factors = rng.normal(size=(PROBLEMS, SIZE, SIZE))
coupled = factors @ factors.transpose(0, 2, 1)
coupled /= np.linalg.eigvalsh(coupled)[:, -1, None, None]
b = np.repeat(rng.uniform(0, 0.98, (PROBLEMS, LAYERS)), SIZE // LAYERS, axis=1)

for name, form in (("unit gain", "ema"), ("Eq. 6", "paper")):
    w = FORMS[name](b)
    ours = library_matrix(jnp.asarray(coupled[0]), b[0], form)
    np.testing.assert_allclose(ours, companion(coupled[0], b[0], w[0]), atol=1e-12)
    bound = 2 * (1 + b) / w
    scaled = coupled / np.sqrt(bound[:, :, None] * bound[:, None, :])
    found = bisect(coupled, b, w)
    # The root crosses -1 at a finite speed: rounding of 1e-13 in it is as much in the scale.
    np.testing.assert_allclose(found, 1 / np.linalg.eigvalsh(scaled)[:, -1], rtol=1e-9)
    blocks = [scaled[:, i : i + 2, i : i + 2] for i in range(0, SIZE, 2)]
    largest = found * np.max([np.linalg.eigvalsh(block)[:, -1] for block in blocks], axis=0)
    print(
        f"{name:10} bisection and formula agree in {PROBLEMS} problems; where stability ends, the"
        f" largest layer is at {largest.min():.2f} to {largest.max():.2f} of its own bound"
    )

# %% [markdown]
# ### A momentum that fluctuates
#
# $\alpha$ follows a noisy estimate, so $b$ changes from step to step, and a product of stable
# matrices need not be stable. In the unit-gain form the weight $1 - b$ fluctuates with it.


# %%
def growth(q, draw, weights, steps=20_000, seed=0):
    """Mean growth per step, as a logarithm, of one mode with drawn b."""
    rng = np.random.default_rng(seed)
    x, m, total = np.ones_like(q), np.zeros_like(q), np.zeros_like(q)
    for _ in range(steps):
        b = np.asarray(draw(rng))
        m = b * m + weights(b) * q * x
        x = x - m
        norm = np.hypot(x, m)
        x, m, total = x / norm, m / norm, total + np.log(norm)
    return total / steps


relative_q = np.linspace(0.05, 1.25, 49)
DRAWS = {"constant": lambda rng: 0.9, "drawn": lambda rng: rng.uniform(0.85, 0.95)}
LOOKS = {("unit gain", "constant"): (BLUE, "-"), ("unit gain", "drawn"): (ORANGE, "-")}
LOOKS |= {("Eq. 6", "constant"): (PINK, "--"), ("Eq. 6", "drawn"): (GREEN, ":")}
fig, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
first = {}
for (form, draw), (colour, ls) in LOOKS.items():
    rate = growth(relative_q * 2 * 1.9 / 0.1, DRAWS[draw], FORMS[form])  # b = 0.9: both forms
    first[form, draw] = relative_q[np.argmax(rate > 1e-3)]
    ax.plot(relative_q, rate, color=colour, ls=ls, lw=2, label=f"{form}, b {draw}")
    print(f"{form}, b {draw}: grows from {first[form, draw]:.2f} of the bound")
assert 0.5 < first["unit gain", "drawn"] < 0.65
assert min(first["Eq. 6", "drawn"], first["Eq. 6", "constant"]) > 0.95
ax.axhline(0, color="black", lw=0.8)
ax.set(xlabel="q over the bound of b = 0.9", ylabel="growth per step (logarithm)")
ax.set_ylim(-0.08, 0.15)
ax.set_title("b drawn from 0.85 to 0.95 nearly halves the unit-gain form's bound", fontsize=11)
fig.legend(loc="outside right center", frameon=False)
plt.show()

# %% [markdown]
# So smooth what feeds the unit-gain form: `curvature_decay`, `update_interval`, more probes. Eq. 6,
# whose weight does not fluctuate, keeps its bound.
#
# ## 4. How much the estimator's error moves $\alpha$
#
# Let $f$ be Eq. 9 and $\hat H$ an unbiased estimate of $H$ with standard error $s$. Since
# $f' = (\alpha_{\max} - \alpha_{\min})\, \lambda\, \sigma (1 - \sigma)$ and
# $\sigma (1 - \sigma) \le 1/4$, every estimate obeys
#
# $$|f(\hat H) - f(H)| \le C\, |\hat H - H|, \qquad
# C = (\alpha_{\max} - \alpha_{\min}) |\lambda| / 4 ,$$
#
# and the root mean square error of $\alpha$ is at most $C s$, whatever the distribution. We let the
# library estimate 300 times on one batch of 64, as the document's optimizer sees it.


# %%
def batch_loss(params):
    return moons_loss(params, moons_x[:64], moons_y[:64])


@partial(jax.jit, static_argnames="num_probes")
def estimates(keys, num_probes):
    options = {"estimator": hutchinson(num_probes), "value_fn": batch_loss}
    return jax.lax.map(lambda key: layer_curvature(moons_params, key, **options).mean, keys)


def factor(curvature, sensitivity):
    """Eq. 9, in NumPy."""
    return ALPHA_MIN + (ALPHA_MAX - ALPHA_MIN) / (1 + np.exp(-sensitivity * curvature))


true = layer_curvature(moons_params, 0, estimator=exact_trace(), value_fn=batch_loss).mean
PROBES, LAMBDAS = (1, 10, 100), {0.01: ("o", BLUE), 10.0: ("s", ORANGE)}
fig, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
print("output layer, by probes:  error of H           of alpha        of the step size (factor)")
for sensitivity, (marker, colour) in LAMBDAS.items():
    c, errors, bounds = (ALPHA_MAX - ALPHA_MIN) * sensitivity / 4, [], []
    for num_probes in PROBES:
        means = np.asarray(estimates(jax.random.split(jax.random.key(num_probes), 300), num_probes))
        alpha, estimated = factor(true, sensitivity), factor(means, sensitivity)
        # 1e-15 is the rounding of alpha.
        assert (np.abs(estimated - alpha) <= c * np.abs(means - true) + 1e-15).all()
        logs = np.log(1 - np.minimum(alpha * B1, 0.999))
        logs = logs - np.log(1 - np.minimum(estimated * B1, 0.999))
        rms = [np.sqrt(np.mean(z[:, 1] ** 2)) for z in (means - true, estimated - alpha, logs)]
        errors.append(rms[1])
        bounds.append(c * rms[0])
        shown = f"{rms[0]:19.4f} {rms[1]:18.5f} {np.exp(rms[2]):18.2f}"
        print(f"lambda = {sensitivity:5}, K = {num_probes:3} {shown}")
    ax.loglog(PROBES, errors, marker, ms=8, color=colour, label=f"λ = {sensitivity:g}, measured")
    ax.loglog(PROBES, bounds, color=colour, label=f"λ = {sensitivity:g}, bound C s")
ax.set(xlabel="probes K", ylabel=r"root mean square error of $\alpha$")
ax.set_xticks(PROBES, [str(k) for k in PROBES])
ax.set_title("Measured errors obey the bound (output layer)", fontsize=11)
fig.legend(loc="outside right center", frameon=False)
plt.show()

# %% [markdown]
# At the document's $\lambda$ the error does not matter, since nothing moves. At $\lambda = 10$ the
# output layer's $\alpha b_1$ would pass 1 and stands at the cap. An estimate that is too low takes
# it away from there, and the step size changes by the factor in the last column, until there are so
# many probes that none is. This is the error of the probes; that the batch is a sample comes on
# top.
