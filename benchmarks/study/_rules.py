r"""Candidate rules V1 to V6: optimizers whose momentum or rate follows the curvature of each layer.

All are in unit-gain form and preconditioned as Adam is,

    m = b_l m + (1 - b_l) g,   v as Adam's,   P = 1 / (sqrt(v_hat) + eps),
    step = -lr_l P ((1 - nu_l) g + nu_l m / (sum of m's weights)),

and measure the preconditioned curvature with one probe z of signs over all layers,

    q_l = lr mean_l(z * P^(1/2) H P^(1/2) z),   averaged over steps,

which has no unit, ignores the loss's scale as Adam does, and bounds stability:
q < 2 (1 + b) / (1 - b) for the largest eigenvalue in place of the mean (Cohen et al., 2022).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.study import _yellowfin as yellowfin
from benchmarks.study._groups import Groups, group_layers

PyTree = Any
Number = float | jax.Array

Q_DECAY = 0.9  # of the moving average of q
Q_FLOOR = 1e-6  # below it, or negative, q counts as this: its logarithm is taken
MAX_MOMENTUM = 0.999
RATE_RANGE = 10.0  # V6: a layer's rate over the common one, at most; its inverse, at least


class Decision(NamedTuple):
    """What a rule sets for every layer, shape (L,) each."""

    momentum: jax.Array
    rate: jax.Array  # the layer's learning rate
    nu: jax.Array  # weight of the momentum beside the plain gradient; 1: momentum alone


class RuleState(NamedTuple):
    """State of every rule."""

    # shape=(), int32. The name is optax's; it hides tuple.count.
    count: jax.Array  # type: ignore[assignment]
    mu: PyTree
    nu: PyTree
    weight_sum: jax.Array  # shape=(L,); of the gradients' weights in mu
    q: jax.Array  # shape=(L,); moving average, not yet divided by its weights
    momentum: jax.Array  # shape=(L,); b_l of the last step
    key: jax.Array  # raw key data
    memory: PyTree  # of the rule itself


class Measured(NamedTuple):
    """What a rule decides from."""

    q: jax.Array  # shape=(L,); unbiased moving average
    groups: Groups
    gradient: PyTree  # P^(1/2) g, the gradient in the preconditioned metric
    preconditioned: Callable[[PyTree], PyTree]  # z -> P^(1/2) H P^(1/2) z
    key: jax.Array
    # As in `RuleState`: the name hides tuple.count.
    count: jax.Array  # type: ignore[assignment]


Rule = Callable[[Measured, PyTree], tuple[Decision, PyTree]]


def ruled_adam(
    rule: Rule,
    learning_rate: Number,
    *,
    b2: float = 0.999,
    eps: float = 1e-8,
    key: jax.Array,
    memory: Callable[[PyTree, Groups], PyTree] = lambda params, groups: (),
) -> optax.GradientTransformationExtraArgs:
    """Adam in unit-gain form whose momentum, rate and nu come from ``rule`` at every step.

    Args:
      rule: (what was measured, the rule's memory) -> (decision, memory).
      learning_rate: the lr of q.
      b2: decay of the squared gradients.
      eps: added to their root.
      key: raw data of a PRNG key, for the probes.
      memory: (params, layers) -> the rule's first memory.

    Returns:
      A transformation whose ``update`` needs ``params`` and ``value_fn``.
    """

    def init(params: PyTree) -> RuleState:
        groups = group_layers(params)
        zeros = jnp.zeros(groups.count)
        none = jax.tree.map(jnp.zeros_like, params)
        start = memory(params, groups)
        return RuleState(jnp.int32(0), none, none, zeros, zeros, zeros, jnp.asarray(key), start)

    def update(
        grads: PyTree,
        state: RuleState,
        params: PyTree,
        *,
        value_fn: Callable[[PyTree], jax.Array],
        **extra: Any,
    ) -> tuple[PyTree, RuleState]:
        del extra
        groups, count = group_layers(params), state.count + 1
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.nu, grads)
        correction = 1 - b2 ** count.astype(float)
        # P^(1/2)
        root = jax.tree.map(lambda v: 1 / jnp.sqrt(jnp.sqrt(v / correction) + eps), nu)

        def preconditioned(z: PyTree) -> PyTree:
            w = jax.tree.map(jnp.multiply, root, z)
            product = jax.jvp(jax.grad(value_fn), (params,), (w,))[1]
            return jax.tree.map(jnp.multiply, root, product)

        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)
        probe_key, rule_key = jax.random.split(step_key)
        z = optax.tree.random_like(probe_key, params, jax.random.rademacher)
        latest = learning_rate * groups.mean(jax.tree.map(jnp.multiply, z, preconditioned(z)))
        # An estimate that is not finite is left out, as in `lama_scale`.
        latest = jnp.where(jnp.isfinite(latest), latest, state.q)
        q = Q_DECAY * state.q + (1 - Q_DECAY) * latest
        q_hat = q / (1 - Q_DECAY ** count.astype(float))

        gradient = jax.tree.map(jnp.multiply, root, grads)
        measured = Measured(q_hat, groups, gradient, preconditioned, rule_key, count)
        decision, new_memory = rule(measured, state.memory)
        b = decision.momentum
        weight_sum = b * state.weight_sum + (1 - b)
        mu = jax.tree.map(
            lambda m, g, b: b * m + (1 - b) * g, state.mu, grads, groups.spread(b, grads)
        )

        def step(p: jax.Array, m: jax.Array, g: jax.Array, w: Any, n: Any, lr: Any) -> jax.Array:
            return -lr * p**2 * ((1 - n) * g + n * m / w)

        layers = (groups.spread(x, grads) for x in (weight_sum, decision.nu, decision.rate))
        updates = jax.tree.map(step, root, mu, grads, *layers)
        return updates, RuleState(count, mu, nu, weight_sum, q, b, state.key, new_memory)

    return optax.GradientTransformationExtraArgs(init, update)


def _everywhere(value: Number, groups: Groups) -> jax.Array:
    return jnp.full(groups.count, value)


def relative_log_curvature(
    learning_rate: Number, b1: Number, sensitivity: Number, shift: Number, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """V1: b_l = b1 alpha(ln q_l - median_k ln q_k), alpha of Eq. 9 between 0.5 and 1.5.

    With ``shift`` = 1 every layer gets its neighbour's alpha, the control.
    """

    def rule(seen: Measured, memory: PyTree) -> tuple[Decision, PyTree]:
        log_q = jnp.log(jnp.maximum(seen.q, Q_FLOOR))
        alpha = 0.5 + jax.nn.sigmoid(sensitivity * (log_q - jnp.median(log_q)))
        alpha = jnp.roll(alpha, shift)
        b = jnp.minimum(b1 * alpha, MAX_MOMENTUM)
        ones = _everywhere(1.0, seen.groups)
        return Decision(b, learning_rate * ones, ones), memory

    return ruled_adam(rule, learning_rate, key=key)


def one_mode_optimum(
    learning_rate: Number, key: jax.Array, *, b2: float = 0.999
) -> optax.GradientTransformationExtraArgs:
    """V2: b_l = clip((2 sigmoid(ln q_l) - 1)^2, 0, sqrt(b2)), the optimum for a single mode."""

    def rule(seen: Measured, memory: PyTree) -> tuple[Decision, PyTree]:
        log_q = jnp.log(jnp.maximum(seen.q, Q_FLOOR))
        b = jnp.clip((2 * jax.nn.sigmoid(log_q) - 1) ** 2, 0, b2**0.5)
        ones = _everywhere(1.0, seen.groups)
        return Decision(b, learning_rate * ones, ones), memory

    return ruled_adam(rule, learning_rate, b2=b2, key=key)


def yellowfin_by_layer(
    learning_rate: Number, pool: Number, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """V3: YellowFin's rule in the preconditioned metric, for each layer; ``pool`` = 1: for all.

    The rule sets momentum and rate; ``learning_rate`` multiplies the rate.
    """

    def rule(seen: Measured, memory: yellowfin.Memory) -> tuple[Decision, PyTree]:
        memory = yellowfin.measure(memory, seen.gradient, seen.q, seen.groups, seen.count, pool)
        b, rate = yellowfin.single_step(memory, seen.count)
        # YellowFin steps by rate g + b (last step): in unit-gain form by rate / (1 - b).
        return Decision(b, learning_rate * rate / (1 - b), jnp.ones_like(b)), memory

    # q without a rate in it: the curvature itself.
    return ruled_adam(rule, 1.0, key=key, memory=yellowfin.start)


def quasi_hyperbolic(
    learning_rate: Number, b1: Number, fixed_nu: Number, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """V4: u = (1 - nu_l) g + nu_l m with nu_l = 1 / (1 + q_l); ``fixed_nu`` >= 0 replaces it."""

    def rule(seen: Measured, memory: PyTree) -> tuple[Decision, PyTree]:
        followed = 1 / (1 + jnp.maximum(seen.q, 0))
        nu = jnp.where(jnp.asarray(fixed_nu) >= 0, fixed_nu, followed)
        ones = _everywhere(1.0, seen.groups)
        return Decision(b1 * ones, learning_rate * ones, nu), memory

    return ruled_adam(rule, learning_rate, key=key)


def capped_rate(
    learning_rate: Number, b1: Number, c: Number, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """V5: lr_l = min(lr, c 2 (1 + b) / ((1 - b) q_max,l / lr)), b global.

    q_max,l / lr is the largest eigenvalue of layer l's block of P^(1/2) H P^(1/2), found by one
    power iteration a step: the layers' directions get random signs, so that what other layers
    add has mean 0, and products and Rayleigh quotients are averaged over steps.
    """

    def start(params: PyTree, groups: Groups) -> PyTree:
        # Not a constant vector, which symmetry may make orthogonal to what is sought.
        probe = jax.random.wrap_key_data(jnp.asarray(key))
        return optax.tree.random_like(probe, params, jax.random.normal), jnp.zeros(groups.count)

    def rule(seen: Measured, memory: PyTree) -> tuple[Decision, PyTree]:
        direction, quotient = memory
        groups = seen.groups
        signs = jax.random.rademacher(seen.key, (groups.count,), jnp.float32)
        norm = jnp.sqrt(groups.sum(jax.tree.map(jnp.square, direction)))
        unit = jax.tree.map(
            jnp.multiply, direction, groups.spread(1 / jnp.maximum(norm, 1e-30), direction)
        )
        signed = groups.spread(signs, unit)
        product = seen.preconditioned(jax.tree.map(jnp.multiply, unit, signed))
        product = jax.tree.map(jnp.multiply, product, signed)
        latest = groups.sum(jax.tree.map(jnp.multiply, unit, product))
        latest = jnp.where(jnp.isfinite(latest), latest, quotient)
        quotient = Q_DECAY * quotient + (1 - Q_DECAY) * latest
        largest = quotient / (1 - Q_DECAY ** seen.count.astype(float))
        # Averaging products, not unit vectors: c (A u) of later steps outgrow the random start.
        direction = jax.tree.map(lambda d, p: Q_DECAY * d + (1 - Q_DECAY) * p, direction, product)
        bound = c * 2 * (1 + b1) / ((1 - b1) * jnp.maximum(largest, 1e-12))
        ones = _everywhere(1.0, groups)
        return Decision(b1 * ones, jnp.minimum(learning_rate, bound), ones), (direction, quotient)

    return ruled_adam(rule, learning_rate, key=key, memory=start)


def relative_curvature_rate(
    learning_rate: Number, b1: Number, power: Number, shift: Number, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """V6: lr_l = lr clip((median_k q_k / q_l)^power, 1/10, 10), b global.

    With ``power`` = 1 the layers' lr_l q_l are alike, with 0 it is Adam. With ``shift`` = 1 every
    layer gets its neighbour's rate, the control.
    """

    def rule(seen: Measured, memory: PyTree) -> tuple[Decision, PyTree]:
        log_q = jnp.log(jnp.maximum(seen.q, Q_FLOOR))
        factor = jnp.exp(power * (jnp.median(log_q) - log_q))
        factor = jnp.roll(jnp.clip(factor, 1 / RATE_RANGE, RATE_RANGE), shift)
        ones = _everywhere(1.0, seen.groups)
        return Decision(b1 * ones, learning_rate * factor, ones), memory

    return ruled_adam(rule, learning_rate, key=key)
