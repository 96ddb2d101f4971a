"""Eight devices give what one device gives, whatever the layout, and the optimizer moves no more.

Plain `jax.jit` over sharded arrays needs nothing from the user; inside `jax.shard_map` and
`jax.pmap` the optimizer takes ``axis_name``. Tolerances: the devices add the batch's 64 terms in
another order, which changes a gradient by some 1e-7 of itself, and a step of Adam's kind, of
length 1e-2, passes that on. Measured over 20 steps: parameters, which move by 0.2, within 4e-7;
curvatures (0.04 and 0.12) within 5e-8. A curvature wrong by one per cent moves the parameters by
1e-3, a thousand times the limit of 1e-6.
"""

import collections
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from lama_optax import (
    exact_trace,
    flipout,
    gauss_newton,
    hutchinson,
    lam,
    lama_adam,
    layer_curvature,
)
from lama_optax.curvature.probes import PROBES
from lama_optax.layers import resolve_layers

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
STEPS = 20
TOLERANCE = 1e-6

adapted = functools.partial(lama_adam, 1e-2, sensitivity=3.0, update_interval=1)
OPTIMIZERS = {
    "exact": functools.partial(adapted, estimator=exact_trace(), update_interval=5),
    "joint": functools.partial(adapted, estimator=hutchinson(4)),
    "block": functools.partial(adapted, estimator=hutchinson(2, scope="block", probe="sphere")),
    "finite_difference": functools.partial(
        adapted, estimator=hutchinson(3, hvp="finite_difference", probe="gaussian")
    ),
    "chunks": functools.partial(adapted, estimator=hutchinson(4, chunk_size=2)),
    "interval": functools.partial(
        adapted, estimator=hutchinson(3, chunk_size=1), update_interval=3, curvature_decay=0.5
    ),
    "lam": lambda: lam(1e-2, granularity="layer"),
}

# Every layout and kind of mesh for one estimator; one that is sharded for each of the others.
CASES = [
    *(("joint", "Auto", layout) for layout in ("dp", "fsdp", "tp")),
    ("joint", "Explicit", "fsdp"),
    SLOW("block", "Auto", "fsdp"),
    ("lam", "Auto", "tp"),
    *(SLOW("joint", "Explicit", layout) for layout in ("dp", "tp")),
    SLOW("chunks", "Explicit", "tp"),
    SLOW("finite_difference", "Auto", "tp"),
    SLOW("interval", "Explicit", "fsdp"),
]

ALL = ("data", "model")
SPECS = {  # of both kernels and biases, then of the batch; the mesh is 4 x 2
    "dp": ((P(), P(), P(), P()), P(ALL, None)),
    "fsdp": ((P(ALL, None), P(ALL), P(ALL, None), P(ALL)), P(ALL, None)),
    "tp": ((P(None, "model"), P("model"), P("model", None), P()), P("data", None)),
}


def tree(kernel_0, bias_0, kernel_1, bias_1):
    return {
        "hidden": {"kernel": kernel_0, "bias": bias_0},
        "head": {"kernel": kernel_1, "bias": bias_1},
    }


def start():
    rng = np.random.default_rng(0)

    def draw(*shape, scale=0.3):
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    return tree(draw(16, 32), draw(32), draw(32, 8), draw(8)), (
        draw(64, 16, scale=1.0),
        draw(64, 8, scale=1.0),
    )


def loss_fn(params, batch, gathered=None, contracted=None):
    """Mean squared error of a network 16-32-8.

    With explicit axis types it is the user who says what no rule of JAX's decides: that FSDP's
    parameters are ``gathered`` for use, and how a ``contracted`` product over the sharded hidden
    width is laid out.
    """
    inputs, targets = batch
    if gathered is not None:
        params = jax.tree.map(lambda leaf: reshard(leaf, gathered), params)
    hidden = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"][None, :])
    outputs = jnp.einsum("bh,ho->bo", hidden, params["head"]["kernel"], out_sharding=contracted)
    return jnp.mean((outputs + params["head"]["bias"][None, :] - targets) ** 2)


def make_step(tx, loss=loss_fn):
    tx = optax.with_extra_args_support(tx)

    def step(params, state, batch):
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, value_fn=lambda p: loss(p, batch))
        return optax.apply_updates(params, updates), state

    return step


