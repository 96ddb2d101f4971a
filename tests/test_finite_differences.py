"""`hutchinson(hvp="finite_difference")`: the error of its step, against the exact product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS, over_seeds

from lama_optax import hutchinson, layer_curvature

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


def cubic_errors(steps, dtype):
    """Estimates minus truth for w^3 at w = 1, one probe v = +-1 for each step.

    The gradient is 3 w^2, so (g(1 + delta v) - g(1)) / delta = 6 v + 3 delta v^2, and the error
    of v H v is 3 delta v: first order and nothing else.
    """

    def one(p, step):
        estimator = hutchinson(1, hvp="finite_difference", fd_step=step)
        return layer_curvature(p, 0, estimator=estimator, value_fn=lambda p: p["w"] ** 3).mean[0]

    found = jax.jit(lambda p: [one(p, step) for step in steps])({"w": jnp.ones((), dtype)})
    return np.abs(np.asarray(found) - 6.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_finite_differences_error_is_first_order(dtype):
    """From a step where truncation rules down to the step where rounding is as large."""
    eps = float(np.finfo(dtype).eps)
    root = float(np.sqrt(eps))
    steps = np.logspace(0, -6, 7)
    steps = steps[steps > np.sqrt(24 * eps / 3)]
    with jax.enable_x64(dtype == "float64"):
        *errors, best, beneath = cubic_errors([*steps.tolist(), root, 0.1 * eps], dtype)
    # w + delta v is rounded by eps/2, the gradient there (at most 12) by 2 eps, the difference
    # of gradients by less: in all fewer than 3 (1 + delta)^2 x 4 eps, over delta.
    assert (np.abs(errors - 3 * steps) <= 12 * (1 + steps) ** 2 * eps / steps).all(), errors
    # Error 3 delta + O(eps)/delta: best near the root of eps.
    assert best <= 15 * root * 1.01
    assert np.isnan(beneath)  # below the grid at 1 there is no step to take


@pytest.mark.parametrize(
    ("model", "scope"), [("mlp", "joint"), SLOW("mlp", "block"), SLOW("convolution", "block")]
)
def test_the_finite_difference_converges_on_a_network(x64, model, scope):
    """The same probes, a step ten times smaller: a difference from the exact product of a tenth."""
    params, loss_fn = MODELS[model](jnp.float64)
    estimators = [
        hutchinson(1, hvp=hvp, fd_step=step, scope=scope)
        for hvp, step in [("exact", 1.0), ("finite_difference", 1e-3), ("finite_difference", 1e-4)]
    ]
    exact, *approximate = [result.mean for result in over_seeds(5, params, loss_fn, *estimators)]
    coarse, fine = (np.linalg.norm(mean - exact) for mean in approximate)
    # The next order is smaller by delta times a ratio of derivatives, which is below 30 for
    # these losses: 3 % of the ratio. Rounding, eps/delta = 2e-12, is far below the fine error.
    assert coarse > 1e-6
    np.testing.assert_allclose(coarse / fine, 10, rtol=0.03)
