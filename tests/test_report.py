"""`layer_report` finds trackers' and LAMA's states wherever optax hides them."""

import functools
import json

import jax
import jax.numpy as jnp
import optax
import pytest

from lama_optax import (
    hutchinson,
    lam,
    lama_adam,
    lama_scale,
    layer_names,
    layer_report,
    track_curvature,
)

PARAMS = {
    "Dense_0": {"kernel": jnp.asarray([[0.5, 1.0], [-1.0, 0.5]]), "bias": jnp.asarray([1.0, 2.0])},
    "Dense_1": {"kernel": jnp.asarray([[0.25], [0.5]]), "bias": jnp.asarray([2.0])},
}
# Means over each module: 2.0 of 6 parameters and -1.0 of 3.
CURVATURE = {"Dense_0": {"kernel": 2.0, "bias": 2.0}, "Dense_1": {"kernel": -3.0, "bias": 3.0}}
SIZES = {"Dense_0": 6, "Dense_1": 3}
MEANS = {"Dense_0": 2.0, "Dense_1": -1.0}
LABELS = {"Dense_0": {"kernel": "x", "bias": "x"}, "Dense_1": {"kernel": "y", "bias": "y"}}


def trained(tx, jit=lambda update: update):
    """The state after two steps; operation by operation, since most of these tests share them."""
    update, state = jit(functools.partial(tx.update, curvature=CURVATURE)), tx.init(PARAMS)
    for _ in range(2):
        _, state = update(PARAMS, state, PARAMS)
    return state


def alpha_of(mean, sensitivity):
    """Eq. 9 in the library's own arithmetic."""
    return 0.5 + float(jax.nn.sigmoid(sensitivity * mean))


