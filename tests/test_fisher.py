"""`fisher` against the exact Gauss-Newton matrix in float64, in units of its own standard error."""

import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models import compiled_curvature

from lama_optax import fisher, layer_curvature, layer_names, stacked, supervised, track_curvature

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
LOSSES = {
    "softmax_cross_entropy": lambda z, y: optax.losses.softmax_cross_entropy_with_integer_labels(
        z, y
    ),
    "sigmoid_binary_cross_entropy": lambda z, y: jax.nn.softplus(z) - y * z,
    "squared_error": lambda z, y: (z - y) ** 2,
}


def exact_gauss_newton(params, apply_fn, inputs, targets, loss, weights=None):
    """tr(J^T H J) of each layer over its size, with all outputs of the batch as one vector."""
    outputs = jax.eval_shape(apply_fn, params, inputs)

    def value(flat):
        losses = LOSSES[loss](flat.reshape(outputs.shape), targets)
        if weights is None:
            return jnp.mean(losses)
        w = jnp.broadcast_to(
            weights.reshape(*weights.shape, *[1] * (losses.ndim - weights.ndim)), losses.shape
        )
        return jnp.sum(w * losses) / jnp.sum(w)

    @jax.jit
    def derivatives(p):
        flat = apply_fn(p, inputs).reshape(-1)
        jacobian = jax.jacrev(lambda p: apply_fn(p, inputs).reshape(-1))(p)
        return jax.tree.map(lambda j: j.reshape(len(flat), -1), jacobian), jax.hessian(value)(flat)

    jacobian, hessian = jax.device_get(derivatives(params))

    traces = jax.tree.map(lambda j: np.sum(j * (hessian @ j)), jacobian)
    sizes = jax.tree.map(jnp.size, params)
    return np.asarray(
        [
            sum(jax.tree.leaves(traces[k])) / sum(jax.tree.leaves(sizes[k]))
            for k in layer_names(params)
        ]
    )


def double(make, **options):
    params, apply_fn, inputs, targets = make(dtype=jnp.float64, **options)
    return params, apply_fn, inputs, targets


def batch_norm(n=8):
    """Statistics of the batch: every output depends on every example."""
    params, _, x, y = double(networks.mlp, n=n)

    def apply_fn(p, x):
        h = x @ p["Dense_0"]["kernel"]
        h = (h - jnp.mean(h, 0, keepdims=True)) / jnp.sqrt(jnp.var(h, 0, keepdims=True) + 1e-3)
        h = jnp.tanh(h + p["Dense_0"]["bias"][None]) @ p["Dense_1"]["kernel"]
        h = jnp.tanh(h + p["Dense_1"]["bias"][None])
        return h @ p["Dense_2"]["kernel"] + p["Dense_2"]["bias"][None]

    return params, apply_fn, x, y


def dropout(n=8):
    """One mask for one step: forward, gradient and estimate are of the same function."""
    params, apply_fn, x, y = double(networks.mlp, n=n)
    mask = jax.random.bernoulli(jax.random.key(3), 0.7, x.shape).astype(x.dtype)
    return params, lambda p, x: apply_fn(p, x * mask), x, y


def micro_batches():
    """Four micro-batches of three, in the memory of one: an example is then a micro-batch."""
    params, apply_fn, x, y = double(networks.mlp, n=12)
    one = jax.checkpoint(apply_fn)
    rows = x.reshape(4, 3, -1), y.reshape(4, 3)
    return params, lambda p, xs: jax.lax.map(lambda x: one(p, x), xs), *rows


@jax.custom_vjp
def fused_tanh(x):
    return jnp.tanh(x)


@jax.custom_vjp
def _fused_gradient(y, g):
    return g * (1 - y**2)


# A derivative rule without a derivative of its own: no second derivative exists.
_fused_gradient.defvjp(lambda y, g: (_fused_gradient(y, g), None), lambda _, g: None)
fused_tanh.defvjp(lambda x: (jnp.tanh(x),) * 2, lambda y, g: (_fused_gradient(y, g),))


def fused():
    draws, _, x, y = double(networks.mlp, n=8)
    params = {"in": draws["Dense_0"]["kernel"], "out": draws["Dense_1"]["kernel"]}
    return params, lambda p, x: fused_tanh(x @ p["in"]) @ p["out"], x, y


def regression():
    params, apply_fn, x, _ = double(networks.mlp, n=8)
    return params, apply_fn, x, jnp.asarray(np.random.default_rng(1).normal(size=(8, 3)))


CASES = {
    "mlp": (lambda: double(networks.mlp), "softmax_cross_entropy"),
    "cnn": (lambda: double(networks.cnn), "softmax_cross_entropy"),
    "transformer, tied": (lambda: double(networks.transformer, blocks=2), "softmax_cross_entropy"),
    "rnn": (lambda: double(networks.rnn), "softmax_cross_entropy"),
    "batch norm": (batch_norm, "softmax_cross_entropy"),
    "dropout": (dropout, "softmax_cross_entropy"),
    "micro-batches": (micro_batches, "softmax_cross_entropy"),
    "custom_vjp": (fused, "softmax_cross_entropy"),
    "squared error": (regression, "squared_error"),
    "sigmoid": (
        lambda: (lambda p, f, x, y: (p, f, x, jax.nn.one_hot(y, 3)))(*double(networks.mlp)),
        "sigmoid_binary_cross_entropy",
    ),
}