def layout_on_mesh(kind, layout):
    """The mesh, the sharded parameters and batch, and the loss as one writes it for them."""
    mesh = jax.make_mesh((4, 2), ALL, axis_types=(getattr(AxisType, kind),) * 2)
    param_specs, batch_spec = SPECS[layout]
    params, batch = start()
    params = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)),
        *(params, tree(*param_specs)),
    )
    batch = jax.device_put(batch, NamedSharding(mesh, batch_spec))
    loss = loss_fn
    if kind == "Explicit" and layout == "fsdp":
        loss = functools.partial(loss_fn, gathered=P())
    elif kind == "Explicit" and layout == "tp":
        loss = functools.partial(loss_fn, contracted=P("data", None))
    return mesh, params, batch, loss


def on_mesh(mesh, state):
    """Scalars to every device, where the first step leaves them; the rest stays where it is."""
    everywhere = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda leaf: leaf if leaf.sharding.num_devices > 1 else jax.device_put(leaf, everywhere),
        state,
    )


@functools.cache
def compiled_step(name, kind, layout):
    """The step compiled once for these shardings, and what it starts from."""
    mesh, params, batch, loss = layout_on_mesh(kind, layout)
    tx = OPTIMIZERS[name]()
    with jax.set_mesh(mesh):
        state = on_mesh(mesh, tx.init(params))
        compiled = jax.jit(make_step(tx, loss)).lower(params, state, batch).compile()
    return compiled, params, state, batch


def train(step, params, state, batch):
    for _ in range(STEPS):
        params, state = step(params, state, batch)
    return params, state


@functools.cache
def on_one_device(name):
    params, batch = start()
    tx = OPTIMIZERS[name]()
    return train(jax.jit(make_step(tx)), params, tx.init(params), batch)


def assert_equal_training(params, state, name):
    """Compares parameters and the whole state with those of one device."""
    expected_params, expected_state = on_one_device(name)
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), expected_params, start()[0])
    assert min(jax.tree.leaves(moved)) > 0.05  # so that agreement means something
    for actual, expected in ((params, expected_params), (state[0], expected_state[0])):
        for leaves in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            a, b = (np.asarray(leaf, np.float64) for leaf in leaves)
            # A part in a million of entries above 1: sums of weights, whose last digit is 1e-6.
            assert np.all(np.abs(a - b) <= TOLERANCE * np.maximum(1, np.abs(b)))


@pytest.mark.parametrize(("name", "kind", "layout"), CASES)
def test_sharded_training_is_training_on_one_device(name, kind, layout):
    # A compiled step refuses other shardings than those it was compiled for: that it can be called
    # again with what it returned says that parameters and moments stay where they were put.
    step, params, state, batch = compiled_step(name, kind, layout)
    if name != "lam":
        moments = jax.tree.leaves((state[0].mu, state[0].nu))
        for leaf, moment in zip(jax.tree.leaves((params, params)), moments, strict=True):
            assert moment.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    assert_equal_training(*train(step, params, state, batch), name)


@pytest.mark.parametrize(("kind", "layout"), [("Auto", "fsdp"), ("Explicit", "tp")])
def test_probes_do_not_depend_on_the_sharding(kind, layout):
    """Generated in pieces where they are used, with those of one device."""
    mesh, params, _, _ = layout_on_mesh(kind, layout)

    def draw(key, params):
        layers = resolve_layers("module", params)
        return {name: probe(key, params, layers) for name, probe in PROBES.items()}

    expected = jax.jit(draw)(jax.random.key(3), start()[0])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    with jax.set_mesh(mesh):
        sharded = jax.jit(draw, out_shardings=dict.fromkeys(PROBES, shardings))
        key = jax.random.key(3)
        probes = sharded(key, params)
        assert not gathers(sharded.lower(key, params).compile())
    for name in PROBES:
        # Signs are bits. A normal number is a polynomial in its bits, which a kernel for a piece of
        # an array may round otherwise; a layer's norm is a sum over the devices.
        rtol = 0 if name == "rademacher" else 4 * np.finfo(np.float32).eps
        for a, b in zip(*map(jax.tree.leaves, (probes[name], expected[name])), strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol)


# Mapped by hand: shard_map and pmap -------------------------------------------------------------


