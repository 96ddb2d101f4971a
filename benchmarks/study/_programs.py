"""Training programs: one compiled function each, whose hyper-parameters are traced.

Several arms share a program: Adam with b1 fixed or tuned; LAMA with the paper's settings, tuned,
with its sign flipped or its alphas shuffled; every static choice per layer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from benchmarks.study import _rules as rules
from benchmarks.study._groups import group_layers
from lama_optax import Estimator, LamaState, LayerCurvature, hutchinson, lam, lama_adam

PyTree = Any
Hypers = dict[str, Any]
Transformation: TypeAlias = optax.GradientTransformationExtraArgs

#: A gradient counts 1. A Hessian-vector product, forward over reverse, counts 2.
HVP_COST = 2.0


@dataclasses.dataclass(frozen=True)
class Program:
    """``make`` (hypers, raw probe key) -> the optimizer; ``observe`` its state, by layer."""

    make: Callable[[Hypers, jax.Array], Transformation]
    hypers: Hypers  # every hyper-parameter with its default
    observe: Callable[[PyTree], dict[str, jax.Array]] = lambda state: {}
    gradient_equivalents: float = 1.0


@dataclasses.dataclass(frozen=True)
class Rearranged:
    """An estimator whose layers' curvatures are scaled, then shifted to the next layers.

    ``shift`` = 1 gives every layer its neighbour's curvature and thereby its alpha.
    """

    estimator: Estimator
    shift: Any
    scale: Any = 1.0  # a number or shape=(L,)

    def estimate(self, key: Any, params: PyTree, layers: Any, /, **extra: Any) -> LayerCurvature:
        """Another estimator's estimate, rearranged."""
        found = self.estimator.estimate(key, params, layers, **extra)
        mean = jnp.roll(found.mean * self.scale, self.shift)
        return found._replace(mean=mean)


def _is_lama(x: Any) -> bool:
    return isinstance(x, LamaState)


def lama_observe(state: PyTree) -> dict[str, jax.Array]:
    """What LAMA did to each layer in one step; its state is found anywhere inside."""
    (lama,) = filter(_is_lama, jax.tree.leaves(state, is_leaf=_is_lama))
    # Eq. 3 divides by Adam's sum of weights, whatever alpha is.
    gain = lama.weight_sum / (1 - 0.9 ** lama.count.astype(float))
    return {"curvature": lama.curvature, "alpha": lama.alpha, "gain": gain}


def lama_program(
    estimator: Estimator | None = None, *, probes: int = 1, **settings: Any
) -> Program:
    """LAMA with static ``settings`` of `lama_adam`; one probe unless said otherwise."""
    base: Estimator = hutchinson(1) if estimator is None else estimator

    def make(h: Hypers, key: jax.Array) -> Transformation:
        return lama_adam(
            h["lr"],
            sensitivity=h["sensitivity"],
            alpha_min=h["alpha_min"],
            alpha_max=h["alpha_max"],
            curvature_decay=h["curvature_decay"],
            update_interval=h["update_interval"],
            estimator=Rearranged(base, h["shift"], h["scale"]),
            key=key,
            **settings,
        )

    def observe(state: PyTree) -> dict[str, jax.Array]:
        seen = lama_observe(state)
        if settings.get("momentum") == "ema":
            seen["gain"] = jnp.ones_like(seen["gain"])
        return seen

    defaults = {
        "lr": 1e-3,
        "sensitivity": 0.01,
        "alpha_min": 0.5,
        "alpha_max": 1.5,
        "curvature_decay": 0.9,
        "update_interval": 1,
        "shift": 0,
        "scale": 1.0,
    }
    return Program(make, defaults, observe, 1 + HVP_COST * probes)


