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
# # Step size, divergence and stability of layer-adaptive momentum
#
# Four questions about the paper's Eq. 6, $m_l \leftarrow \alpha_l b_1\, m_l + (1 - b_1)\, g_l$, and
# its unit-gain form (`momentum="ema"`), $m_l \leftarrow b_l m_l + (1 - b_l)\, g_l$. What we find:
#
# 1. **Gain.** Under Eq. 6 $\alpha$ multiplies the step size by $(1-b_1)/(1-\alpha b_1)$.
# 2. **Divergence.** Above $\alpha b_1 = 1$ the momentum grows as $(\alpha b_1)^t$ for as long as
#    $\alpha$ stays there. A constant in front of the loss, which Adam ignores, is enough.
#    `max_momentum` stops it.
# 3. **Stability.** With $q$ the learning rate times the preconditioned curvature, one mode is
#    stable if and only if $q < 2(1+b)/(1-b)$. For coupled layers, each with its own $b_l$, the
#    exact bound is $\rho < 1$, where $\rho$ is the largest eigenvalue of the preconditioned
#    Hessian times the learning rate, each layer's rows and columns divided by the root of its own
#    bound. Full-batch training settles at
#    $\rho = 1$. The bound needs $b$ to be constant: in the unit-gain form, a $b$ that fluctuates
#    can halve it.
# 4. **Estimation error.** An error in the curvature moves $\alpha$ by at most
#    $(\alpha_{\max} - \alpha_{\min}) |\lambda| / 4$ times that error.
#
# Each is derived, then measured and held to by an `assert`; all numbers are float64.

# %%
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import LinearOperator, eigsh
from scipy.special import erf, logit
from sklearn.datasets import load_digits, make_moons

from lama_optax import exact_trace, hutchinson, lama_scale, layer_curvature

jax.config.update("jax_enable_x64", True)
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 64})
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
B1, B2, ALPHA_MIN, ALPHA_MAX = 0.9, 0.999, 0.5, 1.5  # the paper's


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
# $$m_t = (1 - b_1) \frac{1 - d^t}{1 - d}\, g, \qquad
# \hat m_t = \frac{1 - b_1}{1 - d} \cdot \frac{1 - d^t}{1 - b_1^t}\, g
# \;\longrightarrow\; \frac{1 - b_1}{1 - \alpha b_1}\, g .$$
#
# The first step has gain 1 whatever $\alpha$ is; then the gain drifts, over $1/(1-d)$ steps, to a
# value that is 1 only for $\alpha = 1$. The denominator of Adam's step does not depend on $\alpha$,
# so this is a factor of the learning rate, another one for each layer. We run the library:

# %%
STEPS = 400
ALPHAS = np.array([0.5, 0.9, 0.99, 1.0, 1.01, 1.05, 1.1])


def gains(form):
    """Updates over STEPS steps for a gradient of 1: the second moment is 1, the update is m_hat."""
    params = {f"alpha = {alpha}": jnp.zeros(()) for alpha in ALPHAS}
    tx, curvature = with_momentum(ALPHAS * B1, form)

    def step(state, _):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return state, jnp.stack(jax.tree.leaves(updates))

    return np.asarray(jax.lax.scan(step, tx.init(params), None, length=STEPS)[1])


t, d = np.arange(1, STEPS + 1)[:, None], ALPHAS * B1
paper, ema = gains("paper"), gains("ema")
derived = (1 - B1) / (1 - d) * (1 - d**t) / (1 - B1**t)
# eps = 1e-8 beside a root of 1, and rounding of 400 sums.
np.testing.assert_allclose(paper, derived, rtol=1e-7)
np.testing.assert_allclose(ema, 1, rtol=1e-7)
np.testing.assert_allclose(paper[0], 1, rtol=1e-7)
# What is left of d^t after 400 steps: 0.99^400 = 0.018 for the slowest.
np.testing.assert_allclose(paper[-1], (1 - B1) / (1 - d), rtol=0.02)

print("alpha   b = alpha b1   gain at step 1     10    400   (1-b1)/(1-b)   unit-gain form")
for i, alpha in enumerate(ALPHAS):
    print(
        f"{alpha:5.2f} {d[i]:14.3f} {paper[0, i]:16.3f} {paper[9, i]:6.3f} {paper[-1, i]:6.3f}"
        f" {(1 - B1) / (1 - d[i]):14.3f} {ema[-1, i]:16.3f}"
    )

# %% [markdown]
# At $\alpha = 1$ one per cent of $\alpha$ is nine per cent of step size, since
# $\partial \ln \mathrm{gain} / \partial \alpha = b_1 / (1 - \alpha b_1)$. Before crediting the
# curvature with a gain, compare with another learning rate.

# %% [markdown]
# ## 2. Where Eq. 6 diverges
#
# $\alpha b_1 > 1$ needs $\mathrm{sigmoid}(\lambda H) > (1/b_1 - \alpha_{\min}) /
# (\alpha_{\max} - \alpha_{\min})$, with the paper's numbers
#
# $$\lambda H > \ln \frac{1/b_1 - \alpha_{\min}}{\alpha_{\max} - 1/b_1}
# = \ln \frac{11}{7} = 0.452 .$$
#
# $H$ is in units of the loss: for any $\lambda > 0$ and $H > 0$ a loss multiplied by
# $c > 0.452 / (\lambda H)$ is beyond. How fast the parameters then grow depends on the gradient's
# answer:
#
# - **bounded gradients** (linear or logistic loss): $m$ grows as $d^t$, the denominator does not:
#   rate $d = \alpha b_1$;
# - **quadratic loss, frozen denominator**: the two roots of $z^2 - (1 + d - (1-b_1) q) z + d = 0$
#   have the product $d$, so the rate is $\sqrt d$ where they are complex, and never less;
# - **quadratic loss, Adam's denominator**: let $\theta \sim r^t$; then $\sqrt v \sim r^t$ too, and
#   the step is $m / \sqrt v \sim (d/r)^t$. It must equal $r^t$: the rate is $r = \sqrt d$ again.


