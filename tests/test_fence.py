"""What flipout and gauss_newton are not made for: they are right, or say what is wrong.

The reference is the trace of the exact matrix. Functions are made so that a fast path that took
them would be wrong by far more than an estimate's error.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lama_optax import exact_trace, flipout, gauss_newton, hutchinson, lama_scale, layer_curvature
from lama_optax._jaxpr import weights
from lama_optax._jaxpr.interpret import names_in

pytestmark = pytest.mark.standard_promotion
SCOPES = ("joint", "block")


def _normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"a": {"w": _normal(0, 3, 4), "b": _normal(1, 4)}, "o": {"w": _normal(2, 4, 2)}}
ROWS = _normal(3, 6, 2, 3)


def _dense(p, x):
    return x @ p["a"]["w"] + p["a"]["b"]


def _end(p, h):
    return jnp.sum((jnp.tanh(h) @ p["o"]["w"] - 1) ** 2)


def complex_activation(p, x):
    return _end(p, jnp.fft.fft(jnp.tanh(_dense(p, x[0]))).real)


def complex_row(p, x):
    z = jax.lax.complex(x[0], x[1]) @ p["a"]["w"].astype(jnp.complex64)
    return jnp.sum(jnp.abs(z) ** 2) + _end(p, z.real)


def complex_rows(p, x):
    z = jax.lax.complex(x, x[::-1]) @ p["a"]["w"].astype(jnp.complex64)
    return jnp.sum(jnp.abs(z) ** 2) + _end(p, z.imag)


def spectrum_of_a_weight(p, x):
    return _end(p, x @ jnp.fft.fft(p["a"]["w"]).real)


def spectral_norm(p, x):
    """Power iteration, not differentiated."""
    w, fixed = p["a"]["w"], jax.lax.stop_gradient(p["a"]["w"])

    def turn(state):
        v = fixed.T @ (fixed @ state[1])
        return state[0] + 1, v / jnp.linalg.norm(v)

    u = jax.lax.while_loop(lambda state: state[0] < 9, turn, (0, jnp.full(4, 0.5)))[1]
    return _end(p, x @ (w / jnp.linalg.norm(w @ u)) + p["a"]["b"])


def padded(p, x):
    """Indices past the table give NaN, which is masked later."""
    places = jnp.array([0, 2, 3])
    h = jnp.take(p["a"]["w"], places, axis=0)
    h = jnp.where((places < 3)[:, None], h * jnp.sum(x), jnp.zeros_like(h))
    return _end(p, jnp.sum(h, axis=0))


def whole_numbers(p, x):
    """No derivative by the first layer."""
    w = (3 * p["a"]["w"]).astype(jnp.int8).astype(jnp.float32)
    return _end(p, x @ w + jnp.round(p["a"]["b"]))


def nobody(p, x):
    """A product of no rows, and an array without entries."""
    h = x[:0] @ p["a"]["w"]
    return _end(p, _dense(p, x)) + jnp.sum(h) + jnp.sum(p["a"]["w"][:, :0].reshape(-1))


def masked(p, x):
    mask = jnp.asarray([[0.0, 1, 0.5, 2]] * 3)
    return _end(p, x[0] @ (p["a"]["w"] * mask / 2)) + _end(p, x @ (-p["a"]["w"])[None][0])


def squared(p, x):
    """One weight is both inputs of an operation."""
    return _end(p, x @ (p["a"]["w"] * p["a"]["w"]) + p["a"]["b"])


def checkpointed(p, x):
    return _end(p, jax.checkpoint(lambda x: jnp.sin(_dense(p, x)))(x))


def _clip(x):
    clip = jax.custom_vjp(lambda x: x)
    clip.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))
    return clip(x)


def clipped_gradient(p, x):
    """Not linear in the gradient, so that not even the mean of the examples' is the batch's."""
    return _end(p, _clip(_dense(p, x)))


FUNCTIONS = [
    complex_activation, complex_row, complex_rows, spectrum_of_a_weight, spectral_norm, padded,
    whole_numbers, nobody, masked, squared, checkpointed, clipped_gradient,
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


@pytest.mark.parametrize("example", [complex_row, whole_numbers, nobody, padded, masked])
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
            example_value_fn=lambda p, x: _end(p, fused(_dense(p, x))),
            batch=ROWS,
        )


# Signs that stay, and signs that are lost


def _wide(change):
    def example(p, x):
        return jnp.sum(jnp.tanh(x @ change(p["a"]["w"])) @ p["o"]["w"]) ** 2

    return example


def _unchanged(w):
    return w


@functools.cache
def _joint(change):
    estimator = flipout(scope="joint")

    @jax.jit
    def run(p):
        return layer_curvature(
            p, 0, estimator=estimator, example_value_fn=_wide(change), batch=WIDE_ROWS
        ).mean

    return run(WIDE)


WIDE = {"a": {"w": _normal(0, 70, 70)}, "o": {"w": _normal(1, 70, 2)}}
WIDE_ROWS = _normal(2, 4, 2, 70)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w * 1,
        lambda w: 0.5 * w / 0.5,
        lambda w: w * jnp.ones((70, 70)),
        lambda w: w[None][0],
        lambda w: jnp.copy(-w) * -1,
        lambda w: checkpoint_name(w, "w"),
        lambda w: w.reshape(7, 10, 70).transpose(2, 0, 1).reshape(70, 70).T,
    ],
    ids=["times 1", "scaled", "mask", "new axis", "copy", "name", "laid out"],
)
def test_signs_stay_through_what_changes_no_entry(change):
    # The same probes; roundings in another order.
    np.testing.assert_allclose(_joint(change), _joint(_unchanged), rtol=1e-4)


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


# BatchNorm


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
    variables = dict(net.init(jax.random.key(0), jnp.ones((1, *shape))))
    params = variables.pop("params")
    batch = _normal(0, 5, *shape)

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


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("estimator", [flipout(), gauss_newton()], ids=["flipout", "gauss_newton"])
def test_a_value_fn_of_another_loss_is_told(estimator, jitted):
    """Where the batch's loss is no mean over examples, for whatever reason."""
    params = {"w": _normal(0, 3, 2)}

    def estimate(value_fn):
        def run(p):
            return layer_curvature(
                p,
                0,
                estimator=estimator,
                value_fn=value_fn,
                example_value_fn=_quadratic,
                example_output_fn=lambda p, x: (x @ p["w"]).reshape(-1),
                output_loss_fn=lambda z, x: jnp.sum(z**2),
                batch=ROWS,
            ).mean

        return (jax.jit(run) if jitted else run)(params)

    def mean(p):
        return jnp.mean(jax.vmap(_quadratic, (None, 0))(p, ROWS))

    def centred(p):
        return jnp.mean(jax.vmap(_quadratic, (None, 0))(p, ROWS - jnp.mean(ROWS, 0)))

    def dropped(p):
        kept = jax.random.bernoulli(jax.random.key(0), 0.5, ROWS.shape)
        return jnp.mean(jax.vmap(_quadratic, (None, 0))(p, ROWS * kept))

    plain = estimate(None)
    for value_fn in (mean, lambda p: (mean(p), "aux"), dropped):
        np.testing.assert_allclose(estimate(value_fn), plain, rtol=1e-6)
    if jitted:
        assert np.isnan(estimate(centred)).all()
    else:
        with pytest.raises(ValueError, match=r"value_fn must be of one loss.*fisher\(\)"):
            estimate(centred)


