"""Exact traces of Gauss-Newton blocks, against the Hessian where they must be its, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree
from models import compiled_curvature

from lama_optax import gauss_newton, lama_scale, layer_curvature, layer_names, stacked
from lama_optax.curvature import gauss_newton as gauss_newton_module

# Flax's layers promote implicitly.
pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("x64")]

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def _squares(z, example):
    return jnp.sum((z - example[1]) ** 2)


def _classes(z, example):
    return optax.softmax_cross_entropy_with_integer_labels(z, example[1]).mean()


def _flax(model, inputs):
    params = jax.jit(model.init)(jax.random.key(0), inputs[0])
    return jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params), model.apply


class _Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), param_dtype=jnp.float64)(x))  # more rows than inputs
        x = nn.max_pool(x, (2, 2), strides=(1, 1))
        x = nn.relu(nn.Conv(5, (3, 3), strides=2, padding="VALID", param_dtype=jnp.float64)(x))
        return nn.Dense(3, param_dtype=jnp.float64)(x.reshape(-1))


def cnn():
    images = _normal(1, 4, 7, 6, 2)
    params, apply = _flax(_Convolutions(), images)
    labels = np.random.default_rng(2).integers(0, 3, 4)
    return params, lambda p, e: apply(p, e[0]), _classes, (images, labels), "module"


def relu_mlp():
    """A weight that is used transposed, a layer on rows, and one that nothing depends on."""
    params = {
        "first": {"w": _normal(0, 8, 6), "b": _normal(1, 8)},
        "rows": {"w": _normal(2, 4, 5)},
        "last": {"w": _normal(3, 10, 3)},
        "unused": {"w": _normal(4, 2, 2)},
    }

    def outputs(p, example):
        h = jax.nn.relu(p["first"]["w"] @ example[0] + p["first"]["b"])
        h = jax.nn.relu(h.reshape(2, 4) @ p["rows"]["w"])
        return jnp.einsum("ij,ijk->k", h, p["last"]["w"].reshape(2, 5, 3))

    return params, outputs, _squares, (_normal(5, 6, 6), _normal(6, 6, 3)), "module"


def embedding():
    """Looked up, not multiplied: linear all the same."""
    params = {"table": {"w": _normal(0, 7, 4)}, "head": {"w": _normal(1, 4, 3)}}

    def outputs(p, example):
        return jax.nn.relu(jnp.mean(p["table"]["w"][example[0]], axis=0)) @ p["head"]["w"]

    words = np.random.default_rng(2).integers(0, 7, (5, 3))
    return params, outputs, _squares, (words, _normal(3, 5, 3)), "leaf"


def tanh_mlp():
    params = {"a": {"w": _normal(0, 5, 4), "b": _normal(1, 4)}, "b": {"w": _normal(2, 4, 3)}}

    def outputs(p, example):
        return jnp.tanh(example[0] @ p["a"]["w"] + p["a"]["b"]) @ p["b"]["w"]

    return params, outputs, _classes, (_normal(3, 6, 5), np.array([0, 1, 2, 2, 1, 0])), "module"


class _Transformer(nn.Module):
    """Attention, layer norms, and an embedding that is tied to the output."""

    @nn.compact
    def __call__(self, tokens):
        embedding = nn.Embed(7, 4, param_dtype=jnp.float64)
        x = embedding(tokens)
        h = nn.LayerNorm(param_dtype=jnp.float64)(x)
        x = x + nn.MultiHeadDotProductAttention(2, param_dtype=jnp.float64)(h, h)
        x = x + nn.Dense(4, param_dtype=jnp.float64)(nn.gelu(x))
        return embedding.attend(x)


def transformer():
    tokens = np.random.default_rng(0).integers(0, 7, (4, 5))
    params, apply = _flax(_Transformer(), tokens)
    return params, lambda p, e: apply(p, e[0]), _classes, (tokens, tokens[:, ::-1]), "module"


def scans():
    """Over time with shared weights, over depth with stacked ones."""
    params = {
        "cell": {"w": 0.5 * _normal(0, 4, 4)},
        "blocks": {"w": 0.5 * _normal(1, 3, 4, 4)},
        "out": {"w": _normal(2, 4, 2)},
    }

    def outputs(p, example):
        h, _ = jax.lax.scan(
            lambda h, x: (jnp.tanh(h @ p["cell"]["w"] + x), None), jnp.zeros(4), example[0]
        )
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["blocks"]["w"])
        return h @ p["out"]["w"]

    return params, outputs, _squares, (_normal(3, 5, 3, 4), _normal(4, 5, 2)), stacked("blocks")


def _found(model, batch=None, **options):
    params, outputs, loss, own_batch, layers = model()

    # Compiled as one program: operation by operation it is hundreds.
    @jax.jit
    def estimate(params, batch):
        return layer_curvature(
            params,
            0,
            estimator=gauss_newton(**options),
            layers=layers,
            example_output_fn=outputs,
            output_loss_fn=loss,
            batch=batch,
        )

    return estimate(params, own_batch if batch is None else batch)


def _by_layer(model, diagonal):
    """Means over the layers of what stands on the diagonal, by the names' own structure."""
    params, *_, layers = model()
    tree = ravel_pytree(params)[1](jnp.asarray(diagonal))
    if layers == "leaf":
        return [np.mean(leaf) for leaf in jax.tree.leaves(tree)]
    tree = tree.get("params", tree)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(entry.key for entry in path[:-1])
        found.setdefault(name, []).append(np.asarray(leaf))
    if not isinstance(layers, str):
        blocks = found.pop("blocks")
        found |= {f"blocks/{i}": [x[i] for x in blocks] for i in range(3)}
    means = {k: np.mean(np.concatenate([x.ravel() for x in v])) for k, v in found.items()}
    names = layer_names(params, layers)
    assert set(means) == {name.replace("[", "/").rstrip("]") for name in names}
    return [means[name.replace("[", "/").rstrip("]")] for name in names]