# %%
def growth(loss, b, steps=600, **options):
    """Growth of |theta| per step under the library's update, fitted to the last half."""
    tx, curvature = with_momentum([b], **options)
    rate = 1e-2 * (1 + options.get("eps", 0))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params, curvature=curvature)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return (params, state), jnp.linalg.norm(params["w"])

    params = {"w": jnp.array([1.0, 0.3])}
    norm = jax.lax.scan(step, (params, tx.init(params)), None, length=steps)[1]
    half = np.arange(steps // 2, steps)
    return float(np.exp(np.polyfit(half, np.log(norm[half]), 1)[0]))


def quadratic(p):
    return jnp.sum(jnp.array([50.0, 20.0]) * p["w"] ** 2)


CASES = {
    "linear loss": (lambda p: jnp.sum(p["w"]), {}, lambda d: d),
    # eps = 1e150 dwarfs sqrt(v), so P is frozen; the learning rate is multiplied by the same.
    "quadratic, frozen": (quadratic, {"eps": 1e150}, np.sqrt),
    "quadratic, Adam": (quadratic, {}, np.sqrt),
    "the same, max_momentum": (quadratic, {"max_momentum": 0.999}, lambda b: np.sqrt(0.999)),
}
print(
    "growth per step of |theta|" + "".join(f"    alpha b1 = {b:4.2f} " for b in (1.08, 1.2, 1.35))
)
for name, (loss, options, predicted) in CASES.items():
    rates = [(growth(loss, b, **options), predicted(b)) for b in (1.08, 1.2, 1.35)]
    # Oscillation (frozen) and terms that fall as 1/t (Adam), seen through 300 steps.
    np.testing.assert_allclose(*zip(*rates, strict=True), rtol=1e-3)
    assert all((measured < 1) == ("max_momentum" in options) for measured, _ in rates)
    print(f"{name:26}" + "".join("    {:.4f} ({:.4f})".format(*rate) for rate in rates))

# %% [markdown]
# In brackets the prediction. The cap turns growth into an oscillation that dies out, slowly.
#
# Now the paper's network, 2-16-1 with ReLU on 200 points of two moons, its $\lambda = 0.01$, full
# batches and $K = 10$. All that we change is the constant $c$ in front of the loss.

# %%
x, y = make_moons(n_samples=200, noise=0.2, random_state=42)
moons_x, moons_y = jnp.asarray((x - x.mean(0)) / x.std(0)), jnp.asarray(y, float)


def dense_layers(sizes, seed=0):
    """Kernels and biases uniform in +-1/sqrt(fan_in), as the paper's framework has them."""
    rng = np.random.default_rng(seed)
    layers = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        draw = rng.uniform(-1, 1, (fan_in + 1, fan_out)) / np.sqrt(fan_in)
        layers[f"Dense_{i}"] = {"kernel": jnp.asarray(draw[1:]), "bias": jnp.asarray(draw[0])}
    return layers


def apply(params, hidden, activation):
    for i, layer in enumerate(params.values()):
        hidden = activation(hidden) if i else hidden
        hidden = hidden @ layer["kernel"] + layer["bias"]
    return hidden


def moons_loss(params, points=moons_x, labels=moons_y):
    logits = apply(params, points, jax.nn.relu)[:, 0]
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


@partial(jax.jit, static_argnames="loss")
def exact_curvature(params, loss):
    return layer_curvature(params, 0, estimator=exact_trace(), value_fn=loss).mean


moons_params = dense_layers([2, 16, 1])


@jax.jit
def moons_run(c, sensitivity, cap, curvature=None):
    """400 steps on c times the loss; loss / c, momenta and norms of mu and gradient, by layer.

    Every argument is traced, so that one compilation serves all; a cap of inf is none.
    """
    options = {"estimator": hutchinson(10), "update_interval": 1}
    tx = lama_scale(sensitivity=sensitivity, max_momentum=cap, **options)

    def norms(tree):
        return jnp.stack([optax.global_norm(layer) for layer in tree.values()])

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        extra = {"value_fn": loss} if curvature is None else {"curvature": curvature}
        updates, state = tx.update(grads, state, params, **extra)
        params = jax.tree.map(lambda p, u: p - 1e-3 * u, params, updates)
        return (params, state), (value / c, state.momentum, norms(state.mu), norms(grads))

    def loss(params):
        return c * moons_loss(params)

    return jax.lax.scan(step, (moons_params, tx.init(moons_params)), None, length=400)[1]


threshold = np.log((1 / B1 - ALPHA_MIN) / (ALPHA_MAX - 1 / B1))
exact = exact_curvature(moons_params, moons_loss)
critical = threshold / (0.01 * exact.max())
for factor in (0.999, 1.001):  # H is multiplied by c
    _, momentum, *_ = moons_run(1.0, 0.01, np.inf, factor * critical * exact)
    assert (momentum[0].max() > 1) == (factor > 1)
adam, adam_scaled = moons_run(1.0, 0.0, 0.999)[0], moons_run(1e4, 0.0, 0.999)[0]
# Adam sees c through eps alone: 1e-8 beside gradients of 1e-3, over 400 steps.
np.testing.assert_allclose(adam, adam_scaled, rtol=1e-3)

print(f"H = {exact[0]:.4f}, {exact[1]:.4f}: alpha b1 passes 1 at the start from c = {critical:.0f}")
print("      c   largest alpha b1   loss: highest, last    with max_momentum: highest, last")
runs = {}
for c in (1, 100, 1000, 10_000):
    for cap in (np.inf, 0.999):
        runs[c, cap] = moons_run(float(c), 0.01, cap)
    free, capped = runs[c, np.inf], runs[c, 0.999]
    print(
        f"{c:7} {free[1].max():18.3f} {free[0].max():16.3f} {free[0][-1]:9.3f}"
        f" {capped[0].max():24.3f} {capped[0][-1]:9.3f}"
    )
    assert capped[0][-1] < capped[0][0]
assert runs[10_000, np.inf][0].max() > 20 * adam[0]

# %% [markdown]
# Just above the threshold little happens: as training goes on the curvature falls and $\alpha b_1$
# with it. Far above, the loss rises hundreds of times. It does not rise for ever: where the
# momentum throws the parameters, the loss is flat or linear, $H$ is small and $\alpha b_1$ below 1
# again, until the next burst. Growth without end needs an $\alpha$ that stays. Below, left, we hold
# it; right, each point is one step of the run at $c = 10^4$.

# %%
HELD = 1.2
held_curvature = jnp.full(2, logit(HELD / B1 - ALPHA_MIN) / 0.01)
_, held_momentum, held_mu, _ = moons_run(1.0, 0.01, np.inf, held_curvature)
np.testing.assert_allclose(held_momentum, HELD)
held_rate = np.exp(np.polyfit(np.arange(200, 400), np.log(held_mu[200:]), 1)[0])
# After 200 steps of growth what the gradients add is below rounding.
np.testing.assert_allclose(held_rate, HELD, rtol=1e-6)

_, momentum, mu, grad = (np.asarray(array) for array in runs[10_000, np.inf])
# The triangle inequality for Eq. 6: | |m'| - alpha b1 |m| | <= (1 - b1) |g|, at every step.
slack = 0.1 * grad[1:] * (1 + 1e-9) - np.abs(mu[1:] - momentum[1:] * mu[:-1])
assert (slack >= -1e-12 * mu[1:]).all()
free = 0.1 * grad[1:] < 0.01 * momentum[1:] * mu[:-1]  # the gradient adds less than 1 %
ratio = mu[1:] / mu[:-1]
assert np.sum(free & (momentum[1:] > 1.05)) > 20
np.testing.assert_allclose(ratio[free], momentum[1:][free], rtol=0.01)

fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.3), layout="constrained")
for layer, colour in enumerate((BLUE, ORANGE)):
    name = f"Dense_{layer}"
    left.semilogy(held_mu[:, layer] / held_mu[0, layer], color=colour, label=f"{name}, held")
    left.semilogy(mu[:, layer] / mu[0, layer], color=colour, ls=":", label=f"{name}, c = 10⁴")
    chosen = free[:, layer]
    right.plot(momentum[1:][chosen, layer], ratio[chosen, layer], ".", color=colour, label=name)
