"""Parts of real models: the estimate is the trace of the loss's own Hessian blocks.

The reference is `jax.hessian` of the raveled loss in double precision, cut into blocks by leaf.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from models import compiled_curvature
from parts import Part, draw, exact_means, tanh_with_vjp, with_activation

from lama_optax import exact_trace, hutchinson, lama_adam, layer_curvature

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
double = functools.partial(jnp.asarray, dtype=jnp.float64)


class BatchNormNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, name="inner", param_dtype=jnp.float64)(x)
        x = nn.BatchNorm(use_running_average=False, name="norm", param_dtype=jnp.float64)(x)
        return nn.Dense(1, name="outer", param_dtype=jnp.float64)(jnp.tanh(x))


class DropoutNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(4, name="inner", param_dtype=jnp.float64)(x))
        x = nn.Dropout(0.5, deterministic=False)(x)
        return nn.Dense(1, name="outer", param_dtype=jnp.float64)(x)


def batch_norm(seed):
    x, y = draw(seed)(8, 2), draw(seed + 1)(8, 1)
    model = BatchNormNet()
    variables = jax.jit(model.init)(jax.random.key(seed), x)
    stats = jax.tree.map(double, variables["batch_stats"])

    def value_fn(params):
        outputs, new = model.apply(
            {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
        )
        return jnp.mean((outputs - y) ** 2), new["batch_stats"]

    return Part(variables["params"], value_fn, has_aux=True)


def dropout(seed, key=0):
    x, y = draw(seed)(8, 2), draw(seed + 1)(8, 1)
    model = DropoutNet()
    rngs = {"params": jax.random.key(seed), "dropout": jax.random.key(1)}

    def value_fn(params):
        # The step's key, closed over: every evaluation of one estimate drops the same units.
        outputs = model.apply({"params": params}, x, rngs={"dropout": jax.random.key(key)})
        return jnp.mean((outputs - y) ** 2)

    return Part(jax.jit(model.init)(rngs, x)["params"], value_fn)


TOKENS = np.asarray([[0, 2], [2, 3], [3, 0]])  # 1 and 4 of the vocabulary of 5 are never used


def embedding(seed):
    params = {"embed": {"table": draw(seed)(5, 2)}, "head": {"kernel": draw(seed + 1)(2, 1)}}
    y = draw(seed + 2)(3, 1)

    def value_fn(p):
        h = jnp.tanh(p["embed"]["table"][TOKENS].sum(axis=1))
        return jnp.mean((h @ p["head"]["kernel"] - y) ** 2)

    return Part(params, value_fn)


def tied(seed):
    """One table embeds the tokens and reads the logits out: its block has the cross terms."""
    params = {"embed": {"table": draw(seed)(5, 2)}, "mix": {"kernel": draw(seed + 1)(2, 2)}}

    def value_fn(p):
        table = p["embed"]["table"]
        h = jnp.tanh(table[TOKENS[:, 0]] @ p["mix"]["kernel"])
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            h @ table.T, jnp.asarray(TOKENS[:, 1])
        ).mean()

    return Part(params, value_fn)


def rnn(seed, wrap=lambda cell: cell):
    params = {
        "cell": {"kernel": draw(seed)(2, 2), "recurrent": 0.7 * draw(seed + 1)(2, 2)},
        "head": {"kernel": draw(seed + 2)(2, 1)},
    }
    x, y = draw(seed + 3)(4, 3, 2), draw(seed + 4)(3, 1)

    def value_fn(p):
        @wrap
        def cell(h, x):
            return jnp.tanh(x @ p["cell"]["kernel"] + h @ p["cell"]["recurrent"])

        h, _ = jax.lax.scan(lambda h, x: (cell(h, x), None), jnp.zeros((3, 2), x.dtype), x)
        return jnp.mean((h @ p["head"]["kernel"] - y) ** 2)

    return Part(params, value_fn)


@jax.custom_jvp
def tanh_with_jvp(x):
    return jnp.tanh(x)


@tanh_with_jvp.defjvp
def _(primals, tangents):
    y = tanh_with_jvp(primals[0])
    return y, (1 - y**2) * tangents[0]


PARTS = {
    "batch_norm": batch_norm,
    "dropout": dropout,
    "embedding": embedding,
    "tied": tied,
    "rnn": rnn,
    "checkpoint": functools.partial(rnn, wrap=jax.checkpoint),
    "custom_jvp": functools.partial(with_activation, tanh_with_jvp),
    "custom_vjp": functools.partial(with_activation, tanh_with_vjp),
}


QUICK = ("batch_norm", "tied", "rnn", "custom_vjp")


# flax promotes implicitly.
@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", [x if x in QUICK else SLOW(x) for x in PARTS])
def test_curvature_is_the_hessians(x64, name):
    part = PARTS[name](seed=0)
    reference = part.reference or part.value_fn
    expected = exact_means(part.params, (lambda p: reference(p)[0]) if part.has_aux else reference)

    @jax.jit
    def estimates(params, key):
        exact = exact_trace(has_aux=part.has_aux)
        estimator = hutchinson(32, has_aux=part.has_aux)
        return (
            layer_curvature(params, 0, estimator=exact, value_fn=part.value_fn).mean,
            layer_curvature(params, key, estimator=estimator, value_fn=part.value_fn),
        )

    for seed in range(4):
        # This key's generator compiles faster than the default one.
        exact, sampled = estimates(part.params, jax.random.key(seed, impl="rbg"))
        # Double precision; sums of some 1,000 products of size 1, rounded at 1e-16.
        np.testing.assert_allclose(exact, expected, rtol=1e-11, atol=1e-12)
        # Four seeds of two or three layers: five standard errors are passed by 1 in 10,000 runs
        # with Student's t of 31 degrees, and the seeds are fixed.
        assert (np.abs(sampled.mean - expected) < 5 * sampled.std_error + 1e-12).all()
        assert (sampled.std_error > 1e-6).all()


@pytest.mark.standard_promotion
@pytest.mark.slow
def test_another_dropout_key_is_another_curvature(x64):
    """What makes the dropout case above a test of the mask."""
    masks = [dropout(0, key) for key in (0, 1)]
    means = [exact_means(part.params, part.value_fn) for part in masks]
    assert not np.allclose(*means, rtol=1e-2)


def test_unused_rows_of_an_embedding_stay(x64):
    part = embedding(0)
    tx = lama_adam(0.1, sensitivity=1.0, estimator=exact_trace(), update_interval=1)

    @jax.jit
    def step(params, state):
        grads = jax.grad(part.value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=part.value_fn)
        return optax.apply_updates(params, updates), state

    params, state = part.params, tx.init(part.params)
    for _ in range(5):
        params, state = step(params, state)
    moved = np.asarray(params["embed"]["table"] != part.params["embed"]["table"]).all(axis=1)
    # Rows of no gradient: m = 0 and v = 0, so the update is 0 / eps.
    assert moved.tolist() == [True, False, True, True, False]
    # And their zero curvature counts in the layer's mean: 4 of 10 entries are theirs.
    c = compiled_curvature(part.params, estimator=exact_trace(), value_fn=part.value_fn)
    assert c.size.tolist() == [10, 2]


# -- frozen leaves -----------------------------------------------------------------------------


def frozen_by_partition(tx):
    labels = {"cell": "frozen", "head": "lama"}
    return optax.partition({"lama": tx, "frozen": optax.set_to_zero()}, labels)


def frozen_by_masks(tx):
    train, freeze = {"cell": False, "head": True}, {"cell": True, "head": False}
    return optax.chain(optax.masked(tx, train), optax.masked(optax.set_to_zero(), freeze))


@pytest.mark.standard_promotion
@pytest.mark.parametrize("freeze", [frozen_by_partition, SLOW(frozen_by_masks)])
def test_frozen_leaves_stay_and_the_others_get_their_own_curvature(x64, freeze):
    part = rnn(0)
    tx = freeze(lama_adam(0.03, sensitivity=1.0, update_interval=1))

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(part.value_fn)(params)
        c = layer_curvature(
            params, 0, estimator=exact_trace(), layers="leaf", value_fn=part.value_fn
        )
        curvature = jax.tree.unflatten(jax.tree.structure(params), c.mean)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return (optax.apply_updates(params, updates), state), (value, c.mean)

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=30))
    (params, state), (values, curvature) = run(part.params)
    assert values[-1] < 0.9 * values[0]
    for x, y in zip(
        jax.tree.leaves(params["cell"]), jax.tree.leaves(part.params["cell"]), strict=True
    ):
        np.testing.assert_array_equal(x, y)
    found = optax.tree.get(state, "curvature")
    np.testing.assert_allclose(found, curvature[-1, 2:], rtol=1e-12)  # the head's one leaf


def test_a_frozen_part_can_be_closed_over(x64):
    """Without a mask: params are what trains, and value_fn holds the rest."""
    part = rnn(0)
    head = {"head": part.params["head"]}

    def value_fn(p):
        return part.value_fn({"cell": part.params["cell"], **p})

    c = compiled_curvature(head, estimator=exact_trace(), value_fn=value_fn)
    np.testing.assert_allclose(c.mean, exact_means(part.params, part.value_fn)[1:], rtol=1e-12)