# How deep the state lies, and the sensitivity of each layer that is in the report.
WRAPPED = {
    "alone": (lambda: lama_scale(sensitivity=0.1), {"Dense_0": 0.1, "Dense_1": 0.1}),
    "alias": (
        lambda: lama_adam(0.1, sensitivity=0.1, update_interval=1),
        {"Dense_0": 0.1, "Dense_1": 0.1},
    ),
    "chain": (
        lambda: optax.chain(
            optax.clip(1.0), optax.chain(lama_scale(sensitivity=0.1)), optax.scale(-1.0)
        ),
        {"Dense_0": 0.1, "Dense_1": 0.1},
    ),
    "masked": (
        lambda: optax.masked(
            lama_scale(sensitivity=0.1), jax.tree.map(lambda label: label == "x", LABELS)
        ),
        {"Dense_0": 0.1},
    ),
    "partition": (
        lambda: optax.partition(
            {"x": lama_scale(sensitivity=0.1), "y": lama_scale(sensitivity=-0.1)}, LABELS
        ),
        {"Dense_0": 0.1, "Dense_1": -0.1},
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_report_of_a_wrapped_state(wrapper):
    make, sensitivity = WRAPPED[wrapper]
    report = layer_report(trained(make()), PARAMS)
    assert list(report) == list(sensitivity)
    for name, row in report.items():
        alpha = alpha_of(MEANS[name], sensitivity[name])
        assert list(row) == ["curvature", "std_error", "alpha", "momentum", "size"]
        assert row["curvature"] == MEANS[name]  # exact in binary
        # Two roundings of float32.
        assert row["alpha"] == pytest.approx(alpha, rel=3e-7)
        assert row["momentum"] == pytest.approx(0.9 * alpha, rel=3e-7)
        assert row["size"] == SIZES[name]
        # Without a decay the last estimate stands alone, and has no error.
        types = [float, type(None), float, float, int]
        assert [type(value) for value in row.values()] == types
    assert json.loads(json.dumps(report)) == report


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "wrap",
    [
        lambda: optax.inject_hyperparams(lama_scale)(sensitivity=0.1),
        lambda: optax.MultiSteps(lama_scale(sensitivity=0.1), every_k_schedule=2),
    ],
    ids=["inject_hyperparams", "MultiSteps"],
)
def test_report_under_wrappers_that_promote(wrap):
    report = layer_report(trained(wrap(), jax.jit), PARAMS)
    assert {name: row["curvature"] for name, row in report.items()} == MEANS
    for name, row in report.items():
        assert row["alpha"] == pytest.approx(alpha_of(MEANS[name], 0.1), rel=3e-7)


def test_momentum_is_after_the_cap():
    report = layer_report(trained(lama_scale(sensitivity=10.0, max_momentum=0.95)), PARAMS)
    assert report["Dense_0"]["alpha"] > 1.4
    assert report["Dense_0"]["momentum"] == pytest.approx(0.95, rel=1e-7)  # one rounding


@pytest.mark.parametrize(
    "layers",
    ["leaf", {"Dense_0": "in", "Dense_1": "out"}, lambda params: jax.tree.map(jnp.ndim, params)],
    ids=["leaf", "labels", "function"],
)
def test_layers_are_the_optimizers(layers):
    state = trained(lama_scale(layers=layers))
    report = layer_report(state, PARAMS, layers)
    assert tuple(report) == layer_names(PARAMS, layers)
    assert [row["curvature"] for row in report.values()] == state.curvature.tolist()
    assert sum(row["size"] for row in report.values()) == 9


def test_report_before_the_first_step():
    report = layer_report(lama_scale().init(PARAMS), PARAMS)
    assert report["Dense_1"] == {
        "curvature": None,
        "std_error": None,
        "alpha": 1.0,
        "momentum": pytest.approx(0.9),
        "size": 3,
    }


def report_after(steps):
    tx = optax.chain(track_curvature(hutchinson(1), update_interval=1), optax.adamw(1e-3))
    state = tx.init(PARAMS)
    for step in range(steps):
        curvature = jnp.asarray([1.0 + step, 2.0])
        _, state = tx.update(PARAMS, state, PARAMS, curvature=curvature)
    return functools.partial(layer_report, state, PARAMS)


@pytest.mark.standard_promotion  # of optax.adamw
def test_report_of_a_tracker_beside_another_optimizer():
    before, one, two = (report_after(steps)()["Dense_0"] for steps in range(3))
    assert before == {"curvature": None, "std_error": None, "size": 6}
    assert one == {"curvature": 1.0, "std_error": None, "size": 6}
    # Weights 0.9/1.9 and 1/1.9 on 1 and 2.
    assert two["curvature"] == pytest.approx(1 + 1 / 1.9, rel=1e-6)
    assert two["std_error"] > 0
    assert report_after(2)()["Dense_1"]["std_error"] == 0
    json.dumps([before, one, two], allow_nan=False)


@pytest.mark.standard_promotion
def test_flat_form_for_loggers():
    assert report_after(1)(flat=True) == {"curvature/Dense_0": 1.0, "curvature/Dense_1": 2.0}
    assert list(report_after(2)(flat=True)) == [
        "curvature/Dense_0",
        "curvature_std_error/Dense_0",
        "curvature/Dense_1",
        "curvature_std_error/Dense_1",
    ]
    flat = layer_report(trained(lama_scale(sensitivity=0.1)), PARAMS, flat=True)
    assert set(flat) == {
        f"{x}/{name}" for x in ("curvature", "alpha", "momentum") for name in MEANS
    }


def test_two_optimizers_that_share_a_module_report_both():
    """A kernel in one group and its bias in the other: neither row may hide the other's."""
    tx = optax.partition(
        {"x": lama_scale(), "y": lama_scale()},
        jax.tree.map(lambda p: "x" if p.ndim > 1 else "y", PARAMS),
    )
    report = layer_report(trained(tx), PARAMS)
    assert sorted(row["size"] for row in report.values()) == [1, 2, 2, 4]


def test_no_lama_state():
    for state in (lam(0.1).init(PARAMS), optax.EmptyState(), None):
        with pytest.raises(ValueError, match=r"opt_state must hold the state of track_curvature"):
            layer_report(state, PARAMS)


def test_layers_that_are_not_the_optimizers():
    with pytest.raises(ValueError, match=r"layers must be what the optimizer was given; it has 2"):
        layer_report(lama_scale().init(PARAMS), PARAMS, "leaf")
    with pytest.raises(ValueError, match=r"layers must be one of 'module', 'leaf'; got 'block'"):
        layer_report(lama_scale().init(PARAMS), PARAMS, "block")


def test_a_state_of_many_models():
    states = jax.vmap(lambda _: track_curvature().init(PARAMS))(jnp.arange(3))
    with pytest.raises(ValueError, match=r"opt_state must be one model's; got \(3,\) of them"):
        layer_report(states, PARAMS)


def test_params_of_another_structure():
    with pytest.raises(ValueError, match=r"params must .* that opt_state was made for"):
        layer_report(lama_scale().init(PARAMS), PARAMS["Dense_0"])
