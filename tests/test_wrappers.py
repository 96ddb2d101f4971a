"""LAMA-Adam inside every wrapper of optax: it trains there, or the first call says what to write.

What a wrapper may get wrong is the curvature: which parameters the estimate is made at, or that
it is not made at all. So each test compares the curvature found in the wrapped state with the
exact trace at the parameters that the wrapper's own documentation names. The estimates are exact
traces, so that both sides are the same number up to rounding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import mlp

from lama_optax import (
    LamaState,
    exact_trace,
    hutchinson,
    lama_adam,
    lama_scale,
    layer_curvature,
    layer_report,
)

# Wrappers and optax.adam promote dtypes implicitly; the library itself is strict elsewhere.
pytestmark = pytest.mark.standard_promotion

PARAMS, LOSS = mlp()
LAYERS = ("Dense_0", "Dense_1")
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
MASK = {"Dense_0": True, "Dense_1": False}
KERNELS = {name: {"kernel": True, "bias": False} for name in LAYERS}
# Two float32 programs that sum some 100 products in another order; curvature is of size 0.1.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}

lama = functools.partial(
    lama_adam, 0.03, estimator=exact_trace(), sensitivity=1.0, update_interval=1
)
scale = functools.partial(lama_scale, estimator=exact_trace(), sensitivity=1.0, update_interval=1)


@functools.cache
def exact_curvature():
    """A compiled function: params -> the exact mean of each layer, by name."""
    estimate = functools.partial(layer_curvature, key=0, estimator=exact_trace(), value_fn=LOSS)
    compiled = jax.jit(lambda params: estimate(params).mean)
    return lambda params: dict(zip(LAYERS, np.asarray(compiled(params)).tolist(), strict=True))


def bind(tx, value_fn):
    """What our error message tells users to write where a wrapper drops extra arguments."""
    return optax.GradientTransformation(tx.init, functools.partial(tx.update, value_fn=value_fn))


def train(tx, steps=40, params=PARAMS, extra_args=lambda params, value: {"value_fn": LOSS}):
    """Trains; returns the params before every step and after the last, the state and the last loss.

    The step must be traced once: a state whose dtypes or shapes a wrapper changes is traced anew.
    """
    traces = 0

    @jax.jit
    def step(params, state):
        nonlocal traces
        traces += 1
        value, grads = jax.value_and_grad(LOSS)(params)
        updates, state = tx.update(grads, state, params, **extra_args(params, value))
        return optax.apply_updates(params, updates), state

    state, history = tx.init(params), [params]
    for _ in range(steps):
        params, state = step(params, state)
        history.append(params)
    assert traces == 1
    return history, state, float(LOSS(params))


def curvatures(state, params=PARAMS):
    return {name: row["curvature"] for name, row in layer_report(state, params).items()}


def assert_trained(value):
    # Adam at this rate gets from 1.48 to below 0.6 in 40 steps; 1.0 leaves room for wrappers that
    # step less often. An update of the wrong sign, or none, cannot get there.
    assert float(LOSS(PARAMS)) > 1.4
    assert value < 1.0


# -- wrappers that pass extra arguments on ----------------------------------------------------

WRAPPERS = {
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), scale(), optax.scale_by_learning_rate(0.03)
    ),
    "named_chain": lambda: optax.named_chain(
        ("lama", scale()), ("rate", optax.scale_by_learning_rate(0.03))
    ),
    "clip": lambda: optax.chain(optax.clip(0.1), lama()),
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.1), lama()),
    "clip_after": lambda: optax.chain(lama(), optax.clip_by_global_norm(0.1)),
    "weight_decay_mask": lambda: lama(weight_decay=1e-3, mask=KERNELS),
    "add_decayed_weights": lambda: optax.chain(
        scale(), optax.add_decayed_weights(1e-3, KERNELS), optax.scale_by_learning_rate(0.03)
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(lama(), max_consecutive_errors=3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(lama_adam)(
        learning_rate=optax.linear_schedule(0.05, 0.02, 40),
        sensitivity=optax.linear_schedule(1.0, 0.5, 40),
        estimator=exact_trace(),
        update_interval=1,
    ),
    "reduce_on_plateau": lambda: optax.chain(
        lama(), optax.contrib.reduce_on_plateau(factor=0.5, patience=5)
    ),
    "mechanize": lambda: optax.contrib.mechanize(lama(), s_init=1e-2),
    "schedule_free": lambda: optax.contrib.schedule_free(lama(), learning_rate=0.03, b1=0.9),
}


QUICK = ("chain", "weight_decay_mask", "inject_hyperparams", "schedule_free")


@pytest.mark.parametrize("name", [name if name in QUICK else SLOW(name) for name in WRAPPERS])
def test_trains_with_the_estimate_at_the_current_params(name):
    def extra_args(params, value):
        return {"value_fn": LOSS} | ({"value": value} if name == "reduce_on_plateau" else {})

    history, state, value = train(WRAPPERS[name](), extra_args=extra_args)
    if name == "schedule_free":
        # Gradients and estimates belong to the training point y; users evaluate at x.
        value = float(LOSS(optax.contrib.schedule_free_eval_params(state, history[-1])))
    assert_trained(value)
    assert curvatures(state) == {
        layer: pytest.approx(h, rel=TOLERANCE["rtol"], abs=TOLERANCE["atol"])
        for layer, h in exact_curvature()(history[-2]).items()
    }
    # A sensitivity of 1 and curvatures of 0.01 and more move alpha visibly away from 1.
    assert all(abs(row["alpha"] - 1) > 1e-3 for row in layer_report(state, PARAMS).values())


def test_multi_steps_keeps_the_estimate_of_the_micro_step_that_emits():
    history, state, value = train(optax.MultiSteps(lama(), every_k_schedule=2), steps=60)
    assert_trained(value)
    # The parameters move at every second step only, so the last two steps began at the same ones:
    # those from which the last update took them away.
    third, second, last = (params["Dense_0"]["kernel"].tolist() for params in history[-3:])
    assert third == second != last
    assert curvatures(state) == pytest.approx(exact_curvature()(history[-3]), rel=1e-4, abs=1e-5)
    (inner,) = [s for s in jax.tree.leaves(state, is_leaf=_is_lama) if _is_lama(s)]
    assert int(inner.count) == 30  # one update kept for each emitted step


def _is_lama(node):
    return isinstance(node, LamaState)


# -- a part of the params hidden: the curvature comes from outside -----------------------------


def whole_curvature(params, key=0, estimator=exact_trace()):
    """The recipe of our error message: one scalar a leaf, shaped like params."""
    c = layer_curvature(params, key, estimator=estimator, layers="leaf", value_fn=LOSS)
    return jax.tree.unflatten(jax.tree.structure(params), c.mean)


HIDING = {
    "masked": lambda tx: optax.chain(
        optax.masked(tx, MASK), optax.masked(optax.sgd(0.1), {"Dense_0": False, "Dense_1": True})
    ),
    "partition": lambda tx: optax.partition(
        {"lama": tx, "adam": optax.adam(0.03)}, {"Dense_0": "lama", "Dense_1": "adam"}
    ),
}


@pytest.mark.parametrize("name", HIDING)
def test_hidden_params_name_the_remedy_at_the_first_call(name):
    tx = HIDING[name](lama())
    state = tx.init(PARAMS)
    message = r"hidden a part of params \(MaskedNode\).*curvature=.*layer_curvature\(params, key"
    with pytest.raises(ValueError, match=message):
        tx.update(PARAMS, state, PARAMS, value_fn=LOSS)


@pytest.mark.parametrize("name", ["masked", SLOW("partition")])
def test_hidden_params_train_with_the_curvature_of_the_whole(name):
    tx = HIDING[name](lama())
    history, state, value = train(
        tx, extra_args=lambda params, value: {"curvature": whole_curvature(params)}
    )
    assert_trained(value)
    expected = exact_curvature()(history[-2])["Dense_0"]
    assert curvatures(state) == {"Dense_0": pytest.approx(expected, rel=1e-4, abs=1e-5)}


def test_curvature_of_one_scalar_a_module_beside_a_hidden_one():
    tx = optax.masked(lama(), MASK)
    curvature = {"Dense_0": 2.0, "Dense_1": {"kernel": 3.0, "bias": 4.0}}
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, curvature=curvature)
    assert curvatures(state) == {"Dense_0": 2.0}


@pytest.mark.slow
def test_worked_example_lama_for_one_group_and_adam_for_the_other():
    """The body of a network by LAMA-Adam, its head by Adam, each at a rate of its own."""
    tx = optax.partition(
        {"body": lama_adam(0.03, sensitivity=1.0, update_interval=1), "head": optax.adam(0.01)},
        {"Dense_0": "body", "Dense_1": "head"},
    )

    @jax.jit
    def train_step(params, state, key):
        value, grads = jax.value_and_grad(LOSS)(params)
        c = layer_curvature(
            params, key, estimator=hutchinson(num_probes=10), layers="leaf", value_fn=LOSS
        )
        curvature = jax.tree.unflatten(jax.tree.structure(params), c.mean)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, value, updates

    params, state = PARAMS, tx.init(PARAMS)
    adam = optax.adam(0.01)
    adam_state = adam.init(PARAMS["Dense_1"])
    adam_update = jax.jit(lambda p, s: adam.update(jax.grad(LOSS)(p)["Dense_1"], s))
    for key in jax.random.split(jax.random.key(0, impl="rbg"), 40):
        expected, adam_state = adam_update(params, adam_state)
        params, state, value, updates = train_step(params, state, key)
        # The head's updates are Adam's, whatever LAMA does beside it; a rounding in the gradient
        # moves m/sqrt(v) by as much again, hence 1e-3 of a step of 0.01.
        for u, e in zip(
            jax.tree.leaves(updates["Dense_1"]), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(u, e, rtol=1e-3, atol=1e-5)
    assert_trained(value)
    report = layer_report(state, params)
    assert set(report) == {"Dense_0"}
    assert report["Dense_0"]["alpha"] != 1


# -- wrappers that take no extra arguments -----------------------------------------------------


def sam(tx, opaque):
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    return optax.contrib.sam(tx, adversary, sync_period=2, opaque_mode=opaque)


def sam_arguments(opaque):
    return {"grad_fn": lambda p, _: jax.grad(LOSS)(p)} if opaque else {}


@pytest.mark.parametrize("opaque", [False, True], ids=["transparent", "opaque"])
def test_sam_asks_for_a_bound_value_fn(opaque):
    tx = sam(lama(), opaque)
    with pytest.raises(ValueError, match=r"optax\.contrib\.sam\).*partial\(tx\.update, value_fn="):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, **sam_arguments(opaque))


def test_lookahead_asks_for_a_bound_value_fn():
    tx = optax.lookahead(lama(), sync_period=3, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    with pytest.raises(ValueError, match=r"\(optax\.lookahead,.*partial\(tx\.update, value_fn="):
        tx.update(PARAMS, tx.init(params), params)


def test_wrappers_without_extra_arguments_refuse_value_fn_themselves():
    """Optax's own TypeError, which no code of ours can reach; a later optax may pass it on."""
    if optax.__version__ != "0.2.8":
        pytest.skip("seen in optax 0.2.8")
    for tx, params in [
        (sam(lama(), False), PARAMS),
        (optax.lookahead(lama(), 3, 0.5), optax.LookaheadParams.init_synced(PARAMS)),
        (optax.contrib.split_real_and_imaginary(lama()), PARAMS),
    ]:
        with pytest.raises(TypeError, match="unexpected keyword argument 'value_fn'"):
            tx.update(PARAMS, tx.init(params), params, value_fn=LOSS)