def mapped_step(tx, how, value_fn_is_averaged):
    """Data parallel by hand, as users write it: the gradient is averaged by them."""

    def average(params, batch):
        return jax.lax.pmean(loss_fn(params, batch), "replicas")

    def step(params, state, batch):
        if how == "shard_map, checked":  # the gradient of a replicated argument is summed by JAX
            grads = jax.grad(average)(params, batch)
        else:
            grads = jax.lax.pmean(jax.grad(loss_fn)(params, batch), "replicas")
        value_fn = average if value_fn_is_averaged else loss_fn
        updates, state = tx.update(grads, state, params, value_fn=lambda p: value_fn(p, batch))
        return optax.apply_updates(params, updates), state

    return step


def train_mapped(tx, how, value_fn_is_averaged=False):
    """The parameters and the state after training, with the replicas along the first axis."""
    params, batch = start()
    start_from = params, tx.init(params)
    step = mapped_step(tx, how, value_fn_is_averaged)
    mesh = jax.make_mesh((8,), ("replicas",), axis_types=(AxisType.Auto,))
    if how == "pmap":
        stacked = jax.tree.map(lambda leaf: np.stack([leaf] * 8), start_from)
        start_from = jax.device_put(stacked, NamedSharding(mesh, P("replicas")))
        batch = jax.tree.map(lambda leaf: leaf.reshape(8, 8, -1), batch)
        return train(jax.pmap(step, axis_name="replicas"), *start_from, batch)
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), P(), P("replicas")),
        out_specs=P(),
        check_vma=how == "shard_map, checked",
    )
    trained = train(jax.jit(mapped), *on_mesh(mesh, start_from), batch)
    return jax.tree.map(
        lambda leaf: np.stack([shard.data for shard in leaf.addressable_shards]), trained
    )


@pytest.mark.parametrize(
    ("name", "how", "value_fn_is_averaged"),
    [
        ("joint", "shard_map, checked", False),
        SLOW("exact", "shard_map, checked", False),
        ("exact", "shard_map, unchecked", False),
        SLOW("block", "shard_map, checked", True),
        SLOW("finite_difference", "shard_map, unchecked", True),
        SLOW("interval", "shard_map, checked", True),
        ("interval", "pmap", True),
    ],
)
def test_replicas_agree_to_the_bit_and_with_one_device(name, how, value_fn_is_averaged):
    tx = OPTIMIZERS[name](axis_name="replicas")
    trained = train_mapped(tx, how, value_fn_is_averaged)
    for leaf in jax.tree.leaves(trained):
        assert len(leaf) == 8
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    if name != "joint":  # whose devices draw probes of their own
        assert_equal_training(*jax.tree.map(lambda leaf: leaf[0], trained), name)


def example_loss(params, example):
    return loss_fn(params, jax.tree.map(lambda x: x[None], example))