def layered(
    lr: jax.Array, decay: jax.Array, weight: jax.Array, correction: jax.Array
) -> Transformation:
    """Adam with a fixed rate, decay, gradient's weight and bias correction for each layer.

    m = decay_l m + weight_l g, m_hat = m / (1 - correction_l^t): with weight = 1 - decay and
    correction = decay, Adam with a momentum for each layer; with weight = 0.1 and
    correction = 0.9, Eq. 6 and Eq. 3 with alpha_l frozen at decay_l / 0.9.
    """

    def init(params: PyTree) -> PyTree:
        none = jax.tree.map(jnp.zeros_like, params)
        return jnp.int32(0), none, none

    def update(grads: PyTree, state: PyTree, params: PyTree, **extra: Any) -> tuple[PyTree, PyTree]:
        del extra
        groups = group_layers(params)
        count, mu, nu = state
        count = count + 1
        time = count.astype(float)

        def of(values: jax.Array) -> PyTree:
            return groups.spread(jnp.broadcast_to(values, (groups.count,)), grads)

        mu = jax.tree.map(lambda m, g, d, w: d * m + w * g, mu, grads, of(decay), of(weight))
        nu = jax.tree.map(lambda v, g: 0.999 * v + (1 - 0.999) * g**2, nu, grads)

        def step(m: jax.Array, v: jax.Array, rate: jax.Array, corrected: jax.Array) -> jax.Array:
            return -rate * (m / corrected) / (jnp.sqrt(v / (1 - 0.999**time)) + 1e-8)

        updates = jax.tree.map(step, mu, nu, of(lr), of(1 - correction**time))
        return updates, (count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _plain(make: Callable[..., optax.GradientTransformation]) -> Callable[..., Transformation]:
    """An optimizer of the hypers alone, without randomness."""
    return lambda h, key: optax.with_extra_args_support(make(**h))


def _ruled(make: Callable[..., Transformation], hvps: int = 1, **hypers: float) -> Program:
    def observe(state: rules.RuleState) -> dict[str, jax.Array]:
        return {"q": state.q, "momentum": state.momentum}

    return Program(
        lambda h, key: make(*(h[name] for name in hypers), key=key),
        hypers,
        observe,
        1 + HVP_COST * hvps,
    )


def _sophia(h: Hypers, key: jax.Array) -> Transformation:
    probe = optax.contrib.hutchinson_estimator_diag_hessian(key)
    return optax.contrib.sophia(
        h["lr"], gamma=h["gamma"], weight_decay=0.0, hessian_diagonal_fn=probe
    )


PROGRAMS: dict[str, Program] = {
    "sgd": Program(
        _plain(lambda lr, momentum: optax.sgd(lr, momentum)), {"lr": 0.1, "momentum": 0.9}
    ),
    "adam": Program(_plain(lambda lr, b1: optax.adam(lr, b1)), {"lr": 1e-3, "b1": 0.9}),
    "amsgrad": Program(_plain(lambda lr: optax.amsgrad(lr)), {"lr": 1e-3}),
    "radam": Program(_plain(lambda lr: optax.radam(lr)), {"lr": 1e-3}),
    "nadam": Program(_plain(lambda lr: optax.nadam(lr)), {"lr": 1e-3}),
    "rmsprop": Program(
        _plain(lambda lr, decay: optax.rmsprop(lr, decay, eps_in_sqrt=False)),
        {"lr": 1e-3, "decay": 0.9},
    ),
    # One product every ten steps.
    "sophia": Program(_sophia, {"lr": 1e-3, "gamma": 0.01}, gradient_equivalents=1 + HVP_COST / 10),
    "lam_weight": Program(_plain(lambda lr: lam(lr)), {"lr": 1e-3}),
    "lam_layer": Program(_plain(lambda lr: lam(lr, granularity="layer")), {"lr": 1e-3}),
    "lama": lama_program(),
    "lama_ema": lama_program(momentum="ema"),
    "layered": Program(
        lambda h, key: layered(**h), {"lr": 1e-3, "decay": 0.9, "weight": 0.1, "correction": 0.9}
    ),
    "v1": _ruled(rules.relative_log_curvature, lr=1e-3, b1=0.9, sensitivity=1.0, shift=0),
    "v2": _ruled(rules.one_mode_optimum, lr=1e-3),
    "v3": _ruled(rules.yellowfin_by_layer, lr=1.0, pool=0.0),
    "v4": _ruled(rules.quasi_hyperbolic, lr=1e-3, b1=0.9, nu=-1.0),
    "v5": _ruled(rules.capped_rate, 2, lr=1e-3, b1=0.9, c=1.0),
    "v6": _ruled(rules.relative_curvature_rate, lr=1e-3, b1=0.9, power=0.0, shift=0),
}
