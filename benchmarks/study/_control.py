"""Reinforcement learning: REINFORCE with a baseline on gymnax's CartPole.

The loss that is judged is 1 - mean return / horizon, from 0 (the pole never falls) to 1, over
episodes whose starts are held out; the metric is the mean return.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.study._workload import Workload, apply_mlp, lecun_mlp

PyTree = Any

HORIZON = 200
EPISODES = 4  # of one step
HELD_OUT_EPISODES = 32
STEPS = 20  # with more, every tuned optimizer keeps the pole up: nothing to compare
DISCOUNT = 0.99


@functools.cache
def _environment() -> Any:
    import gymnax  # only here: the other workloads do without

    return gymnax.make("CartPole-v1")


def _episodes(params: PyTree, key: jax.Array, count: int) -> dict[str, jax.Array]:
    """Plays ``count`` episodes with the policy as it is; every array is (HORIZON, count)."""
    environment, settings = _environment()
    start_key, play_key = jax.random.split(key)
    observation, state = jax.vmap(environment.reset_env, in_axes=(0, None))(
        jax.random.split(start_key, count), settings
    )

    def step(carry: Any, step_key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        observation, state, alive = carry
        action_key, unused = jax.random.split(step_key)
        action = jax.random.categorical(action_key, apply_mlp(params, observation))
        keys = jnp.broadcast_to(unused, (count,))  # CartPole's dynamics draw nothing
        following, state, reward, terminated, *_ = jax.vmap(
            environment.step_env, in_axes=(0, 0, 0, None)
        )(keys, state, action, settings)
        seen = {"observation": observation, "action": action, "reward": reward * alive}
        return (following, state, alive * (1 - terminated)), seen | {"alive": alive}

    carry = observation, state, jnp.ones(count)
    return jax.lax.scan(step, carry, jax.random.split(play_key, HORIZON))[1]


def _prepare(params: PyTree, data: dict[str, PyTree], key_data: jax.Array) -> PyTree:
    """Episodes with standardised advantages: return to go minus its mean at that time."""
    del data
    seen = _episodes(params, jax.random.wrap_key_data(key_data), EPISODES)
    alive = seen["alive"]

    def to_go(later: jax.Array, reward: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = reward + DISCOUNT * later
        return total, total

    returns = jax.lax.scan(to_go, jnp.zeros(EPISODES), seen["reward"], reverse=True)[1]
    mean = jnp.sum(returns * alive, 1, keepdims=True) / jnp.maximum(alive.sum(1, keepdims=True), 1)
    advantage = (returns - mean) * alive
    scale = jnp.sqrt(jnp.sum(advantage**2) / jnp.sum(alive))
    batch = seen | {"advantage": advantage / (scale + 1e-6)}
    return jax.tree.map(jax.lax.stop_gradient, batch)


def _loss(params: PyTree, batch: PyTree) -> jax.Array:
    log_policy = jax.nn.log_softmax(apply_mlp(params, batch["observation"]))
    chosen = jnp.take_along_axis(log_policy, batch["action"][..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * batch["advantage"] * batch["alive"]) / jnp.sum(batch["alive"])


def _evaluate(params: PyTree, part: PyTree) -> tuple[jax.Array, jax.Array]:
    key = jax.random.wrap_key_data(part["key"])
    mean_return = jnp.sum(_episodes(params, key, HELD_OUT_EPISODES)["reward"]) / HELD_OUT_EPISODES
    return 1 - mean_return / HORIZON, mean_return


def _make(seed: int) -> tuple[dict[str, PyTree], np.ndarray]:
    rng = np.random.default_rng(seed)

    def keys(*shape: int) -> np.ndarray:
        return rng.integers(2**32, size=(*shape, 2), dtype=np.uint32)

    data = {part: {"key": keys()} for part in ("train", "validation", "test")}
    return data, keys(STEPS)


def control_workload() -> Workload:
    """The policy gradient."""
    return Workload(
        name="cartpole",
        metric_name="mean return",
        steps=STEPS,
        batch_size=EPISODES,
        trials=24,
        tune_seeds=10,
        final_seeds=200,
        chunk=120,
        step_microseconds=1000,
        make=_make,
        init=lambda key: lecun_mlp(key, (4, 16, 2)),
        loss=_loss,
        evaluate=_evaluate,
        prepare=_prepare,
        independent_examples=False,
        needs=("gymnax", "six"),
    )