def example_outputs(params, example):
    hidden = jnp.tanh(example[0] @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


PER_EXAMPLE = {
    "flipout joint": (flipout(2, scope="joint"), {"example_value_fn": example_loss}),
    "flipout block": (flipout(2, scope="block"), {"example_value_fn": example_loss}),
    "gauss_newton": (
        gauss_newton(),
        {
            "example_output_fn": example_outputs,
            "output_loss_fn": lambda outputs, example: jnp.mean((outputs - example[1]) ** 2),
        },
    ),
}


@pytest.mark.parametrize(
    ("name", "check_vma"),
    [
        ("flipout joint", True),
        ("flipout block", False),
        ("gauss_newton", True),
        SLOW("flipout joint", False),
        SLOW("flipout block", True),
        SLOW("gauss_newton", False),
    ],
)
def test_estimators_by_example_are_averaged_over_the_devices(name, check_vma):
    """Each device estimates from its own examples; no derivative is summed over the devices."""
    estimator, functions = PER_EXAMPLE[name]
    params, batch = start()

    def estimate(params, batch):
        return layer_curvature(params, 0, estimator=estimator, batch=batch, **functions).mean

    mesh = jax.make_mesh((8,), ("replicas",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        lambda p, b: jax.lax.pmean(estimate(p, b), "replicas"),
        mesh=mesh,
        in_specs=(P(), P("replicas")),
        out_specs=P(),
        check_vma=check_vma,
    )
    parts = jax.tree.map(lambda x: x.reshape(8, 8, *x.shape[1:]), batch)
    expected = jnp.mean(jax.lax.map(lambda part: estimate(params, part), parts), axis=0)
    found = jax.jit(mapped)(params, batch)
    # Of float32: sums of 64 terms in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_without_axis_name_the_replicas_would_drift_apart():
    """Why ``axis_name`` is there: each replica would follow the curvature of its own examples."""
    params, state = train_mapped(OPTIMIZERS["joint"](), "shard_map, unchecked")
    assert np.all(np.ptp(state[0].curvature, axis=0) > 1e-3)
    assert all(np.max(np.ptp(leaf, axis=0)) > 1e-4 for leaf in jax.tree.leaves(params))


# What the compiled step moves between the devices -----------------------------------------------
#
# What holds for the step with LAMA, asserted below:
# - data parallel and tensor parallel: nothing is gathered. The products v^T H v add all-reduces of
#   the shapes of the gradient's own;
# - FSDP, automatic axis types: what is gathered is parameters that the gradient gathers too, each
#   once more at most (XLA does not see that the second derivative wants the same; it does for
#   kernels, not for biases). No moment is gathered, and no probe: each device draws the whole
#   probe, from bits that do not depend on the sharding;
# - FSDP, explicit axis types: besides, the loss gathers its argument's tangent as it gathers its
#   argument, because the user told it to: a probe, once a leaf.
# In a loop over the probes biases are gathered in each turn, so that XLA does not hold the forward
# pass's values beside a turn's own (`hutchinson`). It takes the kernels' gathers out of the loop;
# with finite differences they cannot be, each probe having its own moved parameters, and the
# gathers' shapes are still the gradient's.


def gathers(compiled):
    """Counts a compiled step's all-gathers by the operand's name and the shape of the result.

    An operand that is not an argument of the step is called "computed".
    """
    text = compiled.as_text()
    names = dict(re.findall(r'(%\S+) = \S+ parameter\(\d+\).*op_name="([^"]*)"', text))
    counts = collections.Counter()
    for results, operands in re.findall(r" = (.*?) all-gather(?:-start)?\(([^)]*)\)", text):
        shapes = re.findall(r"\w+\[([\d,]*)\]", results)
        for shape, operand in zip(shapes, operands.split(", "), strict=True):
            name = names.get(operand.split()[-1], "computed").replace("\\", "")
            counts[name, tuple(map(int, shape.split(",")))] += 1
    return counts


def gathers_of_the_gradient(kind):
    _, params, batch, loss = layout_on_mesh(kind, "fsdp")
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    with jax.set_mesh(mesh):
        return gathers(jax.jit(jax.grad(loss)).lower(params, batch).compile())


@pytest.mark.parametrize(
    ("kind", "layout"), [("Auto", "dp"), ("Auto", "tp"), ("Explicit", "dp"), ("Explicit", "tp")]
)
def test_data_and_tensor_parallel_steps_gather_nothing(kind, layout):
    sampler = inspect.signature(jax.random.rademacher)
    if (kind, layout) == ("Explicit", "tp") and "out_sharding" not in sampler.parameters:
        pytest.skip("this JAX draws a probe whole where axes are explicit, and gathers one kernel")
    compiled, *_ = compiled_step("joint", kind, layout)
    assert not gathers(compiled)
    # Nor do they move a shard elsewhere.
    assert not re.search(r" (all-to-all|collective-permute)", compiled.as_text())
    # That something is moved at all: the mean over the batch.
    assert " all-reduce(" in compiled.as_text()


def test_fsdp_step_gathers_what_the_gradient_gathers():
    of_gradient = gathers_of_the_gradient("Auto")
    params, _ = start()
    shapes = {
        f"params{jax.tree_util.keystr(path)}": leaf.shape
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    # The gradient gathers each parameter once. This also tests the reading of the text.
    assert of_gradient == dict.fromkeys(shapes.items(), 1)
    of_step = gathers(compiled_step("joint", "Auto", "fsdp")[0])
    vectors = {("computed", shape) for shape in shapes.values() if len(shape) == 1}
    assert set(of_gradient) <= set(of_step) <= set(of_gradient) | vectors
    assert max(of_step.values()) <= 2


def test_fsdp_step_with_explicit_axes_gathers_the_tangents_besides():
    of_gradient = gathers_of_the_gradient("Explicit")
    assert of_gradient.total() == 4
    tangents = {("computed", shape) for _, shape in of_gradient}
    of_step = gathers(compiled_step("joint", "Explicit", "fsdp")[0])
    assert set(of_gradient) <= set(of_step) <= set(of_gradient) | tangents
    assert max(of_step.values()) <= 2