left.semilogy(HELD ** np.arange(400.0), "k--", lw=1, label="1.2ᵗ")
left.set(
    xlabel="step", ylabel="norm of m, first step = 1", title=r"$\alpha b_1$ held at 1.2, and free"
)
left.set(xlim=(0, 150), ylim=(0.1, 1e13))
left.legend(frameon=False, fontsize=8)
right.plot([0.5, 1.4], [0.5, 1.4], "k--", lw=1, label="Eq. 6 without g")
right.set(
    xlabel=r"$\alpha b_1$ of the step", ylabel="growth of m in the step", title="One step each"
)
right.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## 3. The stability bound with a momentum for each layer
#
# **Assumptions**, those of Cohen et al., *Adaptive gradient methods at the edge of stability*
# (arXiv 2207.14484): the loss is its quadratic model with Hessian $H$; the preconditioner
# $P = 1/(\sqrt{\hat v} + \varepsilon)$ is frozen; the bias corrections are over. We add that every
# layer's $b_l$ is constant. With $\theta = P^{1/2} x$ the step is
#
# $$m \leftarrow B m + W A x, \qquad x \leftarrow x - m, \qquad
# A = \eta\, P^{1/2} H P^{1/2} ,$$
#
# with $\eta$ the learning rate, $B$ and $W$ diagonal, constant on each layer. $W = 1 - B$ is the
# unit-gain form, $W = 1 - b_1$ (and $B = \alpha b_1$) is Eq. 6, $W = 1$ the classical heavy ball.
#
# **One mode** of curvature $q$, an eigenvalue of $A$: the companion matrix of $(x, m)$ has the
# characteristic polynomial $z^2 - (1 + b - w q) z + b$. By the Schur-Cohn conditions both roots lie
# inside the unit circle if and only if $|b| < 1$, its value at $1$, $w q$, is positive, and so is
# its value at $-1$, $2(1 + b) - w q$:
#
# $$0 < q < S(b) = \frac{2 (1 + b)}{w}: \qquad
# \text{unit gain } \frac{2(1+b)}{1-b}, \quad \text{Eq. 6 } \frac{2(1 + \alpha b_1)}{1 - b_1}, \quad
# \text{heavy ball } 2 (1 + b) .$$
#
# **Coupled layers.** An eigenvalue $z \neq 0$ with vector $x \neq 0$ satisfies
# $(A + D(z))\, x = 0$, $D$ diagonal with
# $$D_i(z) = \frac{(z - 1)(z - b_i)}{w_i z}, \qquad D_i(e^{i\varphi}) =
# -(1 - \cos\varphi) \frac{1 + b_i}{w_i} + i \sin\varphi\, \frac{1 - b_i}{w_i} .$$
# Suppose that $|z| = 1$ and multiply from the left by $x^*$. $A$ is symmetric, so the imaginary
# part is $\sin\varphi \sum_i |x_i|^2 (1 - b_i)/w_i = 0$; all $b_i < 1$ leave $z = 1$, where
# $A x = 0$, and $z = -1$, where $A x = S x$ with $S = \mathrm{diag}(S(b_i))$. Let $A$ be positive
# definite and raise it from $0$: at first all roots are inside, and none can leave before $S - A$
# is singular. Beyond, an eigenvalue of $A + D(z)$ is positive at $z = -1$ and negative for
# $z \to -\infty$: between, at a real $z < -1$, it is zero. So
#
# $$\boxed{\text{stable} \iff \rho = \lambda_{\max}\big(S^{-1/2} A\, S^{-1/2}\big) < 1}$$
#
# and with $q_l$ the largest eigenvalue of layer $l$'s own block of $A$,
# $$\max_l\, q_l / S_l \;\le\; \rho \;\le\; \sum_l q_l / S_l .$$
# The layers' own bounds $q_l < S_l$ are thus necessary; sufficient is that the shares $q_l/S_l$ add
# up to less than 1. A $q$ that is the *mean* of a layer's eigenvalues, which $z^\top A z$
# estimates, is smaller than $q_l$: above the bound it proves instability, below it proves nothing.
#
# We check all of it three ways: eigenvalues of the companion matrix written down by hand, those of
# the library's own update, differentiated by JAX at a minimum (where $\hat v$ does not depend on
# $\theta$ to first order: frozen), and bisection on the scale of $A$, which knows no formula.

