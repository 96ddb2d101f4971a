"""Weights in fewer bits: what is predicted, chosen and verified."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lama_optax import LayerCurvature, stacked
from lama_optax.rounding import allocate_bits, loss_increase, qwix_rules, round_symmetric

WIDTHS = (3, 4, 6, 8)


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = {"a": (40, 6), "b": (20, 12), "c": (30, 5)}
    return {
        name: {"kernel": jax.random.normal(key, shape), "bias": jnp.ones(shape[1])}
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _report(**curvature):
    return {name: {"curvature": h, "std_error": 0.1} for name, h in curvature.items()}


def _squares(params, bits):
    """Squared change of each kernel, in float64."""
    kernels = {name: layer["kernel"] for name, layer in params.items()}
    change = {n: np.asarray(round_symmetric(k, bits) - k, np.float64) for n, k in kernels.items()}
    return {name: float(np.sum(d**2)) for name, d in change.items()}


def test_increase_is_half_curvature_times_squared_change(params):
    report = _report(a=2.0, b=0.5, c=1.0)
    rounded = jax.tree.map(lambda a: round_symmetric(a, 4), params)
    rise, squares = loss_increase(report, params, rounded), _squares(params, 4)
    for name, row in rise.items():
        if name != "total":
            assert row["increase"] == pytest.approx(report[name]["curvature"] * squares[name] / 2)
            assert row["std_error"] == pytest.approx(0.1 * squares[name] / 2)
    assert rise["total"]["increase"] == pytest.approx(
        sum(row["increase"] for name, row in rise.items() if name != "total")
    )
    array = LayerCurvature(jnp.array([2.0, 0.5, 1.0]), jnp.full(3, 0.1), jnp.array([246, 252, 155]))
    assert loss_increase(array, params, rounded)["b"]["increase"] == pytest.approx(
        rise["b"]["increase"]
    )


def test_increase_is_unbiased_for_independent_changes():
    """Of a quadratic, whose Hessian has products of entries, and of its gradient."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(12, 12))
    hessian, gradient = root @ root.T, rng.normal(size=12)
    report = {"w": {"curvature": np.trace(hessian) / 12, "std_error": 0.0}}
    changes = rng.uniform(-0.1, 0.1, size=(4000, 12))
    exact = changes @ gradient + np.einsum("ni,ij,nj->n", changes, hessian, changes) / 2
    params = {"w": jnp.zeros(12)}
    predicted = [
        loss_increase(report, params, {"w": jnp.asarray(c, jnp.float32)}, "leaf")["w"]["increase"]
        for c in changes[:400]
    ]
    error = np.std(exact, ddof=1) / len(exact) ** 0.5
    assert abs(np.mean(exact) - np.mean(predicted)) < 5 * error


def test_what_is_not_known_is_none_and_what_stands_still_is_free(params):
    changed = params | {"a": jax.tree.map(lambda a: a + 0.1, params["a"])}
    report = _report(a=1.0, b=None, c=float("nan"))
    rise = loss_increase(report, params, changed)
    assert rise["b"] == {"increase": 0.0, "std_error": 0.0}
    assert rise["total"]["increase"] is not None
    rise = loss_increase(_report(a=None, b=1.0, c=1.0), params, changed)
    assert rise["a"] == rise["total"] == {"increase": None, "std_error": None}


@pytest.mark.parametrize("mean_bits", [3.2, 4.0, 5.5, 8.0])
def test_choice_is_the_best_of_all(params, mean_bits):
    report = _report(a=3.0, b=0.02, c=0.4)
    found = allocate_bits(report, params, mean_bits=mean_bits, bits=WIDTHS)
    weights = {name: params[name]["kernel"].size for name in params}
    squares = {bits: _squares(params, bits) for bits in WIDTHS}
    best = min(
        sum(report[n]["curvature"] * squares[b][n] / 2 for n, b in zip(params, choice, strict=True))
        for choice in itertools.product(WIDTHS, repeat=3)
        if sum(weights[n] * b for n, b in zip(params, choice, strict=True))
        <= mean_bits * sum(weights.values())
    )
    assert found.increase == pytest.approx(best, rel=1e-5)  # float32 sums of squares
    assert found.mean_bits <= mean_bits
    assert found.size_bytes == -(-sum(weights[n] * b for n, b in found.bits.items()) // 8)
    for name in params:
        np.testing.assert_array_equal(
            found.params[name]["kernel"],
            round_symmetric(params[name]["kernel"], found.bits[name]),
        )
        np.testing.assert_array_equal(found.params[name]["bias"], params[name]["bias"])
    sizes = [point.mean_bits for point in found.curve]
    assert sizes == sorted(sizes)
    rises = [point.increase for point in found.curve]
    assert rises == sorted(rises, reverse=True)


def test_size_in_bytes_is_the_same_budget(params):
    report = _report(a=3.0, b=0.02, c=0.4)
    weights = sum(p["kernel"].size for p in params.values())
    by_bytes = allocate_bits(report, params, size_bytes=weights * 4 // 8, bits=WIDTHS)
    assert by_bytes.bits == allocate_bits(report, params, mean_bits=4, bits=WIDTHS).bits


def test_width_beyond_trust_is_not_offered(params):
    report = _report(a=1.0, b=1e-9, c=1.0)
    assert allocate_bits(report, params, mean_bits=4).bits["b"] == 3
    assert allocate_bits(report, params, mean_bits=4, max_change=0.9).bits["b"] == 2
    with pytest.raises(ValueError, match="begins at 3"):
        allocate_bits(report, params, mean_bits=2.5)


def test_width_beyond_trust_is_measured_where_it_can_be(params):
    """Two bits cost the layer b nothing, and the others far more than the quadratic says."""

    def value_fn(p):
        change = {name: p[name]["kernel"] - params[name]["kernel"] for name in params}
        return sum(jnp.sum(jnp.abs(change[name]) > 0.3) for name in "ac").astype(jnp.float32)

    report = _report(a=1e-3, b=1e-6, c=1e-3)
    assert allocate_bits(report, params, mean_bits=3).bits == {"a": 3, "b": 3, "c": 3}
    found = allocate_bits(report, params, mean_bits=3, bits=(2, 3, 4), value_fn=value_fn)
    assert found.bits["b"] == 2
    assert 4 in found.bits.values()
    assert found.measured["predicted"] < found.measured["uniform"]


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), -1.0, 0.0])
def test_unknown_curvature_is_named_and_has_most_bits(params, bad):
    found = allocate_bits(_report(a=1.0, b=bad, c=1.0), params, mean_bits=6, bits=WIDTHS)
    assert found.unknown == ("b",)
    assert found.bits["b"] == 8