@pytest.mark.parametrize("model", [relu_mlp, embedding, SLOW(cnn)])
def test_is_the_hessians_where_outputs_are_piecewise_linear(model):
    params, outputs, loss, batch, _ = model()
    flat, unravel = ravel_pytree(params)

    def value(x):
        return jnp.mean(jax.vmap(lambda e: loss(outputs(unravel(x), e), e))(batch))

    hessian = np.asarray(jax.jit(jax.hessian(value))(flat))
    found = _found(model)
    assert found.mean.dtype == jnp.float64
    # Sums of some thousand products, each rounded once.
    np.testing.assert_allclose(
        found.mean, _by_layer(model, np.diag(hessian)), rtol=1e-12, atol=1e-14
    )
    assert np.all(found.std_error == 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, SLOW(jnp.float16)])
def test_parameters_may_be_wider_than_the_arithmetic(dtype):
    params, _, loss, batch, layers = cnn()
    images = batch[0].astype(jnp.float32), batch[1]
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)

    def estimated(dtype):
        def model():
            def outputs(p, example):
                half = jax.tree.map(lambda x: x.astype(dtype), (p, example[0]))
                return _Convolutions().apply(*half)

            return params, outputs, loss, images, layers

        return _found(model).mean

    # Ten roundings of the dtype in a row.
    limit = 10 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(estimated(dtype), estimated(jnp.float32), rtol=limit)