# %%
FORMS = {
    "unit gain": lambda b: 1 - b,
    "Eq. 6": lambda b: np.full_like(b, 1 - B1),
    "heavy ball": np.ones_like,
}


def companion(a, b, w):
    """Maps (x, m) to the next (x, m), for matrices a (..., n, n) and rows b and w (..., n)."""
    wa, decay = w[..., None] * a, b[..., None] * np.eye(b.shape[-1])
    return np.block([[np.eye(b.shape[-1]) - wa, -decay], [wa, decay]])


def radius(a, b, w):
    return np.abs(np.linalg.eigvals(companion(a, b, w))).max(-1)


def bisect(a, b, w, low=1e-3, high=1e3):
    """Largest stable scale of ``a``, by 60 halvings of a ratio, for a batch of problems."""
    low, high = np.full(len(a), low), np.full(len(a), high)
    for _ in range(60):
        middle = np.sqrt(low * high)
        stable = radius(middle[:, None, None] * a, b, w) < 1
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

for name, form in [("unit gain", "ema"), ("Eq. 6", "paper")]:
    ours = library_matrix(jnp.asarray(coupled[0]), b[0], form)
    np.testing.assert_allclose(ours, companion(coupled[0], b[0], FORMS[name](b[0])), atol=1e-12)

# %%
print("largest relative difference of bisection and formula")
margins = {}
for name, weights in FORMS.items():
    w = weights(b)
    bound = 2 * (1 + b) / w
    # Uncoupled: the off-diagonal entries are dropped; the first entry to pass its bound decides.
    alone = coupled * np.eye(SIZE)
    alone_formula = (bound / np.diagonal(coupled, axis1=1, axis2=2)).min(1)
    scaled = coupled / np.sqrt(bound[:, :, None] * bound[:, None, :])
    formula = 1 / np.linalg.eigvalsh(scaled)[:, -1]
    blocks = [slice(i, i + 2) for i in range(0, SIZE, 2)]
    shares = np.stack([np.linalg.eigvalsh(scaled[:, i, i])[:, -1] for i in blocks], axis=1)
    means = np.stack([np.trace(scaled[:, i, i], axis1=1, axis2=2) / 2 for i in blocks], axis=1)
    found, found_alone = bisect(coupled, b, w), bisect(alone, b, w)
    # The root crosses -1 at a finite speed: rounding of 1e-13 in it is as much in the scale.
    np.testing.assert_allclose(found, formula, rtol=1e-9)
    np.testing.assert_allclose(found_alone, alone_formula, rtol=1e-9)
    for factor in np.r_[0.05:0.99:20j, 1.01:3:20j]:
        # Stable everywhere below, unstable everywhere above, not at the boundary alone.
        below = radius((factor * formula)[:, None, None] * coupled, b, w) < 1
        assert (below == (factor < 1)).all()
    # Bisection may stop 1e-9 before the boundary.
    assert (found * shares.max(1) < 1 + 1e-9).all()
    assert (found * shares.sum(1) > 1 - 1e-9).all()
    margins[name] = found * shares.max(1), found * shares.sum(1), found * means.max(1)
    print(
        f"{name:10}  uncoupled {np.abs(found_alone / alone_formula - 1).max():.0e},"
        f" coupled {np.abs(found / formula - 1).max():.0e};  at the boundary the largest share is"
        f" {margins[name][0].min():.2f} to {margins[name][0].max():.2f}"
    )

# A matrix of ones attains 1/L: three layers, each at a third of its bound.
alike = np.full((1, LAYERS), 0.9)
found = bisect(np.ones((1, LAYERS, LAYERS)) + 1e-4 * np.eye(LAYERS), alike, 1 - alike)
# The 1e-4 keeps it positive definite.
np.testing.assert_allclose(found, 38 / LAYERS, rtol=1e-4)

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.3), layout="constrained")
grid = np.linspace(0, 0.98, 50)
for (name, weights), colour in zip(FORMS.items(), (BLUE, ORANGE, GREEN), strict=True):
    left.semilogy(grid, 2 * (1 + grid) / weights(grid), color=colour, label=name)
    points = np.linspace(0.02, 0.96, 12)[:, None]
    found = bisect(np.ones((12, 1, 1)), points, weights(points))
    left.semilogy(points, found, "o", color=colour, ms=4)
