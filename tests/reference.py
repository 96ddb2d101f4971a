"""The documents in NumPy float64: written from their formulas, sharing no code with the library.

The model is small enough for its curvature to be written down: with tanh units
``h = tanh(W1 x + b1)``, logit ``z = w2 h + b2``, loss ``softplus(z) - y z``, residual
``r = sigmoid(z) - y`` and ``q = sigmoid(z) (1 - sigmoid(z))``, the second derivatives are

    d2L/dw2_j^2  = q h_j^2                                       d2L/db2^2  = q
    d2L/dW1_ij^2 = (q (w2_j h'_j)^2 + r w2_j h''_j) x_i^2        d2L/db1_j^2: the same with x_i = 1

Where the library runs a recursion over running averages, this file sums the weights explicitly.
"""

import copy
from typing import NamedTuple

import numpy as np

LAYERS = ("Dense_0", "Dense_1")


class Problem(NamedTuple):
    """A data set and initial parameters, shaped like those of a Flax MLP."""

    params: dict
    x: np.ndarray
    y: np.ndarray


def make_problem(seed, samples=12, inputs=2, units=3):
    """Makes labels that no straight line separates, and parameters uniform in +-1."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, inputs))
    y = (x[:, 0] * x[:, 1] > 0).astype(np.float64)
    shapes = {
        "Dense_0": {"kernel": (inputs, units), "bias": (units,)},
        "Dense_1": {"kernel": (units, 1), "bias": (1,)},
    }
    params = {
        layer: {name: rng.uniform(-1, 1, shape) for name, shape in leaves.items()}
        for layer, leaves in shapes.items()
    }
    return Problem(params, x, y)


def _sigmoid(z):
    return 1 / (1 + np.exp(-z))


def _forward(params, problem):
    h = np.tanh(problem.x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    z = (h @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"])[:, 0]
    return h, z


def gradient(params, problem):
    """The gradient of the mean loss."""
    h, z = _forward(params, problem)
    r = (_sigmoid(z) - problem.y) / len(z)
    w2 = params["Dense_1"]["kernel"][:, 0]
    back = r[:, None] * w2 * (1 - h**2)
    return {
        "Dense_0": {"kernel": problem.x.T @ back, "bias": back.sum(0)},
        "Dense_1": {"kernel": (h.T @ r)[:, None], "bias": r.sum(keepdims=True)},
    }


def traces(params, problem):
    """The trace of each layer's exact Hessian block, in the closed form above."""
    h, z = _forward(params, problem)
    s = _sigmoid(z)
    q, r = s * (1 - s), s - problem.y
    w2 = params["Dense_1"]["kernel"][:, 0]
    first, second = 1 - h**2, -2 * h * (1 - h**2)
    inner = q[:, None] * (w2 * first) ** 2 + r[:, None] * w2 * second
    return {
        "Dense_0": np.mean(inner.sum(1) * ((problem.x**2).sum(1) + 1)),
        "Dense_1": np.mean(q * ((h**2).sum(1) + 1)),
    }


def curvature(params, problem):
    """Eq. 8: trace over the number of parameters, of each layer."""
    return {
        layer: trace / sum(leaf.size for leaf in params[layer].values())
        for layer, trace in traces(params, problem).items()
    }


def factor(mean, alpha_min, alpha_max, sensitivity):
    """Eq. 9."""
    return alpha_min + (alpha_max - alpha_min) * _sigmoid(sensitivity * mean)


class Step(NamedTuple):
    """What is known after one step; each but ``params`` is a list over the layers."""

    params: dict
    curvature: list
    alpha: list
    momentum: list
    weight_sum: list


def lama(
    problem,
    steps,
    learning_rate,
    *,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    alpha_min=0.5,
    alpha_max=1.5,
    sensitivity=0.01,
    update_interval=1,
    curvature_decay=0.0,
    momentum="paper",
    max_momentum=None,
    weight_decay=0.0,
):
    """LAMA-Adam, Eqs. 1 to 9 with the exact Hessian; ``learning_rate`` may be a schedule."""
    params = copy.deepcopy(problem.params)
    m, v = ({k: dict.fromkeys(p, 0.0) for k, p in params.items()} for _ in range(2))
    estimates = {layer: [] for layer in LAYERS}
    decays = {layer: [] for layer in LAYERS}
    weights = {layer: [] for layer in LAYERS}
    history = []
    for t in range(1, steps + 1):
        g = gradient(params, problem)
        if (t - 1) % update_interval == 0:
            for layer, mean in curvature(params, problem).items():
                estimates[layer].append(mean)
        averages, alphas, sums = [], [], []
        eta = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        new = copy.deepcopy(params)
        for layer in LAYERS:
            made = np.array(estimates[layer])
            share = (1 - curvature_decay) * curvature_decay ** np.arange(len(made))[::-1]
            average = np.sum(share * made) / np.sum(share)
            alpha = factor(average, alpha_min, alpha_max, sensitivity)
            decay = alpha * b1 if max_momentum is None else min(alpha * b1, max_momentum)
            weight = 1 - b1 if momentum == "paper" else 1 - decay
            decays[layer].append(decay)
            weights[layer].append(weight)
            # What is left at step t of the weight that the gradient of step s came in with.
            left = [weights[layer][s] * np.prod(decays[layer][s + 1 :]) for s in range(t)]
            for name, p in params[layer].items():
                m[layer][name] = decay * m[layer][name] + weight * g[layer][name]
                v[layer][name] = b2 * v[layer][name] + (1 - b2) * g[layer][name] ** 2
                m_hat = m[layer][name] / (1 - b1**t if momentum == "paper" else sum(left))
                v_hat = v[layer][name] / (1 - b2**t)
                new[layer][name] = p - eta * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p)
            averages.append(average)
            alphas.append(alpha)
            sums.append(sum(left))
        params = new
        history.append(Step(params, averages, alphas, [decays[k][-1] for k in LAYERS], sums))
    return history


def lam(problem, steps, learning_rate, *, decay=0.9, eps=1e-8, granularity="weight"):
    """LAM; per layer, v is fed with the mean squared gradient of the layer."""
    params = copy.deepcopy(problem.params)
    v = {layer: dict.fromkeys(leaves, 0.0) for layer, leaves in params.items()}
    history = []
    for _ in range(steps):
        g = gradient(params, problem)
        for layer, leaves in params.items():
            entries = np.concatenate([leaf.ravel() for leaf in g[layer].values()])
            for name in leaves:
                squared = g[layer][name] ** 2 if granularity == "weight" else np.mean(entries**2)
                v[layer][name] = (1 - decay) * squared + decay * v[layer][name]
                leaves[name] = leaves[name] - learning_rate * g[layer][name] / (
                    np.sqrt(v[layer][name]) + eps
                )
        history.append(copy.deepcopy(params))
    return history
