"""An estimator of one's own, from CONTRIBUTING's recipe, with public names alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lama_optax
from lama_optax import Estimator, LayerCurvature, Layers, layer_curvature, layer_report


@dataclasses.dataclass(frozen=True)
class SquaredGradient:
    """|grad L|^2 of the batch, by layer: an example of the interface, no curvature."""

    scale: float = 1.0

    def estimate(self, key, params, layers: Layers, /, *, value_fn=None, **extra_args):
        """One gradient; ``layers`` sums by layer and divides by the layers' sizes."""
        del key, extra_args
        squares = jax.tree.map(lambda g: self.scale * g**2, jax.grad(value_fn)(params))
        return LayerCurvature.from_trace(layers, layers.sum(squares), None)


PARAMS = {"a": {"w": jnp.asarray([1.0, 2.0])}, "b": {"w": jnp.asarray([[3.0]])}}


def value_fn(params):
    return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def test_outside_an_optimizer():
    assert isinstance(SquaredGradient(), Estimator)
    found = layer_curvature(PARAMS, 0, estimator=SquaredGradient(), value_fn=value_fn)
    assert found.mean.tolist() == [2.5, 9.0]
    assert jnp.isnan(found.std_error).all()
    assert found.size.tolist() == [2, 1]


@pytest.mark.standard_promotion  # of optax.adamw
@pytest.mark.parametrize("layers", ["module", "leaf"])
def test_in_a_tracker(layers):
    tx = optax.chain(
        lama_optax.track_curvature(SquaredGradient(2.0), layers=layers), optax.adamw(1e-3)
    )
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value_fn=value_fn, other="ignored")
    report = layer_report(state, PARAMS, layers)
    np.testing.assert_allclose([row["curvature"] for row in report.values()], [5.0, 18.0])


def test_layers_are_static():
    """A record that can be hashed and is no pytree, so that `jax.jit` never sees its numbers."""
    seen = []

    class Keep(SquaredGradient):
        def estimate(self, key, params, layers, /, **extra_args):
            seen.append(layers)
            return super().estimate(key, params, layers, **extra_args)

    layer_curvature(PARAMS, 0, estimator=Keep(), value_fn=value_fn)
    (layers,) = seen
    assert isinstance(layers, lama_optax.Layers)
    assert hash(layers) == hash(dataclasses.replace(layers))
    assert jax.tree.leaves(layers) == [layers]