QUICK = ("mlp", "batch norm", "custom_vjp")


def assert_unbiased(estimate, exact):
    assert (jnp.abs(estimate.mean - exact) < 5 * estimate.std_error).all(), (estimate, exact)
    # A test that could fail: a bias of a third would be seen everywhere.
    assert (estimate.std_error < exact / 15).all(), estimate.std_error / exact


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_unbiased(x64, case):
    make, loss = CASES[case]
    params, apply_fn, inputs, targets = make()
    task = supervised(apply_fn, inputs, targets, loss=loss)
    estimate = jax.jit(lambda key: layer_curvature(params, key, estimator=fisher(1500), **task))
    exact = exact_gauss_newton(params, apply_fn, inputs, targets, loss)
    for seed in (0, 1):
        assert_unbiased(estimate(jax.random.key(seed)), exact)


@pytest.mark.parametrize("case", ["mlp", pytest.param("transformer, tied", marks=pytest.mark.slow)])
def test_unbiased_with_padding_and_weights(x64, case):
    params, apply_fn, inputs, targets = CASES[case][0]()
    rng = np.random.default_rng(2)
    weights = jnp.asarray(rng.choice([0.0, 0.5, 1.0, 2.0], size=targets.shape))
    task = supervised(apply_fn, inputs, targets, weights=weights)
    estimate = jax.jit(lambda: layer_curvature(params, 3, estimator=fisher(3000), **task))()
    exact = exact_gauss_newton(params, apply_fn, inputs, targets, "softmax_cross_entropy", weights)
    assert_unbiased(estimate, exact)


def test_losses_of_padding_may_hold_anything():
    params = {"w": jnp.ones(2)}
    losses = lambda p, key: (p["w"] + jnp.asarray([0.0, jnp.inf]), jnp.asarray([1.0, 0.0]))  # noqa: E731
    tx = track_curvature(fisher(), update_interval=1)
    with jax.debug_nans(True):  # 0 times infinity would be one
        _, state = tx.update(params, tx.init(params), params, sampled_losses_fn=losses)
    assert state.curvature.tolist() == [0.5]


def test_standard_error_is_the_spread_of_samples():
    params, apply_fn, inputs, targets = networks.mlp()
    task = supervised(apply_fn, inputs, targets)
    many = [
        jax.jit(lambda key, k=k: layer_curvature(params, key, estimator=fisher(k), **task))
        for k in (20, 1)
    ]
    keys = jax.random.split(jax.random.key(0), 300)
    of_20 = jax.lax.map(many[0], keys)
    np.testing.assert_allclose(
        jnp.sqrt(jnp.mean(of_20.std_error**2, 0)), jnp.std(of_20.mean, 0), rtol=0.2
    )
    assert jnp.isnan(many[1](keys[0]).std_error).all()


def test_stacked_layers(x64):
    """A scan's slices are layers; the estimate is that of the same layers held apart."""
    params, _, x, y = double(networks.mlp)
    kernels = jnp.stack([params["Dense_1"]["kernel"]] * 2)

    def apply_fn(p, x):
        h, _ = jax.lax.scan(
            lambda h, w: (jnp.tanh(h @ w), None), jnp.tanh(x @ p["in"]), p["blocks"]
        )
        return h[:, :3]

    def apart(p, x):
        h = jnp.tanh(x @ p["in"])
        for name in ("blocks_0", "blocks_1"):
            h = jnp.tanh(h @ p[name])
        return h[:, :3]

    one = {"in": params["Dense_0"]["kernel"], "blocks": kernels}
    other = {"in": one["in"], "blocks_0": kernels[0], "blocks_1": kernels[1]}
    options = {"estimator": fisher(5), "layers": stacked("blocks")}
    together = compiled_curvature(one, **options, **supervised(apply_fn, x, y))
    separate = compiled_curvature(other, estimator=fisher(5), **supervised(apart, x, y))
    np.testing.assert_allclose(together.mean, separate.mean, rtol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, SLOW(jnp.float16)])
