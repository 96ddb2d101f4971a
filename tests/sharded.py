"""What the tests on eight devices share: a network, optimizers, and training on one device.

Tolerances: the devices add the batch's 64 terms in another order, which changes a gradient by some
1e-7 of itself, and a step of Adam's kind, of length 1e-2, passes that on. Measured over 20 steps:
parameters, which move by 0.2, within 4e-7; curvatures (0.04 and 0.12) within 5e-8. A curvature
wrong by one per cent moves the parameters by 1e-3, a thousand times the limit of 1e-6.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from lama_optax import exact_trace, hutchinson, lam, lama_adam

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


def on_mesh(mesh, state):
    """Scalars to every device, where the first step leaves them; the rest stays where it is."""
    everywhere = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda leaf: leaf if leaf.sharding.num_devices > 1 else jax.device_put(leaf, everywhere),
        state,
    )


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