def test_verified_choice_is_never_worse_than_uniform(params):
    """The curvature that is given is the wrong way round."""
    true = {"a": 5.0, "b": 0.01, "c": 0.01}

    def value_fn(p):
        return sum(
            h * jnp.sum(jnp.square(p[name]["kernel"] - params[name]["kernel"]))
            for name, h in true.items()
        )

    wrong = _report(a=0.001, b=1.0, c=1.0)
    found = allocate_bits(wrong, params, mean_bits=5, bits=WIDTHS, value_fn=value_fn)
    uniform = jax.tree.map(lambda a: round_symmetric(a, 4), params)
    assert float(value_fn(found.params)) <= float(value_fn(uniform))
    assert found.measured["uniform"] == pytest.approx(float(value_fn(uniform)), rel=1e-5)
    blind = allocate_bits(wrong, params, mean_bits=5, bits=WIDTHS)
    assert float(value_fn(blind.params)) > float(value_fn(uniform))
    right = _report(**true)
    seen = allocate_bits(right, params, mean_bits=5, bits=WIDTHS, value_fn=value_fn)
    assert float(value_fn(seen.params)) < float(value_fn(uniform))


def test_stacked_layers_have_widths_of_their_own():
    kernel = jax.random.normal(jax.random.key(0), (3, 30, 8))
    params = {"blocks": {"kernel": kernel}}
    layers = stacked("blocks")
    curvature = LayerCurvature(jnp.array([9.0, 0.01, 0.01]), jnp.zeros(3), jnp.full(3, 240))
    found = allocate_bits(curvature, params, mean_bits=5, bits=WIDTHS, layers=layers)
    first, *others = found.bits.values()
    assert first > max(others)
    rise = loss_increase(curvature, params, found.params, layers)
    assert rise["total"]["increase"] == pytest.approx(found.increase)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of mean_bits and size_bytes"),
        ({"mean_bits": 4, "size_bytes": 9}, "one of mean_bits and size_bytes"),
        ({"mean_bits": np.nan}, "mean_bits must be a number of at least 0; got nan"),
        ({"size_bytes": 2.5}, "size_bytes must be an integer of at least 1; got 2.5"),
        ({"mean_bits": 4, "bits": (1, 4)}, "bits must be integers from 2 to 16"),
        ({"mean_bits": 4, "layers": "leaf"}, "layer_report of the same layers"),
        ({"mean_bits": 4, "value_fn": lambda p: jnp.nan}, "value_fn must be finite"),
    ],
)
def test_bad_arguments_are_named(params, arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate_bits(_report(a=1.0, b=1.0, c=1.0), params, **arguments)


@pytest.mark.standard_promotion
# Qwix reads every name of flax.nnx, also those that warn.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_qwix_rounds_each_module_to_its_width():
    qwix = pytest.importorskip("qwix")
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="out")(nn.relu(nn.Dense(16, name="hidden")(x)))

    with pytest.raises(ValueError, match="2, 4 or 8"):
        qwix_rules({"hidden": 3})
    rules = qwix_rules({"hidden": 4, "out": 8})
    x = jnp.ones((2, 8))
    params = qwix.quantize_model(Net(), qwix.PtqProvider(rules)).init(jax.random.key(0), x)
    found = {
        "/".join(str(key) for key in path): str(leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if "int" in str(leaf.dtype)
    }
    assert [dtype for name, dtype in found.items() if "hidden" in name] == ["int4"]
    assert [dtype for name, dtype in found.items() if "out" in name] == ["int8"]