left.set(xlabel="momentum b of the mode", ylabel="largest stable q", title="One mode")
left.legend(frameon=False)
exact_share, sum_share, mean_share = margins["unit gain"]
bins = np.linspace(0.2, 2.4, 56)
right.hist(exact_share, bins, color=BLUE, alpha=0.7, label="largest share $q_l / S_l$")
right.hist(sum_share, bins, color=ORANGE, alpha=0.7, label="sum of the shares")
right.hist(mean_share, bins, color=PINK, histtype="step", label="largest share, mean q")
right.axvline(1, color="black", ls="--", lw=1.2, label=r"$\rho$, all of them")
right.set(xlabel="value where stability ends", ylabel="problems", title="200 times three layers")
right.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# Left, dots are bisections, lines the formula. Right, where 200 random problems of three coupled
# layers stop to be stable: $\rho = 1$ in each; judged by its own bound no layer is to blame in
# any. Two consequences:
#
# - a learning rate capped layer by layer, $\eta_l \le c\, S_l / (q_l/\eta)$, is guaranteed to be
#   stable for $c \le 1/L$ only;
# - Eq. 6 lets $q$ grow to $2(1+\alpha b_1)/(1-b_1)$, which hardly depends on $\alpha$: 29 to 40 for
#   $\alpha b_1$ from 0.45 to 1. In the unit-gain form it goes from 5 to infinity.
#
# ### What the bound does not cover: a momentum that fluctuates
#
# $\alpha$ follows a noisy estimate, so $b$ changes from step to step, and the product of stable
# matrices need not be stable. In the unit-gain form $w = 1 - b$ fluctuates with it, $q$ times
# that. At half the bound, $q = (1+b)/(1-b)$, the roots are $\pm i \sqrt b$: an oscillation of
# period 4. A $b$ that alternates has period 2, half of that: parametric resonance.


# %%
def mean_square_radius(q, low, high, weights):
    """Spectral radius of the second moments' map, E[T x T] for b uniform in [low, high]."""
    # The entries are polynomials of degree 4 in b: 8 Gauss-Legendre nodes are exact.
    nodes, node_weights = np.polynomial.legendre.leggauss(8)
    b = (low + high) / 2 + (high - low) / 2 * nodes[:, None]
    steps = companion(np.full((8, 1, 1), q), b, weights(b))
    squares = np.einsum("nij,nkl->nikjl", steps, steps).reshape(8, 4, 4)
    return np.abs(np.linalg.eigvals(np.einsum("n,nij->ij", node_weights / 2, squares))).max()


def lyapunov(q, draw, weights, steps=20_000, seed=0):
    """Mean growth per step, as a logarithm, of products of companion matrices with drawn b."""
    rng = np.random.default_rng(seed)
    x, m = np.ones_like(q), np.zeros_like(q)
    total = np.zeros_like(q)
    for t in range(steps):
        b = np.asarray(draw(rng, t))
        m = b * m + weights(b) * q * x
        x = x - m
        norm = np.hypot(x, m)
        x, m, total = x / norm, m / norm, total + np.log(norm)
    return total / steps


DRAWS = {
    "b = 0.9": lambda rng, t: 0.9,
    "b drawn from 0.85 to 0.95": lambda rng, t: rng.uniform(0.85, 0.95),
    "b alternates, 0.85 and 0.95": lambda rng, t: 0.85 if t % 2 else 0.95,
}
bound = 2 * 1.9 / 0.1  # of b = 0.9, the mean; both forms
relative_q = np.linspace(0.05, 1.25, 49)
exponents = {
    (form, name): lyapunov(relative_q * bound, draw, FORMS[form])
    for form in ("unit gain", "Eq. 6")
    for name, draw in DRAWS.items()
}
first, mean_square = {}, {}
for (form, name), exponent in exponents.items():
    first[form, name] = relative_q[np.argmax(exponent > 1e-3)]
    print(f"{form:10} {name:28} grows from {first[form, name]:.2f} of the bound")
for form in ("unit gain", "Eq. 6"):
    radii = [mean_square_radius(q * bound, 0.85, 0.95, FORMS[form]) for q in relative_q]
    mean_square[form] = relative_q[np.argmax(np.array(radii) > 1)]
    print(f"{form:10} b drawn: the mean square grows from {mean_square[form]:.2f} of the bound")
    assert abs(first[form, "b = 0.9"] - 1) < 0.03  # the grid's step is 0.025
    assert mean_square[form] <= first[form, "b drawn from 0.85 to 0.95"]  # Jensen
assert first["unit gain", "b alternates, 0.85 and 0.95"] < 0.4
assert 0.5 < first["unit gain", "b drawn from 0.85 to 0.95"] < 0.65
assert mean_square["unit gain"] < 0.4
assert min(mean_square["Eq. 6"], first["Eq. 6", "b alternates, 0.85 and 0.95"]) > 0.95
# Both momenta of the alternation are stable where it is not: the resonance at (1 + b)/(1 - b).
pair = np.array([[0.85], [0.95]])
both = companion(np.full((2, 1, 1), bound / 2), pair, 1 - pair)
assert (np.abs(np.linalg.eigvals(both)) < 1).all()
assert np.abs(np.linalg.eigvals(both[0] @ both[1])).max() > 1.05

fig, ax = plt.subplots(figsize=(7.5, 2.8), layout="constrained")
for ((form, name), exponent), colour in zip(
    exponents.items(), [BLUE, ORANGE, PINK] * 2, strict=True
):
    ls = "-" if form == "unit gain" else "--"
    ax.plot(relative_q, exponent, color=colour, ls=ls, label=f"{form}, {name}")
ax.axhline(0, color="black", lw=0.8)
ax.set(xlabel="q / bound of b = 0.9", ylabel="growth per step (logarithm)", ylim=(-0.08, 0.15))
ax.set_title("One mode, b fluctuating")
fig.legend(loc="outside right center", frameon=False)
plt.show()

