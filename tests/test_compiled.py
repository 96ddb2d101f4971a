"""What the compiled step does not do: copy moments, evaluate twice, grow with the probes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lama_optax import flipout, hutchinson, lama_adam, layer_curvature

# optax.adam promotes implicitly.
pytestmark = pytest.mark.standard_promotion

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
# No other array of the step has one of these shapes.
SHAPES = {"first": (24, 40), "second": (40, 56), "third": (56, 8)}
BATCH = jnp.ones((16, 24))
PARAMS = {name: {"kernel": jnp.full(shape, 0.1)} for name, shape in SHAPES.items()}


def example_loss(params, x):
    for name in SHAPES:
        x = jnp.tanh(x @ params[name]["kernel"])
    return jnp.mean(x**2)


def value_fn(params):
    return jnp.mean(jax.vmap(lambda x: example_loss(params, x))(BATCH))


def compiled_step(tx):
    tx = optax.with_extra_args_support(tx)

    def step(params, state):
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(
            *(grads, state, params),
            value_fn=value_fn,
            example_value_fn=example_loss,
            batch=BATCH,
        )
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(PARAMS, tx.init(PARAMS)).compile()


def count(compiled, operation):
    return compiled.as_text().count(f" {operation}(")


def copies(compiled):
    """Shapes and operands of the copies outside all branches that are as large as a kernel."""
    entry = compiled.as_text().split("\nENTRY ")[1]
    kernels = "|".join(f"{m},{n}" for m, n in SHAPES.values())
    found = re.findall(rf"f32\[({kernels})\]\S* copy\(%([^)]*)\)", entry)
    return {(shape, operand.partition("__")[0]) for shape, operand in found}


@pytest.mark.parametrize(
    "estimator", [hutchinson(2), SLOW(flipout())], ids=["hutchinson", "flipout"]
)
def test_a_skipped_step_copies_no_moments(estimator):
    """What leaves the `cond` is of length L, and nothing is copied for it."""
    compiled = compiled_step(lama_adam(1e-3, estimator=estimator, update_interval=10))
    results = re.findall(r" = (\([^=]*?\)) conditional\(", compiled.as_text())
    assert len(results) == 1
    sizes = [
        int(np.prod([int(n) for n in shape.split(",")])) if shape else 1
        for shape in re.findall(r"\w+\[([\d,]*)\]", results[0])
    ]
    assert sizes
    assert max(sizes) <= len(SHAPES)
    # XLA copies two donated kernels before it overwrites them; it does so for Adam too.
    assert copies(compiled) <= copies(compiled_step(optax.adam(1e-3)))
    assert {operand for _, operand in copies(compiled)} <= {"params"}


@pytest.mark.parametrize("key", [0, jax.random.key(1)], ids=["seed", "key"])
def test_a_fresh_state_can_be_donated(key):
    tx = lama_adam(1e-3, estimator=hutchinson(1), key=key)

    def step(params, state):
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    # Twice: the first must not have taken the optimizer's own key.
    for _ in range(2):
        _, state = donating(jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS))
    assert state[0].count == 1


def test_the_estimate_shares_the_gradients_evaluation():
    """One program holds fewer products than the gradient's and the estimate's together."""
    estimate = jax.jit(
        lambda p: layer_curvature(p, 0, estimator=hutchinson(1), value_fn=value_fn).mean
    )
    alone = count(jax.jit(jax.grad(value_fn)).lower(PARAMS).compile(), "dot")
    estimates = count(estimate.lower(PARAMS).compile(), "dot")
    step = compiled_step(lama_adam(1e-3, estimator=hutchinson(1), update_interval=1))
    # The forward pass of three layers, and the gradient's way back through two of them.
    assert alone + estimates - count(step, "dot") == 5


# In a loop "block" keeps all of the forward pass, which one probe's program need not.
@pytest.mark.parametrize(("scope", "few", "ratio"), [("joint", 1, 1.3), SLOW("block", 2, 1.1)])
def test_many_probes_need_the_memory_of_one(scope, few, ratio):
    def temporaries(num_probes):
        estimator = hutchinson(num_probes, scope=scope)
        fn = jax.jit(lambda p: layer_curvature(p, 0, estimator=estimator, value_fn=value_fn))
        return fn.lower(PARAMS).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(64) <= ratio * temporaries(few)


DEEP = {f"layer_{i}": {"kernel": jnp.full((32, 32), 0.1), "bias": jnp.zeros(32)} for i in range(8)}
SEQUENCES = jnp.ones((32, 16, 32))


def deep_example_loss(params, x):
    for layer in params.values():
        x = jax.nn.gelu(x @ layer["kernel"] + layer["bias"])
    return jnp.mean(x**2)


def deep_loss(params):
    return jnp.mean(jax.vmap(lambda x: deep_example_loss(params, x))(SEQUENCES))


def deep_temporaries(fn):
    return jax.jit(fn).lower(DEEP).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_many_probes_hold_no_forward_pass_beside_their_own():
    """XLA would evaluate before the loop what its turns share, and hold it beside them."""

    def temporaries(num_probes):
        estimator = hutchinson(num_probes)
        return deep_temporaries(
            lambda p: layer_curvature(p, 0, estimator=estimator, value_fn=deep_loss)
        )

    assert temporaries(64) <= 1.3 * temporaries(1)


def test_flipouts_block_estimate_holds_one_layers_tangents_at_a_time():
    """Twice the gradient's memory; were they not in turn, it would grow with the depth."""
    estimate = deep_temporaries(
        lambda p: layer_curvature(
            *(p, 0),
            estimator=flipout(scope="block"),
            example_value_fn=deep_example_loss,
            batch=SEQUENCES,
        )
    )
    assert estimate <= 2.5 * deep_temporaries(jax.grad(deep_loss))


def test_flipouts_block_estimate_needs_no_more_products_than_the_floor():
    """Each layer's second derivative shares the forward pass and starts behind its layer.

    Three products forward and two back, then the tangents through layers 2 and 3, two and one.
    The probes need none, and what tanh bends ends before the next product.
    """
    fn = jax.jit(
        lambda p: (
            layer_curvature(
                p,
                0,
                estimator=flipout(scope="block"),
                example_value_fn=example_loss,
                batch=BATCH,
            ).mean
        )
    )
    assert count(fn.lower(PARAMS).compile(), "dot") == 8


def flipouts_joint(num_probes):
    estimator = flipout(num_probes, scope="joint")
    fn = jax.jit(
        lambda p: layer_curvature(
            p, 0, estimator=estimator, example_value_fn=example_loss, batch=BATCH, updates=p
        )
    )
    return fn.lower(PARAMS).compile()


def test_flipouts_joint_estimate_needs_no_more_products_than_the_floor():
    """The gradient's by the outputs, 3 forward and 2 back, and the same for what the probes move.

    Nothing moves the input of layer 1: 2 forward and 2 back. The probes need none.
    """
    assert count(flipouts_joint(1), "dot") == 9
