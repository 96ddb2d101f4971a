"""Estimators under JAX's modes: half precision, debugging, explicit meshes, abstract sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parts import PARAMS, ROWS, dense, normal, squared_error

from lama_optax import exact_trace, flipout, gauss_newton, hutchinson, lama_scale, layer_curvature

pytestmark = pytest.mark.standard_promotion
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, SLOW(jnp.float16)])
def test_half_precision_under_strict_promotion(dtype):
    """The same probes as in float32, and 20 roundings or so."""

    def example(p, x):
        return squared_error(p, dense(p, x)) + squared_error(p, dense(p, x[0]))

    def estimates(dtype):
        params, batch = optax.tree.cast((PARAMS, ROWS), dtype)
        return jnp.stack(
            [
                layer_curvature(
                    params,
                    0,
                    estimator=estimator,
                    example_value_fn=example,
                    example_output_fn=lambda p, x: jnp.tanh(dense(p, x[0])) @ p["o"]["w"],
                    output_loss_fn=lambda z, x: jnp.sum(z**2),
                    batch=batch,
                ).mean
                for estimator in (flipout(scope="joint"), flipout(), gauss_newton())
            ]
        )

    with jax.numpy_dtype_promotion("strict"):
        half, full = (jax.jit(estimates, static_argnums=0)(x) for x in (dtype, jnp.float32))
    limit = 20 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(half, full, rtol=limit, atol=limit)


@pytest.mark.parametrize(
    "estimator",
    [flipout(), SLOW(flipout(scope="joint")), gauss_newton(), SLOW(hutchinson(1))],
    ids=["flipout", "joint", "gauss_newton", "hutchinson"],
)
def test_debugging_modes_of_jax(estimator):
    params = {"w": normal(0, 3, 2), "conv": normal(1, 2, 1, 2)}

    def outputs(p, x):
        return jax.lax.conv(x[None, None, 0] @ p["w"], p["conv"], (1,), "VALID").reshape(-1)

    arguments = {
        "example_output_fn": outputs,
        "output_loss_fn": lambda z, x: jnp.sum(z**2),
        "example_value_fn": lambda p, x: jnp.sum(outputs(p, x) ** 2),
        "value_fn": lambda p: jnp.mean(jax.vmap(lambda x: jnp.sum(outputs(p, x) ** 2))(ROWS)),
        "batch": ROWS,
    }
    with jax.checking_leaks(), jax.debug_nans(True):
        tx = lama_scale(estimator=estimator)
        _, state = tx.update(params, tx.init(params), params, **arguments)
    assert state.rejected == 0
    assert np.all(state.curvature != 0)


def test_hidden_parameters_are_named():
    params = {"a": jnp.ones((3, 4)), "o": jnp.ones((4, 2))}
    tx = optax.masked(lama_scale(estimator=gauss_newton()), {"a": True, "o": False})
    with pytest.raises(ValueError, match="example_output_fn cannot be evaluated here"):
        tx.update(
            params,
            tx.init(params),
            params,
            batch=ROWS,
            example_output_fn=lambda p, x: x @ p["a"] @ p["o"],
            output_loss_fn=lambda z, x: jnp.sum(z**2),
        )


@pytest.mark.parametrize(
    "estimator",
    [
        flipout(),
        *map(SLOW, (flipout(scope="joint"), gauss_newton())),
        exact_trace(),
        SLOW(hutchinson(1, hvp="finite_difference")),
    ],
    ids=["flipout", "joint", "gauss_newton", "exact_trace", "hutchinson"],
)
def test_explicit_mesh(estimator):
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    spec = jax.sharding.PartitionSpec

    def outputs(p, x):
        return jnp.tanh(x @ p["a"]) @ p["o"]

    def estimate(params, batch):
        return layer_curvature(
            params,
            0,
            estimator=estimator,
            value_fn=lambda p: jnp.mean(jnp.sum(outputs(p, batch) ** 2, -1)),
            example_value_fn=lambda p, x: jnp.sum(outputs(p, x) ** 2),
            example_output_fn=outputs,
            output_loss_fn=lambda z, x: jnp.sum(z**2),
            batch=batch,
        ).mean

    params, batch = {"a": normal(0, 4, 6), "o": normal(1, 6, 2)}, normal(2, 8, 4)
    expected = jax.jit(estimate)(params, batch)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=explicit)
    with jax.set_mesh(mesh):
        params["o"] = jax.device_put(params["o"], spec(None, "model"))
        found = jax.jit(estimate)(params, jax.device_put(batch, spec("data")))
    # float32 sums in another order; a finite difference divides theirs by the step.
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_sizes_beyond_32_bits():
    params = {"up": jax.ShapeDtypeStruct((80, 8192, 28672), jnp.bfloat16)}

    def example(p, x):
        return jnp.sum(jnp.tanh(x @ p["up"][0].astype(jnp.float32)))

    estimate = functools.partial(
        layer_curvature, key=0, estimator=flipout(), example_value_fn=example
    )
    batch = jax.ShapeDtypeStruct((2, 8192), jnp.float32)
    found = jax.eval_shape(lambda p, batch: estimate(p, batch=batch), params, batch)
    assert found.mean.shape == (1,)
