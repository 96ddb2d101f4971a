"""Losses that are no mean over examples: flipout and gauss_newton refuse them, or give NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from parts import ROWS, normal

from lama_optax import flipout, gauss_newton, layer_curvature

pytestmark = pytest.mark.standard_promotion


class _Normalised(nn.Module):
    norm: str

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3,), name="conv")(x) if x.ndim == 3 else nn.Dense(4, name="dense")(x)
        kinds = {
            "batch": lambda: nn.BatchNorm(use_running_average=False),
            "slow batch": lambda: nn.BatchNorm(use_running_average=False, use_fast_variance=False),
            "running": lambda: nn.BatchNorm(use_running_average=True),
            "layer": nn.LayerNorm,
            "group": lambda: nn.GroupNorm(2),
            "instance": nn.InstanceNorm,
        }
        return jnp.tanh(kinds[self.norm]()(x))


def _normalised(norm, shape):
    """Functions of one example, of its outputs and of the batch."""
    net = _Normalised(norm)
    shapes = jax.eval_shape(lambda: dict(net.init(jax.random.key(0), jnp.ones((1, *shape)))))
    variables = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)  # only traced here
    params = variables.pop("params")
    batch = normal(0, 5, *shape)

    def apply(p, x):
        return net.apply({"params": p} | variables, x, mutable=["batch_stats"])[0]

    return params, {
        "example_value_fn": lambda p, x: jnp.mean((apply(p, x[None]) - 1) ** 2),
        "example_output_fn": lambda p, x: apply(p, x[None])[0].reshape(-1),
        "output_loss_fn": lambda z, x: jnp.mean((z - 1) ** 2),
        "value_fn": lambda p: jnp.mean((apply(p, batch) - 1) ** 2),
        "batch": batch,
    }


@pytest.mark.parametrize("estimator", [flipout(), gauss_newton()], ids=["flipout", "gauss_newton"])
@pytest.mark.parametrize("norm", ["batch", "slow batch"])
@pytest.mark.parametrize("shape", [(3,), (6, 3)], ids=["dense", "convolution"])
def test_batch_norm_of_one_example_is_refused(estimator, norm, shape):
    params, arguments = _normalised(norm, shape)
    del arguments["value_fn"]
    with pytest.raises(ValueError, match=r"BatchNorm in training mode.*fisher\(\)"):
        layer_curvature(params, 0, estimator=estimator, **arguments)


@pytest.mark.parametrize("norm", ["running", "layer", "group", "instance"])
@pytest.mark.parametrize("shape", [(6, 3)], ids=["convolution"])
def test_other_normalisations_pass(norm, shape):
    params, arguments = _normalised(norm, shape)
    shapes = jax.eval_shape(
        lambda p: layer_curvature(p, 0, estimator=flipout(scope="joint"), **arguments), params
    )
    assert shapes.mean.shape == (2,)


def _quadratic(p, x):
    return jnp.sum((x @ p["w"]) ** 2)


def _mean(p):
    return jnp.mean(jax.vmap(_quadratic, (None, 0))(p, ROWS))


def _centred(p):
    return jnp.mean(jax.vmap(_quadratic, (None, 0))(p, ROWS - jnp.mean(ROWS, 0)))


def _dropped(p):
    kept = jax.random.bernoulli(jax.random.key(0), 0.5, ROWS.shape)
    return jnp.mean(jax.vmap(_quadratic, (None, 0))(p, ROWS * kept))


def _estimate(params, estimator, value_fn):
    return layer_curvature(
        params,
        0,
        estimator=estimator,
        value_fn=value_fn,
        example_value_fn=_quadratic,
        example_output_fn=lambda p, x: (x @ p["w"]).reshape(-1),
        output_loss_fn=lambda z, x: jnp.sum(z**2),
        batch=ROWS,
    ).mean


@pytest.mark.parametrize("estimator", [flipout(), gauss_newton()], ids=["flipout", "gauss_newton"])
def test_a_value_fn_of_another_loss_is_told(estimator):
    """Where the batch's loss is no mean over examples, for whatever reason."""
    params = {"w": normal(0, 3, 2)}
    with pytest.raises(ValueError, match=r"value_fn must be of one loss.*fisher\(\)"):
        _estimate(params, estimator, _centred)
    value_fns = (None, _mean, lambda p: (_mean(p), "aux"), _dropped, _centred)
    plain, *others, centred = jax.jit(lambda p: [_estimate(p, estimator, f) for f in value_fns])(
        params
    )
    for other in others:
        np.testing.assert_allclose(other, plain, rtol=1e-6)
    assert np.isnan(centred).all()  # a compiled program cannot raise


def test_a_loss_with_aux_is_named_by_its_argument():
    with pytest.raises(ValueError, match=r"example_value_fn must return a scalar.*value alone"):
        layer_curvature(
            {"w": jnp.ones(3)},
            0,
            estimator=flipout(),
            example_value_fn=lambda p, x: (jnp.sum(p["w"] * x), {}),
            batch=jnp.ones((2, 3)),
        )