def test_half_precision(dtype):
    """Labels are drawn from outputs rounded to eight or eleven bits; the sums are in float32."""

    def estimate_in(dtype, key):
        params, *data = networks.mlp(dtype=dtype)
        return compiled_curvature(params, key, estimator=fisher(400), **supervised(*data))

    exact, estimate = estimate_in(jnp.float32, 0), estimate_in(dtype, 1)
    assert estimate.mean.dtype == jnp.float32
    difference = jnp.abs(estimate.mean - exact.mean)
    assert (
        difference < 5 * jnp.hypot(estimate.std_error, exact.std_error) + 0.02 * exact.mean
    ).all()


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("batch", AxisType.Auto),
        ("params", AxisType.Explicit),
        SLOW("batch", AxisType.Explicit),
        SLOW("params", AxisType.Auto),
    ],
)
def test_sharded_arrays(what, kind):
    """Under jit, arrays over eight devices give what one device gives."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(16, 8)) / 4, jnp.float32)}
    inputs = jnp.asarray(rng.normal(size=(16, 16)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 8, 16))

    def apply_fn(p, x):
        # With explicit axes it is the user who says how what contracts over a sharded axis is laid
        # out.
        layout = {"out_sharding": P("data" if what == "batch" else None)} if use_layout else {}
        return jnp.einsum("bi,io->bo", x, p["w"], **layout)

    def curvature(params, x, y):
        task = supervised(apply_fn, x, y)
        return layer_curvature(params, 0, estimator=fisher(2), **task).mean

    use_layout = False
    expected = jax.jit(lambda *args: curvature(*args))(params, inputs, targets)
    use_layout = kind == AxisType.Explicit
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(kind,))):
        sharding = NamedSharding(jax.sharding.get_mesh(), P("data"))
        if what == "batch":
            inputs, targets = jax.device_put((inputs, targets), sharding)
        else:
            params = jax.device_put(params, sharding)
        found = jax.jit(curvature)(params, inputs, targets)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_scanned_network_of_80_layers_is_traced_once():
    """As many equations for 80 blocks as for 2: so it is traced and compiled in the same time."""

    def equations(depth):
        params = {"blocks": jnp.ones((depth, 4, 4)), "out": jnp.ones((4, 3))}

        def apply_fn(p, x):
            return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["blocks"])[0] @ p["out"]

        task = supervised(apply_fn, jnp.ones((2, 4)), jnp.zeros(2, jnp.int32))
        tx = track_curvature(fisher(), layers=stacked("blocks"))
        step = lambda p: tx.update(p, tx.init(p), p, **task)  # noqa: E731
        return str(jax.make_jaxpr(step)(params)).count(" = ")

    assert equations(80) == equations(2)


def test_devices_estimate_from_their_own_part_and_draws(x64):
    """In shard_map: unbiased for the whole batch, and only L numbers are summed over devices."""
    params, apply_fn, inputs, targets = double(networks.mlp, n=8)
    exact = exact_gauss_newton(params, apply_fn, inputs, targets, "softmax_cross_entropy")
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def tracked(x, y, key):
        tx = track_curvature(fisher(), update_interval=1, axis_name="d", key=key)
        task = supervised(apply_fn, x, y)
        return tx.update(params, tx.init(params), params, **task)[1].curvature

    def many(x, y):
        keys = jax.random.split(jax.random.key(0), 1000)
        return jax.lax.map(lambda key: tracked(x, y, key), keys)

    specs = {"mesh": mesh, "in_specs": (P("d"), P("d")), "out_specs": P()}
    samples = jax.jit(jax.shard_map(many, **specs))(inputs, targets)
    error = samples.std(0) / 1000**0.5
    assert (jnp.abs(samples.mean(0) - exact) < 5 * error).all()
    one = jax.shard_map(lambda x, y: tracked(x, y, jax.random.key(0)), **specs)
    text = jax.jit(one).lower(inputs, targets).compile().as_text()
    reduced = [line for line in text.splitlines() if " all-reduce(" in line]
    assert reduced
    assert all("f64[3]" in line for line in reduced), reduced


# What is refused.


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (None, r"sampled_losses_fn is missing.*supervised\(apply_fn, inputs"),
        (lambda p, key: jnp.sum(p["w"]), r"must return the losses of all predictions, not reduced"),
        (lambda p, key: jnp.ones(3, jnp.int32), r"must return the losses"),
        (lambda p, key: (p["w"], jnp.ones(2)), r"weights of the losses' shape \(3,\); got \(2,\)"),
    ],
    ids=["missing", "reduced", "integers", "weights"],
)
def test_bad_losses(losses, message):
    with pytest.raises(ValueError, match=message):
        layer_curvature({"w": jnp.ones(3)}, 0, estimator=fisher(), sampled_losses_fn=losses)


def test_a_negative_weight_makes_the_estimate_unknown():
    losses = lambda p, key: (p["w"], jnp.asarray([1.0, -1.0, 1.0]))  # noqa: E731
    with jax.debug_nans(False):
        found = layer_curvature({"w": jnp.ones(3)}, 0, estimator=fisher(), sampled_losses_fn=losses)
    assert jnp.isnan(found.mean).all()


def test_losses_that_sum_over_devices():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def step(x):
        losses = lambda p, key: p["w"] * jax.lax.pmean(x, "d")  # noqa: E731
        tx = track_curvature(fisher(), update_interval=1, axis_name="d")
        params = {"w": jnp.ones(2)}
        return tx.update(params, tx.init(params), params, sampled_losses_fn=losses)[1].curvature

    with pytest.raises(ValueError, match="sampled_losses_fn holds a collective"):
        jax.shard_map(step, mesh=mesh, in_specs=P("d"), out_specs=P())(jnp.ones(8))


def test_num_samples():
    with pytest.raises(ValueError, match=r"num_samples must be an integer of at least 1; got 0"):
        fisher(0)
