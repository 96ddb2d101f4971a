"""Parameters stacked along a depth axis count as that many layers, as if written out one by one.

The reference is the same network with a Python loop over separate modules. In double precision
the two are one network up to the order of rounding, so every comparison is far below the 1e-6
that users are promised.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from models import compiled_curvature

from lama_optax import (
    exact_trace,
    hutchinson,
    lama_adam,
    layer_curvature,
    layer_names,
    layer_report,
    stacked,
)

SLOW = pytest.mark.slow
DEPTH, WIDTH = 3, 2
LAYERS = stacked("blocks")
# Double precision; 12 steps of Adam's m/sqrt(v) enlarge roundings of 1e-15 by less than 1e4.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-11}


class Case(NamedTuple):
    """A stacked network beside the same one written out."""

    params: object
    loss_fn: object
    written_out: object  # params of the network written out
    loss_written_out: object
    names: dict  # layer of the stacked network -> layer of the other
    stack: object  # params written out -> stacked


def arrays(seed):
    rng = np.random.default_rng(seed)
    return lambda *shape: jnp.asarray(rng.normal(size=shape))


def data(seed):
    x = arrays(seed + 100)(8, WIDTH)
    return x, jnp.sin(x[:, :1])


def by_hand(seed):
    """A hand-written scan over {"kernel", "bias"} with a leading depth axis."""
    draw = arrays(seed)
    x, y = data(seed)
    params = {
        "embed": {"kernel": draw(WIDTH, WIDTH)},
        "blocks": {"kernel": draw(DEPTH, WIDTH, WIDTH), "bias": draw(DEPTH, WIDTH)},
        "head": {"kernel": draw(WIDTH, 1)},
    }

    def block(h, p):
        return h + jnp.tanh(h @ p["kernel"] + p["bias"][None])

    def loss_fn(params):
        h, _ = jax.lax.scan(
            lambda h, p: (block(h, p), None), x @ params["embed"]["kernel"], params["blocks"]
        )
        return jnp.mean((h @ params["head"]["kernel"] - y) ** 2)

    def loss_written_out(params):
        h = x @ params["embed"]["kernel"]
        for i in range(DEPTH):
            h = block(h, params[f"block_{i}"])
        return jnp.mean((h @ params["head"]["kernel"] - y) ** 2)

    written_out = {name: params[name] for name in ("embed", "head")} | unstack(params["blocks"])

    def stack(p):
        return {name: p[name] for name in ("embed", "head")} | {"blocks": restack(p)}

    names = {"embed": "embed", "head": "head"}
    names |= {f"blocks[{i}]": f"block_{i}" for i in range(DEPTH)}
    return Case(params, loss_fn, written_out, loss_written_out, names, stack)


def unstack(blocks):
    return {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(DEPTH)}


def restack(params):
    blocks = [params[f"block_{i}"] for i in range(DEPTH)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


class LinenBlock(nn.Module):
    """Two modules a block, so that one stacked name holds two stacked layers."""

    @nn.compact
    def __call__(self, h, _=None):
        inner = jnp.tanh(nn.Dense(WIDTH, name="up", param_dtype=jnp.float64)(h))
        return h + nn.Dense(WIDTH, name="down", param_dtype=jnp.float64)(inner), None


class LinenStacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH
        )
        h, _ = scan(name="blocks")(x, None)
        return nn.Dense(1, name="head", param_dtype=jnp.float64)(h)


class LinenWrittenOut(nn.Module):
    @nn.compact
    def __call__(self, h):
        for i in range(DEPTH):
            h, _ = LinenBlock(name=f"block_{i}")(h)
        return nn.Dense(1, name="head", param_dtype=jnp.float64)(h)


def linen(seed):
    x, y = data(seed)
    params = LinenStacked().init(jax.random.key(seed), x)["params"]

    def loss_of(model):
        return lambda params: jnp.mean((model.apply({"params": params}, x) - y) ** 2)

    names = {"head": "head"}
    for module in ("up", "down"):
        names |= {f"blocks/{module}[{i}]": f"block_{i}/{module}" for i in range(DEPTH)}
    return Case(
        params,
        loss_of(LinenStacked()),
        {"head": params["head"]} | unstack(params["blocks"]),
        loss_of(LinenWrittenOut()),
        names,
        lambda p: {"head": p["head"], "blocks": restack(p)},
    )


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, h):
        return h + jnp.tanh(self.linear(h))


class NnxStacked(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=DEPTH)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make_block(rngs):
            return NnxBlock(rngs)

        self.blocks = make_block(rngs)
        self.head = nnx.Linear(WIDTH, 1, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(block, h):
            return block(h)

        return self.head(forward(self.blocks, x))


def nnx_vmap(seed):
    x, y = data(seed)
    graphdef, params = nnx.split(NnxStacked(nnx.Rngs(seed)), nnx.Param)
    pure = nnx.to_pure_dict(params)

    def loss_fn(params):
        return jnp.mean((nnx.merge(graphdef, params)(x) - y) ** 2)

    def loss_written_out(params):
        h = x
        for i in range(DEPTH):
            linear = params[f"block_{i}"]["linear"]
            h = h + jnp.tanh(h @ linear["kernel"] + linear["bias"])
        return jnp.mean((h @ params["head"]["kernel"] + params["head"]["bias"] - y) ** 2)

    names = {"head": "head"} | {f"blocks/linear[{i}]": f"block_{i}/linear" for i in range(DEPTH)}
    return Case(
        params,
        loss_fn,
        {"head": pure["head"]} | unstack(pure["blocks"]),
        loss_written_out,
        names,
        lambda p: {"head": p["head"], "blocks": restack(p)},
    )


CASES = {"lax.scan": by_hand, "nn.scan": linen, "nnx.vmap": nnx_vmap}


def train(params, loss_fn, layers, steps=12):
    tx = lama_adam(0.03, sensitivity=1.0, estimator=exact_trace(), layers=layers, update_interval=1)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params, value_fn=loss_fn)
        return (optax.apply_updates(params, updates), state), (state[0].curvature, state[0].alpha)

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps))(params)


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "name", ["lax.scan", *(pytest.param(name, marks=SLOW) for name in ("nn.scan", "nnx.vmap"))]
)
def test_equal_to_the_network_written_out(x64, name):
    case = CASES[name](seed=0)
    losses = jax.jit(lambda a, b: (case.loss_fn(a), case.loss_written_out(b)))
    np.testing.assert_allclose(*losses(case.params, case.written_out), rtol=1e-14)
    names = layer_names(case.params, LAYERS)
    others = layer_names(case.written_out)
    assert sorted(names) == sorted(case.names)
    assert sorted(others) == sorted(case.names.values())
    order = [others.index(case.names[layer]) for layer in names]

    (params, state), (curvature, alpha) = train(case.params, case.loss_fn, LAYERS)
    (written_out, other), (curvature_, alpha_) = train(
        case.written_out, case.loss_written_out, "module"
    )
    # At every one of the steps, not only the last.
    np.testing.assert_allclose(curvature, curvature_[:, order], **TOLERANCE)
    np.testing.assert_allclose(alpha, alpha_[:, order], **TOLERANCE)
    expected = jax.tree.leaves(case.stack(written_out))
    for x, y in zip(jax.tree.leaves(params), expected, strict=True):
        np.testing.assert_allclose(x, y, **TOLERANCE)
    # The layers of one stack differ by more than any tolerance above: one alpha for the whole
    # stack would fail.
    blocks = [i for i, layer in enumerate(names) if layer.endswith("]")]
    assert np.ptp(np.asarray(alpha[-1])[blocks]) > 1e-3

    report = layer_report(state, params, LAYERS)
    other_report = layer_report(other, written_out)
    for layer, other_layer in case.names.items():
        row, other_row = report[layer], other_report[other_layer]
        assert row.keys() == other_row.keys()
        for name in ("curvature", "alpha", "momentum", "size"):
            assert row[name] == pytest.approx(other_row[name], rel=1e-9, abs=1e-10)


@pytest.mark.standard_promotion
def test_without_the_word_a_stack_is_one_layer(x64):
    case = linen(seed=1)
    assert layer_names(case.params) == ("blocks/down", "blocks/up", "head")
    # With collection and all, as model.init returns them.
    named = layer_names({"params": case.params}, LAYERS)
    assert named[:2] == ("blocks/down[0]", "blocks/down[1]")


@pytest.mark.parametrize("scope", ["joint", pytest.param("block", marks=SLOW)])
def test_hutchinson_estimates_each_layer_of_the_stack(x64, scope):
    case = by_hand(seed=2)
    estimator = hutchinson(64, scope=scope)

    @jax.jit
    def estimates(params, key):
        exact = layer_curvature(
            params, 0, estimator=exact_trace(), layers=LAYERS, value_fn=case.loss_fn
        )
        many = jax.lax.map(
            lambda k: layer_curvature(
                params, k, estimator=estimator, layers=LAYERS, value_fn=case.loss_fn
            ),
            jax.random.split(key, 4),
        )
        return exact, many

    exact, many = estimates(case.params, jax.random.key(0, impl="rbg"))
    # 20 estimates of 5 layers; five standard errors of normal noise are passed once in a million.
    # A stack of 2 x 2 blocks has off-diagonal entries, hence noise.
    assert (many.std_error > 1e-4).all()
    assert (jnp.abs(many.mean - exact.mean[None]) < 5 * many.std_error).all()
    assert exact.size.tolist() == [6, 6, 6, 4, 2]
    assert many.size[0].tolist() == exact.size.tolist()


def test_a_probe_of_the_sphere_has_each_layers_own_length(x64):
    # H = identity: v^T v / N is 1 exactly for each slice, or the norm was shared by the stack.
    params = {"blocks": {"w": jnp.ones((3, 5))}}

    def value_fn(p):
        return 0.5 * jnp.sum(p["blocks"]["w"] ** 2)

    estimator = hutchinson(2, probe="sphere")
    c = compiled_curvature(params, estimator=estimator, layers=LAYERS, value_fn=value_fn)
    np.testing.assert_allclose(c.mean, [1, 1, 1], rtol=1e-14)