@pytest.mark.parametrize("opaque", [False, SLOW(True)], ids=["transparent", "opaque"])
def test_sam_trains_with_a_bound_value_fn(opaque):
    history, state, value = train(
        sam(bind(lama(key=2**31 + 5), LOSS), opaque),
        steps=80,
        extra_args=lambda params, value: sam_arguments(opaque),
    )
    assert_trained(value)
    # Every second call is the outer step; it goes back to where the adversary set out from.
    before = history[-2 if opaque else -3]
    assert curvatures(state) == pytest.approx(exact_curvature()(before), rel=1e-4, abs=1e-5)
    # `sam` blends old and new state arithmetically: the key must come through.
    inner = next(s for s in jax.tree.leaves(state, is_leaf=_is_lama) if _is_lama(s))
    expected = jax.random.key_data(jax.random.key(2**31 + 5))
    assert inner.tracker.key.dtype == expected.dtype
    assert inner.tracker.key.tolist() == expected.tolist()


@pytest.mark.slow
def test_lookahead_trains_with_value_fn_bound_inside_the_step():
    """The batch changes from step to step, so the binding is made where the batch is known."""
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(16, 2)), jnp.float32)

    def batch_loss(params, batch):
        hidden = jnp.tanh(batch @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
        outputs = hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
        return jnp.mean((outputs[:, 0] - jnp.sin(batch[:, 0])) ** 2)

    traces = 0

    @jax.jit
    def train_step(params, state, batch):
        nonlocal traces
        traces += 1
        value_fn = functools.partial(batch_loss, batch=batch)
        tx = optax.lookahead(bind(lama(), value_fn), sync_period=3, slow_step_size=0.5)
        grads = jax.grad(value_fn)(params.fast)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = optax.LookaheadParams.init_synced(PARAMS)
    state = optax.lookahead(lama(), sync_period=3, slow_step_size=0.5).init(params)
    first = float(batch_loss(PARAMS, inputs))
    batches = [inputs[:8], inputs[4:12], inputs[8:]]
    for i in range(90):
        previous = params
        params, state = train_step(params, state, batches[i % 3])
    assert traces == 1
    assert float(batch_loss(params.slow, inputs)) < 0.2 * first
    last = functools.partial(batch_loss, batch=batches[89 % 3])
    estimate = functools.partial(layer_curvature, estimator=exact_trace(), value_fn=last)
    c = jax.jit(estimate)(previous.fast, 0)
    found = curvatures(state)
    np.testing.assert_allclose([found[name] for name in LAYERS], c.mean, **TOLERANCE)


def test_flatten_is_named_where_it_reshapes_params():
    tx = optax.flatten(lama())
    state = tx.init(PARAMS)
    # The user's own function fails on the flat vector, with whatever error it fails with.
    with pytest.raises(TypeError) as error:
        tx.update(PARAMS, state, PARAMS, value_fn=LOSS)
    notes = "\n".join(error.value.__notes__)
    assert "optax.flatten has reshaped params, leave it out" in notes
    # And left out, it trains: test_trains_with_the_estimate_at_the_current_params.