# %% [markdown]
# With $b$ drawn from 0.85 to 0.95 the unit-gain form grows almost surely from 0.57 of the bound on,
# and in the mean square, by rare bursts, from 0.37. Eq. 6, whose weight does not fluctuate, keeps
# its bound. So smooth what feeds the unit-gain form: `curvature_decay`, `update_interval`, more
# probes.
#
# ### On a trained network
#
# An MLP 64-24-24-10 (tanh, squared error) on 300 handwritten digits, full batches, learning rate
# 0.006. Cohen et al. found that Adam trains *at* the bound: the preconditioned sharpness rises to
# $38/\eta$ and stays. Does $\rho$ do so where every layer has its own, moving $b_l$? From the state
# of the optimizer, whose curvature is estimated every 25 steps, we take $P$ and the $b_l$, and
# compute $\rho$, the largest eigenvalue of $A$, the layers' shares and the mean $q$ of each layer
# (Hutchinson, by the library, in the variable $x$). In two further runs $b$ is drawn at each step
# from 0.85 to 0.95, the same for all layers.

# %%
digits = load_digits()
digits_x, digits_y = jnp.asarray(digits.data[:300] / 16), jax.nn.one_hot(digits.target[:300], 10)
RATE, CHUNK = 6e-3, 25


def digits_loss(params):
    return jnp.sum((apply(params, digits_x, jnp.tanh) - digits_y) ** 2) / (2 * len(digits_x))


digits_params = dense_layers([64, 24, 24, 10])
flat, unravel = ravel_pytree(digits_params)
layer_of = np.repeat(np.arange(3), [ravel_pytree(p)[0].size for p in digits_params.values()])


def digits_optimizer(form, sensitivity, alpha_max):
    return lama_scale(sensitivity=sensitivity, alpha_max=alpha_max, momentum=form)


@partial(jax.jit, static_argnames="form")
def digits_steps(params, state, curvatures, form, sensitivity, alpha_max):
    tx = digits_optimizer(form, sensitivity, alpha_max)

    def step(carry, curvature):
        params, state = carry
        grads = jax.grad(digits_loss)(params)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        params = jax.tree.map(lambda p, u: p - RATE * u, params, updates)
        return (params, state), state.momentum

    (params, state), momenta = jax.lax.scan(step, (params, state), curvatures)
    return params, state, momenta.mean(0)


@jax.jit
def hessian_product(params, root, v):
    """diag(root) H diag(root) v."""
    hv = jax.jvp(jax.grad(digits_loss), (params,), (unravel(root * v),))[1]
    return root * ravel_pytree(hv)[0]


def largest_eigenvalue(params, root):
    def product(v):
        return np.asarray(hessian_product(params, root, v.ravel()))

    operator = LinearOperator((root.size, root.size), product, dtype=float)
    start = np.ones(root.size)
    return eigsh(operator, k=1, which="LA", tol=1e-3, v0=start, return_eigenvectors=False)[0]


@jax.jit
def mean_eigenvalues(params, root, key):
    """Of each layer's block of diag(root) H diag(root): the curvature in x, params = root x."""

    def value_fn(x):
        return digits_loss(jax.tree.map(lambda p, r, x: p + r * x, params, unravel(root), x))

    origin = jax.tree.map(jnp.zeros_like, params)
    # One probe at a time, here for the compilation's sake.
    estimator = hutchinson(num_probes=20, chunk_size=1)
    return layer_curvature(origin, key, estimator=estimator, value_fn=value_fn).mean


def trajectory(form, *settings, draw=None, chunks=20):
    params, state = digits_params, digits_optimizer(form, *settings).init(digits_params)
    rng = np.random.default_rng(0)
    rows = []
    for chunk in range(chunks):
        if draw is None:
            curvature = mean_eigenvalues(params, jnp.ones(flat.size), 2 * chunk)
        else:  # lambda = 1: Eq. 9 inverted, the same b for all layers
            curvature = logit(rng.uniform(*draw, (CHUNK, 1)) / B1 - ALPHA_MIN)
        curvatures = jnp.broadcast_to(curvature, (CHUNK, 3))
        params, state, b = digits_steps(params, state, curvatures, form, *settings)
        v_hat = ravel_pytree(state.nu)[0] / (1 - B2 ** float(state.count))
        root = np.sqrt(RATE / (np.sqrt(v_hat) + 1e-8))  # of the rate times P
        bound = 2 * (1 + b) / ((1 - b) if form == "ema" else 1 - B1)
        scaled = root / np.sqrt(bound)[layer_of]
        rows.append(
            {
                "b": b,
                "rho": largest_eigenvalue(params, scaled),
                "q": largest_eigenvalue(params, root),
                "mean share": mean_eigenvalues(params, root, 2 * chunk + 1) / bound,
            }
        )
    shares = [largest_eigenvalue(params, scaled * (layer_of == i)) for i in range(3)]
    columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    return columns | {"shares": np.array(shares)}


RUNS = {
    # form, lambda, alpha_max: below 1.08 alpha b1 stays below 1
    "Adam": ("ema", 0.0, 1.5),
    "unit gain, λ = 10": ("ema", 10.0, 1.08),
    "unit gain, λ = -10": ("ema", -10.0, 1.08),
    "Eq. 6, λ = 10": ("paper", 10.0, 1.08),
}
trajectories = {name: trajectory(*settings) for name, settings in RUNS.items()}
drawn = {
    name: trajectory(form, 1.0, 1.5, draw=(0.85, 0.95))["rho"]
    for form, name in [("ema", "unit gain"), ("paper", "Eq. 6")]
}

print(
    "from step 275 on         rho           largest q   at the end: momenta   shares   mean share"
)
for name, run in trajectories.items():
    late = slice(10, None)
    rho, q, shares = run["rho"][late], run["q"][late], run["shares"]
    print(
        f"{name:18} {rho.min():5.2f} to {rho.max():.2f} {q.min():7.1f} to {q.max():4.1f}"
        f"   {run['b'][-1].round(3)} {shares.round(2)} {run['mean share'][-1].max():.3f}"
    )
    # It oscillates about 1: above, the step overshoots, v grows and lowers rho.
    assert 0.85 < np.median(rho) < 1.15
    assert 0.75 < rho.min() <= rho.max() < 1.25
    # eigsh finds each to 1e-3.
    assert shares.max() <= rho[-1] * 1.005
    assert shares.sum() >= rho[-1] * 0.995
    assert shares.max() < 0.75
    # The mean stays ten times below its bound in every layer, though rho is at its own.
    assert run["mean share"][late].max() < 0.1
