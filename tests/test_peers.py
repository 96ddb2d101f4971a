"""An independent peer: matfree's diagonal estimator, summed over each layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from matfree import stochtrace
from models import mlp

from lama_optax import hutchinson, layer_curvature

# matfree multiplies and averages with implicit promotion.
pytestmark = pytest.mark.standard_promotion

NUM_PROBES = 1000
SAMPLERS = {
    "rademacher": stochtrace.sampler_signs,
    "gaussian": stochtrace.sampler_normal,
    "sphere": stochtrace.sampler_sphere,
}


def matfrees(probe):
    """Mean and standard error of each layer's average curvature, from the diagonal v * H v.

    The entries of one diagonal sample are correlated, so the standard error is that of the
    samples' sums, not the sum of the entries' errors.
    """
    params, loss_fn = mlp()
    flat, unravel = ravel_pytree(params)
    gradient = jax.grad(lambda x: loss_fn(unravel(x)))
    diagonal = stochtrace.monte_carlo_diagonal()

    def layer_means(matvec, v):
        tree = unravel(diagonal(matvec, v))
        return {
            name: sum(jnp.sum(leaf) for leaf in layer.values())
            / sum(leaf.size for leaf in layer.values())
            for name, layer in tree.items()
        }

    estimate = stochtrace.estimator_monte_carlo_mean_and_sem(
        layer_means, sampler=SAMPLERS[probe](flat, num=NUM_PROBES)
    )
    mean, std_error = jax.jit(
        lambda key: estimate(lambda v: jax.jvp(gradient, (flat,), (v,))[1], key)
    )(jax.random.key(17))
    names = sorted(mean)
    return [np.array([float(tree[name]) for name in names]) for tree in (mean, std_error)]


@pytest.mark.parametrize("probe", SAMPLERS)
def test_matfrees_diagonal_agrees(probe):
    peer_mean, peer_error = matfrees(probe)
    params, loss_fn = mlp()
    estimator = hutchinson(NUM_PROBES, probe=probe)
    result = jax.jit(lambda p: layer_curvature(p, 3, estimator=estimator, value_fn=loss_fn))(params)

    # Independent keys: variances add. An error passes 5 by chance once in a million.
    difference = np.asarray(result.mean) - peer_mean
    assert (abs(difference) <= 5 * np.hypot(result.std_error, peer_error)).all(), difference
    if probe != "sphere":  # matfree's sphere is one for all layers, ours one for each
        # The errors agree too: with K = 1000 each is known to sqrt((kurtosis - 1)/4K), 5 % for a
        # kurtosis of 10; 5 of those, for the difference of two.
        np.testing.assert_allclose(result.std_error, peer_error, rtol=5 * 0.05 * np.sqrt(2))