# JAX's modes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_under_strict_promotion(dtype):
    """The same probes as in float32, and 20 roundings or so."""

    def example(p, x):
        return _end(p, _dense(p, x)) + _end(p, _dense(p, x[0]))

    def estimates(dtype):
        params, batch = optax.tree.cast((PARAMS, ROWS), dtype)
        return jnp.stack(
            [
                layer_curvature(
                    params,
                    0,
                    estimator=estimator,
                    example_value_fn=example,
                    example_output_fn=lambda p, x: jnp.tanh(_dense(p, x[0])) @ p["o"]["w"],
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
    [flipout(), flipout(scope="joint"), gauss_newton(), hutchinson(1)],
    ids=["flipout", "joint", "gauss_newton", "hutchinson"],
)
def test_debugging_modes_of_jax(estimator):
    params = {"w": _normal(0, 3, 2), "conv": _normal(1, 2, 1, 2)}

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
    assert np.isfinite(optax.tree.get(state, "curvature")).all()


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


def test_explicit_mesh():
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    spec = jax.sharding.PartitionSpec

    def outputs(p, x):
        return jnp.tanh(x @ p["a"]) @ p["o"]

    def estimates(params, batch):
        arguments = {
            "value_fn": lambda p: jnp.mean(jnp.sum(outputs(p, batch) ** 2, -1)),
            "example_value_fn": lambda p, x: jnp.sum(outputs(p, x) ** 2),
            "example_output_fn": outputs,
            "output_loss_fn": lambda z, x: jnp.sum(z**2),
            "batch": batch,
        }
        return [
            layer_curvature(params, 0, estimator=estimator, **arguments).mean
            for estimator in (
                *(flipout(scope=scope) for scope in SCOPES),
                gauss_newton(),
                exact_trace(),
                hutchinson(1, hvp="finite_difference"),
            )
        ]

    params, batch = {"a": _normal(0, 4, 6), "o": _normal(1, 6, 2)}, _normal(2, 8, 4)
    expected = jax.jit(estimates)(params, batch)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=explicit)
    with jax.set_mesh(mesh):
        params["o"] = jax.device_put(params["o"], spec(None, "model"))
        found = jax.jit(estimates)(params, jax.device_put(batch, spec("data")))
    # float32 sums in another order; a finite difference divides theirs by the step.
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3)


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