for name, rho in drawn.items():
    print(f"{name}, b drawn: rho {rho[late].min():.2f} to {rho[late].max():.2f}")
# Between the two thresholds of one mode, 0.37 and 0.57; and at the bound.
assert 0.3 < np.median(drawn["unit gain"][late]) < 0.6
assert 0.9 < np.median(drawn["Eq. 6"][late]) < 1.1

# %%
COLOURS = dict(zip(RUNS, ("black", BLUE, ORANGE, GREEN), strict=True))
fig, axes = plt.subplots(1, 2, figsize=(8.2, 3), layout="constrained")
for name, run in trajectories.items():
    steps = CHUNK * np.arange(1, len(run["rho"]) + 1)
    axes[0].plot(steps, run["q"], color=COLOURS[name], label=name)
    axes[1].plot(steps, run["rho"], color=COLOURS[name])
for (name, rho), colour in zip(drawn.items(), (PINK, "grey"), strict=True):
    axes[1].plot(steps, rho, color=colour, ls="--", label=f"{name}, b drawn")
axes[0].axhline(38, color="grey", ls=":", label="Adam's bound, 38")
axes[1].axhline(1, color="grey", ls=":")
axes[0].set(title="Largest eigenvalue of A", xlabel="step", ylim=(0, 50))
axes[1].set(title=r"$\rho$", xlabel="step", ylim=(0, 1.4))
fig.legend(loc="outside right center", frameon=False)
plt.show()

# %% [markdown]
# The largest eigenvalue settles at about 8, 20, 35 or 38; $\rho$ at 1 in all four runs, while every
# layer's own share is below three quarters. So the coupled bound is the one that training feels,
# and no layer's $b_l$ sets the limit for that layer alone. The mean $q$ of a layer, cheap and
# without a unit, is ten to a hundred times too small to see any of it. And where $b$ fluctuates,
# the unit-gain form settles at half the bound, Eq. 6 at the bound, as one mode foretold.
#
# Limits: full batches and squared error. Cohen et al. describe what else happens: cross-entropy,
# whose curvature falls as the network becomes certain, and small batches, whose noise keeps the
# sharpness below the bound.
#
# ## 4. How the estimator's error moves $\alpha$
#
# Let $f$ be Eq. 9 and $\hat H$ an unbiased estimate of $H$ with standard error $s$. Since
# $f' = (\alpha_{\max} - \alpha_{\min})\, \lambda\, \sigma (1 - \sigma)$ and
# $\sigma (1 - \sigma) \le 1/4$,
#
# - for **every** estimate $|f(\hat H) - f(H)| \le C\, |\hat H - H|$ with
#   $C = (\alpha_{\max} - \alpha_{\min}) |\lambda| / 4$, a global Lipschitz constant; hence the root
#   mean square error of $\alpha$ is at most $C s$, whatever the distribution;
# - to first order it is $|f'(H)|\, s$, which $C s$ attains at $\lambda H = 0$;
# - $C s$ is no bound on a single error. Where $\hat H$ is normal a share
#   $\mathrm{erf}(C / (\sqrt 2\, |f'|))$ is below it, 68 % at $\lambda H = 0$. At least 3/4 are
#   below $2 C s$, by Chebyshev.
#
# The standard error itself is known. For a Rademacher probe over all layers the variance of
# $v_l^\top (H v)_l$ is $2 \sum_{i \ne j \in l} H_{ij}^2 + \sum_{i \in l,\, j \notin l} H_{ij}^2$.
# We take it from the Hessian of the paper's network on one batch of 64, as the paper's optimizer
# sees it, and let the library estimate 1000 times for each $K$.

# %%
ESTIMATES, PROBE_COUNTS, LAMBDAS = 1000, (1, 10, 100), (0.01, 10.0, -100.0)


def batch_loss(params):
    return moons_loss(params, moons_x[:64], moons_y[:64])


true = np.asarray(exact_curvature(moons_params, batch_loss))
moons_flat, moons_unravel = ravel_pytree(moons_params)
hessian = np.asarray(jax.jit(jax.hessian(lambda p: batch_loss(moons_unravel(p))))(moons_flat))
sizes = np.array([ravel_pytree(layer)[0].size for layer in moons_params.values()])
of_layer = np.repeat([0, 1], sizes)
np.testing.assert_allclose(
    true, [np.diagonal(hessian)[of_layer == i].mean() for i in (0, 1)], rtol=1e-10
)
same = of_layer[:, None] == of_layer
variances = np.sum(hessian**2 * np.where(same, 2, 1) * (1 - np.eye(moons_flat.size)), axis=1)
deviation = np.sqrt([variances[of_layer == i].sum() for i in (0, 1)]) / sizes  # of one probe


@partial(jax.jit, static_argnames="num_probes")
def estimates(keys, num_probes):
    estimator = hutchinson(num_probes)

    def estimate(key):
        return layer_curvature(moons_params, key, estimator=estimator, value_fn=batch_loss)[:2]

    return jax.lax.map(estimate, keys)


def factor(curvature, sensitivity):
    """Eq. 9, in NumPy."""
    return ALPHA_MIN + (ALPHA_MAX - ALPHA_MIN) / (1 + np.exp(-sensitivity * curvature))


