"""What flipout and gauss_newton are not made for: they are right, or say what is wrong.

The reference is the trace of the exact matrix. Functions are made so that a fast path that took
them would be wrong by far more than an estimate's error.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from parts import PARAMS, ROWS, dense, normal, squared_error

from lama_optax import exact_trace, flipout, gauss_newton, layer_curvature
from lama_optax._jaxpr import weights
from lama_optax._jaxpr.interpret import names_in

pytestmark = pytest.mark.standard_promotion
SCOPES = ("joint", "block")
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


def complex_activation(p, x):
    return squared_error(p, jnp.fft.fft(jnp.tanh(dense(p, x[0]))).real)


def complex_row(p, x):
    z = jax.lax.complex(x[0], x[1]) @ p["a"]["w"].astype(jnp.complex64)
    return jnp.sum(jnp.abs(z) ** 2) + squared_error(p, z.real)


def complex_rows(p, x):
    z = jax.lax.complex(x, x[::-1]) @ p["a"]["w"].astype(jnp.complex64)
    return jnp.sum(jnp.abs(z) ** 2) + squared_error(p, z.imag)


def spectrum_of_a_weight(p, x):
    return squared_error(p, x @ jnp.fft.fft(p["a"]["w"]).real)


def spectral_norm(p, x):
    """Power iteration, not differentiated."""
    w, fixed = p["a"]["w"], jax.lax.stop_gradient(p["a"]["w"])

    def turn(state):
        v = fixed.T @ (fixed @ state[1])
        return state[0] + 1, v / jnp.linalg.norm(v)

    u = jax.lax.while_loop(lambda state: state[0] < 9, turn, (0, jnp.full(4, 0.5)))[1]
    return squared_error(p, x @ (w / jnp.linalg.norm(w @ u)) + p["a"]["b"])


def padded(p, x):
    """Indices past the table give NaN, which is masked later."""
    places = jnp.array([0, 2, 3])
    h = jnp.take(p["a"]["w"], places, axis=0)
    h = jnp.where((places < 3)[:, None], h * jnp.sum(x), jnp.zeros_like(h))
    return squared_error(p, jnp.sum(h, axis=0))


def whole_numbers(p, x):
    """No derivative by the first layer."""
    w = (3 * p["a"]["w"]).astype(jnp.int8).astype(jnp.float32)
    return squared_error(p, x @ w + jnp.round(p["a"]["b"]))


def nobody(p, x):
    """A product of no rows, and an array without entries."""
    h = x[:0] @ p["a"]["w"]
    return squared_error(p, dense(p, x)) + jnp.sum(h) + jnp.sum(p["a"]["w"][:, :0].reshape(-1))


def masked(p, x):
    mask = jnp.asarray([[0.0, 1, 0.5, 2]] * 3)
    return squared_error(p, x[0] @ (p["a"]["w"] * mask / 2)) + squared_error(
        p, x @ (-p["a"]["w"])[None][0]
    )


def squared(p, x):
    """One weight is both inputs of an operation."""
    return squared_error(p, x @ (p["a"]["w"] * p["a"]["w"]) + p["a"]["b"])


def checkpointed(p, x):
    return squared_error(p, jax.checkpoint(lambda x: jnp.sin(dense(p, x)))(x))


def _clip(x):
    clip = jax.custom_vjp(lambda x: x)
    clip.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))
    return clip(x)


def clipped_gradient(p, x):
    """Not linear in the gradient, so that not even the mean of the examples' is the batch's."""
    return squared_error(p, _clip(dense(p, x)))


FUNCTIONS = [
    complex_activation, complex_row, spectral_norm, padded, whole_numbers, nobody, clipped_gradient,
    *map(SLOW, (complex_rows, spectrum_of_a_weight, masked, squared, checkpointed)),
]  # fmt: skip


@pytest.mark.parametrize("example", FUNCTIONS)
def test_flipout_is_right_for_what_jax_differentiates_twice(example):
    def value_fn(p):
        return jnp.mean(jax.vmap(example, (None, 0))(p, ROWS))

    @jax.jit
    def estimates(p):
        exact = layer_curvature(p, 0, estimator=exact_trace(), value_fn=value_fn)
        return exact.mean, [
            layer_curvature(
                p, 1, estimator=flipout(400, scope=scope), example_value_fn=example, batch=ROWS
            )
            for scope in SCOPES
        ]

    exact, found = estimates(PARAMS)
    for scope, estimate in zip(SCOPES, found, strict=True):
        # Of 24 comparisons one fails in 10^5 by chance. Sums of float32 for those without noise.
        error = np.abs(estimate.mean - exact)
        assert np.all(error <= 5 * estimate.std_error + 1e-4 * np.abs(exact) + 1e-6), scope
    assert example is not whole_numbers or found[0].mean[0] == found[1].mean[0] == 0


@pytest.mark.parametrize(
    "example", [complex_row, padded, *map(SLOW, (whole_numbers, nobody, masked))]
)
def test_gauss_newton_is_right_too(example):
    def outputs(p, x):
        return jax.grad(lambda p: example(p, x))(p)["o"]["w"].reshape(-1)

    def loss(z, x):
        return jnp.sum(z**2)

    found = jax.jit(
        lambda p: (
            layer_curvature(
                p,
                0,
                estimator=gauss_newton(),
                layers="leaf",
                example_output_fn=outputs,
                output_loss_fn=loss,
                batch=ROWS,
            ).mean
        )
    )(PARAMS)
    jacobian = jax.jit(jax.vmap(jax.jacobian(outputs), (None, 0)))(PARAMS, ROWS)
    expected = [2 * jnp.mean(jnp.sum(x**2, axis=1)) for x in jax.tree.leaves(jacobian)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_what_has_no_second_derivative_is_named_with_the_remedies(scope):
    inner = jax.custom_vjp(jnp.tanh)
    inner.defvjp(lambda x: (jnp.tanh(x),) * 2, lambda y, g: (g * (1 - y**2),))
    fused = jax.custom_vjp(lambda x: inner(x))
    fused.defvjp(lambda x: (inner(x),) * 2, lambda y, g: (g * (1 - y**2),))
    with pytest.raises(ValueError, match=r"hvp='finite_difference'.*fisher\(\).*ODE"):
        layer_curvature(
            PARAMS,
            0,
            estimator=flipout(scope=scope),
            example_value_fn=lambda p, x: squared_error(p, fused(dense(p, x))),
            batch=ROWS,
        )


# Signs that stay, and signs that are lost


def _wide(change):
    def example(p, x):
        return jnp.sum(jnp.tanh(x @ change(p["a"]["w"])) @ p["o"]["w"]) ** 2

    return example


WIDE = {"a": {"w": normal(0, 70, 70)}, "o": {"w": normal(1, 70, 2)}}
WIDE_ROWS = normal(2, 4, 2, 70)
CHANGES = {
    "times 1": lambda w: w * 1,
    "scaled": lambda w: 0.5 * w / 0.5,
    "mask": lambda w: w * jnp.ones((70, 70)),
    "new axis": lambda w: w[None][0],
    "copy": lambda w: jnp.copy(-w) * -1,
    "name": lambda w: checkpoint_name(w, "w"),
    "laid out": lambda w: w.reshape(7, 10, 70).transpose(2, 0, 1).reshape(70, 70).T,
}


@pytest.mark.parametrize("change", CHANGES)
def test_signs_stay_through_what_changes_no_entry(change):
    report = flipout(scope="joint").explain(
        WIDE, example_value_fn=_wide(CHANGES[change]), batch=WIDE_ROWS
    )
    assert report["a"]["lost_signs"] == []


def test_signs_that_stay_are_the_same_probes():
    def joint(change):
        def run(p):
            return layer_curvature(
                p,
                0,
                estimator=flipout(scope="joint"),
                example_value_fn=_wide(change),
                batch=WIDE_ROWS,
            ).mean

        return jax.jit(run)(WIDE)

    def all_changes(w):
        return functools.reduce(lambda w, change: change(w), CHANGES.values(), w)

    # Roundings in another order.
    np.testing.assert_allclose(joint(all_changes), joint(lambda w: w), rtol=1e-4)


def test_explain_names_lost_signs_and_paths():
    shapes = jax.eval_shape(lambda: WIDE)
    rows = jax.eval_shape(lambda: WIDE_ROWS)
    sine = _wide(lambda w: jnp.sin(w))
    report = flipout().explain(shapes, example_value_fn=sine, batch=rows)
    assert list(report) == ["a", "o"]
    assert report["o"] == {"path": "block", "lost_signs": [], "why": report["o"]["why"]}
    first, second = report["a"]["lost_signs"]
    assert first.startswith("['a']['w'], axis 0: sin at ")
    assert "test_fence.py" in first
    assert "axis 1" in second
    args = {"example_value_fn": complex_activation, "batch": ROWS}
    paths = {scope: flipout(scope=scope).explain(PARAMS, **args)["a"] for scope in SCOPES}
    assert paths["joint"]["path"] == "joint"
    assert paths["block"]["path"] == "block, by the gradient"
    assert "fft" in paths["block"]["why"] or "convert" in paths["block"]["why"]
    args["example_value_fn"] = clipped_gradient
    assert flipout().explain(PARAMS, **args)["a"]["path"] == "hutchinson, block"


@pytest.mark.parametrize("scope", SCOPES)
def test_the_users_checkpoint_stays_in_force(scope):
    program = jax.make_jaxpr(
        lambda p: layer_curvature(
            p, 0, estimator=flipout(scope=scope), example_value_fn=checkpointed, batch=ROWS
        )
    )(PARAMS)
    assert "remat2" in names_in(program) or "checkpoint" in names_in(program)


def test_tracing_is_linear_in_depth(monkeypatch):
    counts = []
    apply = weights.apply

    def counted(*args):
        counts[-1] += 1
        return apply(*args)

    monkeypatch.setattr(weights, "apply", counted)

    def net(p, x):
        for w in p.values():
            x = jax.lax.conv_general_dilated(x, w, (1,), "SAME")
        return jnp.sum(x**2)

    for depth in (4, 8, 16):
        counts.append(0)
        params = {f"l{i:02}": jnp.ones((1, 1, 3)) for i in range(depth)}
        jax.make_jaxpr(
            lambda p: layer_curvature(
                p,
                0,
                estimator=flipout(scope="joint"),
                example_value_fn=net,
                batch=jnp.ones((2, 1, 1, 6)),
            )
        )(params)
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])
