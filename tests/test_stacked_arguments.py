"""Curvature given for stacked layers, and what `stacked` refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lama_optax import lama_scale, layer_names, layer_report, stacked

LAYERS = stacked("blocks")
PARAMS = {
    "blocks": {"bias": np.ones((3, 2), "f4"), "kernel": np.ones((3, 2, 2), "f4")},
    "head": {"kernel": np.ones((2, 1), "f4")},
}


@pytest.mark.parametrize(
    ("curvature", "expected"),
    [
        (np.asarray([1.0, 2.0, 3.0, 4.0], "f4"), [1.0, 2.0, 3.0, 4.0]),
        (
            {
                "blocks": {
                    "bias": np.asarray([1.0, 2.0, 3.0], "f4"),
                    "kernel": np.asarray([4.0, 5.0, 6.0], "f4"),
                },
                "head": {"kernel": 7.0},
            },
            # 2 biases and 4 entries of the kernel a layer.
            [(2 * 1 + 4 * 4) / 6, (2 * 2 + 4 * 5) / 6, (2 * 3 + 4 * 6) / 6, 7.0],
        ),
        ({"blocks": {"bias": 1.0, "kernel": 4.0}, "head": 7.0}, [3.0, 3.0, 3.0, 7.0]),
    ],
    ids=["array", "per-layer", "per-leaf"],
)
def test_curvature_computed_elsewhere(curvature, expected):
    params = jax.tree.map(jnp.asarray, PARAMS)
    tx = lama_scale(layers=LAYERS, sensitivity=0.3)
    _, state = tx.update(params, tx.init(params), params, curvature=curvature)
    np.testing.assert_allclose(state.curvature, expected, rtol=1e-6)  # float32
    alpha = 0.5 + 1 / (1 + np.exp(-0.3 * np.asarray(expected)))
    np.testing.assert_allclose(state.alpha, alpha, rtol=1e-6)
    assert list(layer_report(state, params, LAYERS)) == [
        "blocks[0]",
        "blocks[1]",
        "blocks[2]",
        "head",
    ]


@pytest.mark.parametrize("shape", [(2,), (3, 1), (4,)])
def test_curvature_of_another_depth(shape):
    tx = lama_scale(layers=LAYERS)
    curvature = {"blocks": {"bias": np.ones(shape, "f4"), "kernel": 1.0}, "head": 1.0}
    with pytest.raises(
        ValueError, match=r"curvature must hold a scalar for each leaf \(or one for"
    ):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, curvature=curvature)


# -- what it refuses --------------------------------------------------------------------------


def test_a_name_that_is_no_module():
    with pytest.raises(ValueError, match=r"layers=stacked\('layers',\) names no module of params"):
        layer_names(PARAMS, stacked("layers"))


def test_leaves_of_different_depth():
    params = {"blocks": {"bias": np.ones((2, 4), "f4"), "kernel": np.ones((3, 4, 4), "f4")}}
    with pytest.raises(ValueError, match=r"same leading axis.*\['blocks'\]\['kernel'\] has 3.*2"):
        layer_names(params, LAYERS)


def test_a_scalar_has_no_depth():
    with pytest.raises(ValueError, match=r"\['blocks'\]\['gain'\] is a scalar; a stacked leaf has"):
        lama_scale(layers=LAYERS).init({"blocks": {"gain": np.float32(1)}})


@pytest.mark.parametrize("modules", [(), (1,), (("a",),)])
def test_modules_are_names(modules):
    with pytest.raises(ValueError, match="modules must be one or more names"):
        stacked(*modules)


def test_the_report_needs_the_same_layers():
    state = lama_scale(layers=LAYERS).init(PARAMS)
    with pytest.raises(ValueError, match="layers must be what the optimizer was given"):
        layer_report(state, PARAMS)