print(f"H = {true.round(4)}, deviation of one probe {deviation.round(4)}")
print(
    "                             errors below             rms error of alpha over   rms error of"
)
print("lambda   K  layer    s         Cs (normal)      2Cs       Cs     |f'(H)| s     ln step size")
errors = {}
for num_probes in PROBE_COUNTS:
    keys = jax.random.split(jax.random.key(num_probes), ESTIMATES)
    means, reported = (np.asarray(array) for array in estimates(keys, num_probes))
    s = deviation / np.sqrt(num_probes)
    # A standard deviation over n = 1000 normal numbers errs by 2 %, one over numbers of kurtosis
    # 6, more than is seen at K = 1, by 3.5 %; four times that.
    np.testing.assert_allclose(means.std(0), s, rtol=0.15)
    if num_probes > 1:
        np.testing.assert_allclose(np.sqrt(np.mean(reported**2, axis=0)), s, rtol=0.15)
    for sensitivity in LAMBDAS:
        alpha, estimated = factor(true, sensitivity), factor(means, sensitivity)
        error = np.abs(estimated - alpha)
        c = (ALPHA_MAX - ALPHA_MIN) * abs(sensitivity) / 4
        slope = 4 * c * (alpha - ALPHA_MIN) * (ALPHA_MAX - alpha) / (ALPHA_MAX - ALPHA_MIN) ** 2
        errors[num_probes, sensitivity] = np.abs(means - true), error
        # Lipschitz, for every estimate; 1e-15 is the rounding of alpha.
        assert (error <= c * np.abs(means - true) + 1e-15).all()
        rms = np.sqrt(np.mean(error**2, axis=0))
        # s is the true deviation; that of 1000 estimates may be 15 % off, as above.
        assert (rms <= 1.15 * c * s).all()
        linear = abs(sensitivity) * s < 0.1
        np.testing.assert_allclose(rms[linear], (slope * s)[linear], rtol=0.15)
        below, below_twice = np.mean(error <= c * s, axis=0), np.mean(error <= 2 * c * s, axis=0)
        # Chebyshev, with four standard errors of a share of 3/4 among 1000.
        assert (below_twice >= 0.75 - 4 * np.sqrt(0.75 * 0.25 / ESTIMATES)).all()
        normal = erf(c / slope / np.sqrt(2))
        if num_probes == 100:
            # The mean of 100 is close to normal; four standard errors of a share of 0.68.
            np.testing.assert_allclose(below[linear], normal[linear], atol=0.06)
        log_gain = -np.log(1 - np.minimum(estimated * B1, 0.999))
        log_gain += np.log(1 - np.minimum(alpha * B1, 0.999))
        gain_rms = np.sqrt(np.mean(log_gain**2, axis=0))
        for i in (0, 1):
            print(
                f"{sensitivity:6} {num_probes:3}  Dense_{i} {s[i]:.4f} {below[i]:7.1%}"
                f" ({normal[i]:6.1%}) {below_twice[i]:9.1%} {rms[i] / (c * s[i]):8.3f}"
                f" {rms[i] / (slope[i] * s[i]):10.2f} {gain_rms[i]:15.5f}"
            )
        if (num_probes, sensitivity) == (1, -100.0):
            # Saturated: the slope at H is next to nothing, and no bound on what errors do.
            assert rms[1] > 10 * slope[1] * s[1]
        if (num_probes, sensitivity) == (10, 10.0):
            assert s[0] > 2 * true[0]
            assert gain_rms[1] > np.log(2)

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.5), layout="constrained")
for num_probes, colour in zip(PROBE_COUNTS, (PINK, ORANGE, BLUE), strict=True):
    of_curvature, of_alpha = errors[num_probes, 10.0]
    left.loglog(
        of_curvature[:300, 1], of_alpha[:300, 1], ".", color=colour, ms=3, label=f"K = {num_probes}"
    )
limits = np.array([1e-5, 1])
left.loglog(limits, 10 / 4 * limits, "k--", lw=1.2, label="C times error of H")
left.set(xlabel="error of H", ylabel=r"error of $\alpha$", title="Dense_1, λ = 10: every estimate")
left.set(xlim=limits, ylim=(1e-5, 1))
left.legend(frameon=False)
for sensitivity, marker in zip(LAMBDAS, "os^", strict=True):
    for i, colour in enumerate((BLUE, ORANGE)):
        rms = [np.sqrt(np.mean(errors[k, sensitivity][1][:, i] ** 2)) for k in PROBE_COUNTS]
        bounds = abs(sensitivity) / 4 * deviation[i] / np.sqrt(PROBE_COUNTS)
        right.loglog(PROBE_COUNTS, rms, marker, color=colour)
        right.loglog(PROBE_COUNTS, bounds, color=colour, lw=1)
    right.plot([], [], marker, color="grey", label=f"λ = {sensitivity:g}")
for i, colour in enumerate((BLUE, ORANGE)):
    right.plot([], [], color=colour, label=f"Dense_{i}, C s")
right.set(
    xlabel="probes K", ylabel=r"rms error of $\alpha$", title="Measured (marks), bound (lines)"
)
right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0.0, 0.4))
plt.show()

# %% [markdown]
# - $C \times$ error holds for each of the 18 000 errors, $C s$ for each root mean square. For the
#   paper's $\lambda$ it is exact, as it is wherever $|\lambda| H$ and $|\lambda| s$ are small.
# - Of the single errors about two thirds are below $C s$, as many as normal errors would be; more
#   where the sigmoid saturates. The first-order formula with the slope at $H$ is not a bound: at
#   $\lambda = -100$ the output layer's error is 60 times that.
# - What it means for training: at $K = 10$ the first layer's $s$ is three times its $H$. That is
#   harmless at $\lambda = 0.01$, since nothing moves there. At $\lambda = 10$ the output layer's
#   $\alpha b_1$ is near 1, and from one estimate to the next its step size varies by a factor of
#   $e^{1.3} = 4$.
# - $s$ is the error of the probes for the given batch. That the batch is a sample comes on top.
