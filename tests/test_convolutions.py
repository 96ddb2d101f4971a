"""Convolutions in loops and branches: in the order of axes that is fast on a CPU, and the same."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lama_optax import exact_trace, flipout, gauss_newton, hutchinson, layer_curvature
from lama_optax._jaxpr.channels_last import channels_last

# Flax's layers promote implicitly.
pytestmark = pytest.mark.standard_promotion


def image_outputs(params, image):
    """Axes in Flax's order and, of the second convolution, in PyTorch's and Equinox's."""
    x = nn.Conv(4, (3, 3), strides=2).apply({"params": params["first"]}, image)
    x = jnp.moveaxis(nn.relu(x), -1, 0)[None]
    return jax.lax.conv(x, params["second"]["kernel"], (1, 1), "SAME")[0].mean(axis=(1, 2))


def output_loss(outputs, image):
    return jnp.mean((outputs - image[0, 0, 0]) ** 2)


def image_loss(params, image):
    return output_loss(image_outputs(params, image), image)


SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
IMAGE_PARAMS = {
    "first": {"kernel": jnp.full((3, 3, 3, 4), 0.1), "bias": jnp.zeros(4)},
    "second": {"kernel": jnp.full((5, 4, 2, 2), 0.1)},
}
IMAGES = jnp.linspace(-1, 1, 8 * 6 * 6 * 3).reshape(8, 6, 6, 3)


@pytest.mark.parametrize(
    "estimator",
    [
        hutchinson(3),
        flipout(3, scope="joint"),
        exact_trace(),
        gauss_newton(),
        SLOW(hutchinson(3, scope="block")),
        *(SLOW(hutchinson(3, hvp="finite_difference", scope=s)) for s in ("joint", "block")),
        SLOW(flipout(3, scope="block")),
    ],
    ids=str,
)
def test_convolutions_in_branches_have_their_axes_in_the_order_of_fast_code(estimator):
    """XLA's CPU compiler brings others into it outside of loops and branches alone."""

    def estimate(params):
        return layer_curvature(
            params,
            0,
            estimator=estimator,
            value_fn=lambda p: jnp.mean(jax.vmap(image_loss, (None, 0))(p, IMAGES)),
            example_value_fn=image_loss,
            example_output_fn=image_outputs,
            output_loss_fn=output_loss,
            batch=IMAGES,
        ).mean

    @jax.jit
    def step(params, is_due):
        return jax.lax.cond(is_due, estimate, lambda p: jnp.zeros(2), params)

    program = step.lower(IMAGE_PARAMS, True).compile().as_text()
    orders = re.findall(r" convolution\(.*dim_labels=(\w+->\w+)", program)
    assert orders
    assert set(orders) == {"b01f_01io->b01f"}


@pytest.mark.parametrize(
    ("shape", "kernel", "axes", "settings"),
    [
        SLOW((2, 6, 7, 4), (3, 2, 4, 5), ("NHWC", "HWIO", "NHWC"), {}),
        ((2, 4, 6, 7), (5, 4, 3, 2), ("NCHW", "OIHW", "NCHW"), {"window_strides": (2, 1)}),
        ((6, 2, 7, 4), (4, 3, 5, 2), ("HNWC", "IHOW", "CWHN"), {"rhs_dilation": (1, 2)}),
        ((2, 9, 4), (3, 2, 6), ("NHC", "HIO", "NHC"), {"feature_group_count": 2}),
        ((4, 3, 9), (6, 3, 2), ("NCH", "OIH", "NCH"), {"batch_group_count": 2}),
        SLOW((2, 9, 4), (3, 4, 6), ("NHC", "HIO", "NHC"), {"lhs_dilation": (2,)}),
        SLOW((2, 3, 4, 5, 3), (2, 2, 2, 3, 2), ("NDHWC", "DHWIO", "NDHWC"), {}),
    ],
)
def test_every_convolution_and_its_derivatives_keep_their_values(shape, kernel, axes, settings):
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate((shape, kernel)))
    num_spatial = len(shape) - 2
    settings = {"window_strides": (1,) * num_spatial, "padding": [(1, 2)] * num_spatial} | settings

    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=axes, **settings)

    def loss(x, w):
        return jnp.sum(jnp.sin(convolve(x, w)))

    def derivatives(x, w):
        gradient = jax.grad(loss, (0, 1))
        return jax.jvp(gradient, (x, w), (jnp.ones_like(x), jnp.ones_like(w)))

    changed = channels_last(derivatives, frozenset({"conv_general_dilated"}))
    both = jax.jit(lambda x, w: (changed(x, w), derivatives(x, w)))
    for ours, plain in zip(*map(jax.tree.leaves, both(x, w)), strict=True):
        # float32 sums of up to 84 products in another order
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-4)
