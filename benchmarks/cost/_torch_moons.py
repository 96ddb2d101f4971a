"""The paper's algorithm as a reader of the paper would write it in PyTorch: one seed, one loop.

Adam's moments with Eq. 6's momentum; the trace of every layer by Eq. 7 with K probes at every
step, and Hessian-vector products by finite differences of gradients, as the paper prescribes.
"""

import math
import time

import torch
from torch import nn


def seconds_per_step(
    x: torch.Tensor, y: torch.Tensor, *, epochs: int, batch_size: int = 64, num_probes: int = 10
) -> float:
    """Trains the paper's 2-16-1 network; returns the mean seconds of a step."""
    torch.manual_seed(42)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1), nn.Sigmoid())
    layers = [list(module.parameters()) for module in model if isinstance(module, nn.Linear)]
    criterion = nn.BCELoss()
    params = [p for layer in layers for p in layer]
    first = [torch.zeros_like(p) for p in params]
    second = [torch.zeros_like(p) for p in params]
    b1, b2, eps, rate, delta = 0.9, 0.999, 1e-8, 1e-3, 0.01
    alpha_min, alpha_max, sensitivity = 0.5, 1.5, 0.01
    steps, began = 0, time.perf_counter()

    def gradient(of: list[nn.Parameter], xs: torch.Tensor, ys: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(criterion(model(xs)[:, 0], ys), of))

    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch_size):
            xs, ys = x[rows], y[rows]
            grads = gradient(params, xs, ys)
            steps, at = steps + 1, 0
            for layer in layers:
                here = grads[at : at + len(layer)]
                trace = 0.0
                for _ in range(num_probes):  # Eq. 7
                    probe = [torch.randint(0, 2, p.shape) * 2.0 - 1.0 for p in layer]
                    with torch.no_grad():
                        for p, v in zip(layer, probe, strict=True):
                            p.add_(delta * v)
                    shifted = gradient(layer, xs, ys)
                    with torch.no_grad():
                        for p, v in zip(layer, probe, strict=True):
                            p.sub_(delta * v)
                    trace += sum(
                        float(torch.sum(v * (moved - g) / delta))
                        for v, moved, g in zip(probe, shifted, here, strict=True)
                    )
                curvature = trace / num_probes / sum(p.numel() for p in layer)  # Eq. 8
                sigmoid = 1 / (1 + math.exp(-sensitivity * curvature))
                alpha = alpha_min + (alpha_max - alpha_min) * sigmoid  # Eq. 9
                with torch.no_grad():
                    for p, g in zip(layer, here, strict=True):
                        m, v = first[at], second[at]
                        m.mul_(alpha * b1).add_(g, alpha=1 - b1)  # Eq. 6
                        v.mul_(b2).addcmul_(g, g, value=1 - b2)
                        m_hat, v_hat = m / (1 - b1**steps), v / (1 - b2**steps)
                        p.sub_(rate * m_hat / (v_hat.sqrt() + eps))
                        at += 1
    return (time.perf_counter() - began) / steps
