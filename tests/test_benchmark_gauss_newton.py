"""What `python -m benchmarks.traces` holds fisher and its peers against."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

pytest.importorskip("flax")
pytest.importorskip("sklearn")

from benchmarks.lab import _data
from benchmarks.lab._models import CNN, Model, Task, Transformer, tasks
from benchmarks.traces._jax import gauss_newton_products, sums_by_layer
from benchmarks.traces._reference import output_probes
from lama_optax import gauss_newton, layer_curvature

# Flax and optax promote implicitly.
pytestmark = [pytest.mark.standard_promotion, pytest.mark.slow]


def _exact(model):
    task = model.task.supervised(model.batch)
    found = layer_curvature(model.params, 0, estimator=gauss_newton(max_outputs=1000), **task)
    return found.mean * found.size


def _tiny(loss):
    if loss == "tokens":
        network = Transformer(depth=1, width=8, heads=2)
        task = Task("text", "", network, lambda: _data.characters(6), loss, 4, 0)
    else:
        task = tasks(quick=True)["moons" if loss == "binary" else "mlp"]
    return Model(task, task.init(), task.minibatch(0))


@pytest.mark.parametrize("loss", ["binary", "classes", "tokens"])
def test_reference_is_the_gauss_newton_trace(loss):
    model = _tiny(loss)
    estimate = output_probes(model)
    found = np.asarray([estimate(seed) for seed in range(200)], np.float64)
    error = found.std(axis=0, ddof=1) / 200**0.5
    # The worst of up to 13 layers in five standard errors; of one output for each example there is
    # no error but float32's.
    exact = _exact(model)
    assert np.all(abs(found.mean(axis=0) - exact) < 5 * error + 1e-5 * exact)


def test_peers_products_are_with_the_gauss_newton_matrix():
    model = _tiny("binary")
    flat, unravel = ravel_pytree(model.params)
    product = gauss_newton_products(model, unravel, flat, model.batch)
    diagonal = jnp.diag(jax.vmap(product)(jnp.eye(flat.size)))
    found = sums_by_layer(model, unravel(diagonal))
    # float32, sums in another order.
    np.testing.assert_allclose(found, _exact(model), rtol=1e-5)


def test_backpack_has_the_same_networks():
    pytest.importorskip("backpack")
    from benchmarks.traces._torch import backpack_diagonal

    task = Task("cnn", "", CNN((2, 3)), lambda: _data.digits(8), "classes", 16, 0)
    model = Model(task, task.init(), task.minibatch(0))
    estimate = backpack_diagonal()(model)  # compares the losses
    found = np.asarray([estimate(seed) for seed in range(100)])
    error = found.std(axis=0, ddof=1) / 100**0.5
    assert np.all(abs(found.mean(axis=0) - _exact(model)) < 5 * error)
