"""One training run: steps to each loss, and the noise scale as it is tracked and as it is."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.noise_scale._workloads import Workload
from lama_optax import grouped_value_and_grad, noise_report, track_noise_scale

GROUPS = 4
#: Of the plain averages of s and m, as gpt-neox and mesh-transformer-jax have them.
RAW_DECAY = 0.99


class Carry(NamedTuple):
    """What a step hands to the next."""

    params: Any
    optimizer: Any
    signs: Any
    groups: Any
    raw: jax.Array  # shape=(2,); averages of s and m
    rate: jax.Array


def run(workload: Workload, batch: int, rate: float, seed: int, true: bool) -> dict[str, Any]:
    """Trains until the last target; a row for each that is reached, and one for the end.

    Args:
      workload: what is trained.
      batch: examples a step.
      rate: the learning rate over the workload's.
      seed: of initial parameters and of the batches.
      true: whether the exact noise scale is measured where a target is reached: the geometric
        mean over the last four looks.
    """
    start_at, chunk, loss_of = _compiled(workload, batch)
    params = workload.init(seed)
    carry = start_at(params, seed, jnp.asarray(workload.rate(batch, rate)))
    most, rng = workload.most_steps(batch), np.random.default_rng([seed, batch])
    every = max(1, most // 160)
    rows: list[dict[str, Any]] = []
    recent: list[Any] = []
    reached: dict[str, float] = {}
    before = float(loss_of(params))
    start = before
    for last in range(every, most + 1, every):
        carry = chunk(carry, workload.draw(rng, (every, batch)))
        loss = float(loss_of(carry.params))
        passed = [t for t in workload.targets if loss <= t and str(t) not in reached]
        for target in passed:  # between two looks, by the logarithm of the loss
            part = np.log(before / target) / np.log(before / loss)
            reached[str(target)] = last - every + float(part) * every
        recent = [*recent[-3:], carry.params]
        ended = not np.isfinite(loss) or len(reached) == len(workload.targets)
        if passed or ended or last + every > most:
            rows.append({"step": last, "loss": loss, "targets": passed} | _reports(carry, params))
        if true and passed:  # it moves by half from step to step, and the tracked one is an average
            looks = [exact(workload, params) for params in recent]
            rows[-1]["true"] = float(np.exp(np.mean(np.log(np.maximum(looks, 1e-9)))))
        if ended:
            break
        before = min(loss, before)
    return {"start": start, "reached": reached, "rows": rows}


@functools.cache
def _compiled(workload: Workload, batch: int) -> tuple[Callable[..., Carry], Any, Any]:
    """How a run begins, its steps and its loss: compiled once for all rates and seeds."""
    scale = optax.scale_by_adam(b2=0.99)
    groups = track_noise_scale(decay=0.98)

    def by_signs(seed: int) -> optax.GradientTransformationExtraArgs:
        return track_noise_scale(update_interval=10, key=seed)

    def start_at(params: Any, seed: int, rate: jax.Array) -> Carry:
        signs = by_signs(seed).init(params)
        return Carry(params, scale.init(params), signs, groups.init(params), jnp.zeros(2), rate)

    def step(carry: Carry, places: jax.Array) -> tuple[Carry, None]:
        examples = workload.batch(places)
        grouped = grouped_value_and_grad(workload.loss, GROUPS)
        _, gradient, each = grouped(carry.params, examples)
        task = workload.task(examples)
        # The state holds the seed's key.
        _, signs = by_signs(0).update(gradient, carry.signs, carry.params, **task)
        _, grouped_state = groups.update(
            gradient, carry.groups, carry.params, group_gradients=each, batch_size=batch
        )
        raw = RAW_DECAY * carry.raw + (1 - RAW_DECAY) * _moments(gradient, each, batch)
        direction, optimizer = scale.update(gradient, carry.optimizer)
        params = jax.tree.map(lambda p, u: p - carry.rate * u, carry.params, direction)
        return Carry(params, optimizer, signs, grouped_state, raw, carry.rate), None

    chunk = jax.jit(lambda carry, places: jax.lax.scan(step, carry, places)[0])
    return start_at, chunk, jax.jit(lambda params: workload.loss(params, workload.judged()))


def _moments(gradient: Any, each: Any, batch: int) -> jax.Array:
    """S and m of one step from its groups, all layers together."""
    whole = optax.tree.norm(gradient, squared=True)
    part = jnp.mean(jax.vmap(lambda g: optax.tree.norm(g, squared=True))(each))
    size = batch // GROUPS
    m = (batch * whole - size * part) / (batch - size)
    s = (part - whole) / (1 / size - 1 / batch)
    return jnp.stack([s, m])


def _reports(carry: Carry, params: Any) -> dict[str, Any]:
    s, m = np.asarray(carry.raw)
    return {
        "signs": noise_report(carry.signs, params)["total"],
        "groups": noise_report(carry.groups, params)["total"],
        "raw": float(s / m) if m > 0 else None,
    }


@functools.partial(jax.jit, static_argnums=0)
def _sums(workload: Workload, params: Any, places: jax.Array) -> tuple[Any, jax.Array]:
    """The sum of the examples' gradients, and of their square norms."""

    def part(total: tuple[Any, jax.Array], some: jax.Array) -> tuple[Any, None]:
        one = jax.vmap(
            jax.grad(lambda p, place: workload.loss(p, workload.batch(place[None]))), (None, 0)
        )
        each = one(params, some)
        squares = jnp.sum(jax.vmap(lambda g: optax.tree.norm(g, squared=True))(each))
        gradient = jax.tree.map(lambda t, g: t + jnp.sum(g, 0), total[0], each)
        return (gradient, total[1] + squares), None

    zero = jax.tree.map(jnp.zeros_like, params), jnp.zeros([])
    return jax.lax.scan(part, zero, places)[0]


def exact(workload: Workload, params: Any) -> float:
    """tr(Sigma) / |G|^2 from one gradient an example.

    The digits are all there is. Of the text's windows, which are a sample, |G|^2 is unbiased.
    """
    places = workload.exact()
    count = len(places) - len(places) % 32 if workload.text else len(places)
    width = 32 if workload.text else next(n for n in (32, 23, 3, 1) if count % n == 0)
    total, squares = _sums(workload, params, places[:count].reshape(-1, width))
    whole = float(optax.tree.norm(total, squared=True)) / count**2
    mean = float(squares) / count
    if not workload.text:
        return (mean - whole) / whole
    covariance = (mean - whole) * count / (count - 1)
    return covariance / (whole - covariance / count)
