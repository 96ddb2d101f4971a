"""Eight devices give what one device gives, whatever the layout, and the optimizer moves no more.

Plain `jax.jit` over sharded arrays needs nothing from the user. `sharded.py` says how exact it is.
"""

import collections
import functools
import inspect
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import (
    OPTIMIZERS,
    assert_equal_training,
    loss_fn,
    make_step,
    on_mesh,
    start,
    train,
    tree,
)

from lama_optax.curvature.probes import PROBES
from lama_optax.layers import resolve_layers

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
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


@functools.cache
def compiled_step(name, kind, layout):
    """The step compiled once for these shardings, and what it starts from."""
    mesh, params, batch, loss = layout_on_mesh(kind, layout)
    tx = OPTIMIZERS[name]()
    with jax.set_mesh(mesh):
        state = on_mesh(mesh, tx.init(params))
        compiled = jax.jit(make_step(tx, loss)).lower(params, state, batch).compile()
    return compiled, params, state, batch


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
    ("kind", "layout"),
    [("Auto", "dp"), ("Auto", "tp"), SLOW("Explicit", "dp"), ("Explicit", "tp")],
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