@pytest.mark.parametrize("model", [tanh_mlp, scans, SLOW(transformer)])
def test_is_the_gauss_newton_matrix_of_any_network(model):
    params, outputs, loss, batch, _ = model()
    flat, unravel = ravel_pytree(params)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def parts(x, example):
        z = outputs(unravel(x), example)
        by_params = jax.jacfwd(lambda x: outputs(unravel(x), example).reshape(-1))(x)
        by_outputs = jax.hessian(lambda z: loss(z, example))(z).reshape(z.size, z.size)
        return by_params, by_outputs

    jacobian, hessian = map(np.asarray, parts(flat, batch))
    diagonal = np.einsum("bci,bcd,bdi->i", jacobian, hessian, jacobian) / len(jacobian)
    np.testing.assert_allclose(
        _found(model).mean, _by_layer(model, diagonal), rtol=1e-12, atol=1e-14
    )


def test_a_loop_over_parts_of_the_batch_changes_nothing(monkeypatch):
    whole = _found(relu_mlp)
    for entries in (1, 3000):  # one example at a time; several, and a rest
        monkeypatch.setattr(gauss_newton_module, "_MAX_ENTRIES", entries)
        np.testing.assert_allclose(_found(relu_mlp).mean, whole.mean, rtol=1e-13)


def test_trains_inside_an_optimizer():
    params, outputs, loss, batch, _ = relu_mlp()
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)
    tx = optax.chain(
        lama_scale(estimator=gauss_newton(), sensitivity=0.1, update_interval=2),
        optax.scale(-0.05),
    )
    state = tx.init(params)

    def value_fn(p):
        return jnp.mean(jax.vmap(lambda e: loss(outputs(p, e), e))(batch))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            jax.grad(value_fn)(params),
            state,
            params,
            example_output_fn=outputs,
            output_loss_fn=loss,
            batch=batch,
        )
        return optax.apply_updates(params, updates), state

    start = value_fn(params)
    for _ in range(50):
        params, state = step(params, state)
    assert value_fn(params) < 0.5 * start
    names = layer_names(params)
    assert all((c > 0) == (n != "unused") for c, n in zip(state[0].curvature, names, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch": None}, "example_output_fn, output_loss_fn and batch are needed"),
        ({"output_loss_fn": None}, "example_output_fn, output_loss_fn and batch are needed"),
        ({"batch": (jnp.ones((3, 2)), jnp.ones(2))}, "same number of examples"),
        ({"example_output_fn": lambda p, e: (p["w"], e)}, "must return one real array"),
        ({"example_output_fn": lambda p, e: jnp.arange(3)}, "must return one real array"),
        ({"output_loss_fn": lambda z, e: z}, "output_loss_fn must return a scalar"),
        ({"estimator": gauss_newton(max_outputs=1)}, r"at most max_outputs=1 numbers.*\(2,\)"),
    ],
)
def test_bad_input_is_named(changed, message):
    arguments = {
        "estimator": gauss_newton(),
        "example_output_fn": lambda p, e: p["w"] * e,
        "output_loss_fn": lambda z, e: jnp.sum(z**2),
        "batch": jnp.ones((3, 2)),
    }
    with pytest.raises(ValueError, match=message):
        layer_curvature({"w": jnp.ones(2)}, 0, **arguments | changed)


def test_bad_setting_is_named():
    with pytest.raises(ValueError, match="max_outputs"):
        gauss_newton(max_outputs=0)


def test_a_row_of_zeros_leaves_the_weights_before_it_known():
    """|h| has no derivative at h = 0, where a dead ReLU puts it."""
    params = {"first": {"w": jnp.ones((2, 3))}, "second": {"w": jnp.ones((3, 2))}}
    batch = jnp.array([[1.0, 2.0], [-1.0, -2.0]])
    found = compiled_curvature(
        params,
        estimator=gauss_newton(),
        example_output_fn=lambda p, x: jax.nn.relu(x @ p["first"]["w"]) @ p["second"]["w"],
        output_loss_fn=lambda z, x: jnp.sum(z**2) / 2,
        batch=batch,
    )
    # By hand, of the first example; the other has no gradient. 2 outputs, 3 hidden of 3 each.
    np.testing.assert_allclose(found.mean * found.size, [2 * 3 * 5 / 2, 2 * 27 / 2])
