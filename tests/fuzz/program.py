"""A random program: one to four parts in a random order, with random changes and wrappers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import others, products
from .changes import ACTIVATIONS, CHANGES, WRAPPERS
from .rules import Draw

PARTS = products.PARTS | others.PARTS
_MAX_PARAMETERS = 60
# What rounds inside of a program, where the exact matrix and an estimate round differently.
_ROUNDED = {"half": 0.03, "half_precision": 0.1, "reduce_precision": 0.01, "single": 1e-5}
# What takes a part's own outputs for inputs.
_REPEATED = ("residual", "twice", "switch", "fori_loop", "scan_remat")
# Parts that JAX itself does not take inside of a wrapper: no bfloat16, no complex numbers.
_REFUSED = {
    "half_precision": ("spectrum", "linear_algebra", "normed_weight"),
    "checkpoint": ("spectrum",),
    "scan_remat": ("spectrum",),
}


@dataclasses.dataclass
class Program:
    """A model of a few parameters, with all that an estimator asks for."""

    seed: int
    description: list[str]  # of each part: its name and form, wrapper, changes and activation
    params: dict[str, dict[str, jax.Array]]
    batch: dict[str, jax.Array]
    example_output_fn: Callable[[Any, Any], jax.Array]
    output_loss_fn: Callable[[jax.Array, Any], jax.Array]
    layers: str
    updates: Any  # what joint scope scales its probes by, or None
    rounding: float  # relative, of what is computed inside

    def example_value_fn(self, params, example):
        return self.output_loss_fn(self.example_output_fn(params, example), example)


def program(seed):
    """The program of a seed; its first part is ``seed`` modulo the number of parts."""
    r = Draw(seed)
    t, d = r.pick(1, 2, 3), r.pick(2, 3)
    batch_size = r.pick(3, 4)
    batch = {
        "x": r(batch_size, t, d),
        "y": r(batch_size, 6),
        "ids": jnp.asarray([[r.pick(0, 1, 2, 3) for _ in range(4)] for _ in range(batch_size)]),
        "s": jnp.exp(r(batch_size)),
    }
    example = jax.tree.map(lambda x: x[0], batch)
    wanted = [
        list(PARTS)[seed % len(PARTS)],
        *(r.pick(*PARTS) for _ in range(r.pick(0, 1, 1, 2, 3))),
    ]
    first = wanted[0]
    if r.pick(True, False):
        wanted.reverse()
    params, stages, description = {}, [], []
    h = jax.ShapeDtypeStruct((t, d), jnp.float64)
    for name in wanted:
        weights, stage, words = _stage(r, name, h, example)
        so_far = sum(w.size for w in jax.tree.leaves((params, weights)))
        out = jax.eval_shape(stage, weights, h, example)
        if name != first and (so_far > _MAX_PARAMETERS or out.size > 18):
            continue
        params[f"{len(params)}_{name}"] = weights
        stages.append((stage, list(params)[-1]))
        description.append(words)
        if out.shape == (t, d) and r.pick(True, False, False):  # the first part once more: tied
            stages.append(stages[0])
            description.append("the first again")
            out = jax.eval_shape(stages[0][0], params[stages[0][1]], out, example)
        h = out
    num_outputs = min(h.size, 6)
    loss_name = r.pick(*(name for name in _LOSSES if num_outputs > 1 or name != "softmax"))

    def example_output_fn(params, example):
        h = example["x"]
        for stage, name in stages:
            h = stage(params[name], h, example)
        return h.reshape(-1)[:num_outputs]

    words = " ".join(description)
    return Program(
        seed,
        [*description, f"loss {loss_name}"],
        params,
        batch,
        example_output_fn,
        _LOSSES[loss_name],
        layers=r.pick("module", "leaf"),
        updates=r.pick(None, jax.tree.map(lambda w: r(*w.shape), params)),
        rounding=max(
            [rounding for name, rounding in _ROUNDED.items() if f"[{name}]" in words] + [0.0]
        ),
    )


def _stage(r, name, h, example):
    """One part with a wrapper, its weights' changes and an activation."""
    form, weights, apply = PARTS[name](r, *h.shape)
    wrapper = r.pick(*WRAPPERS) if r.pick(True, False) else None
    if name in _REFUSED.get(wrapper, ()):
        wrapper = None
    wrapped = WRAPPERS[wrapper](apply, r) if wrapper else apply
    if wrapper in _REPEATED and jax.eval_shape(apply, weights, h, example).shape != h.shape:
        wrapper, wrapped = None, apply
    changes = {
        leaf: r.pick(*CHANGES) if w.ndim and r.pick(True, False, False) else None
        for leaf, w in weights.items()
    }
    activation = r.pick(*ACTIVATIONS)

    def stage(weights, h, example):
        changed = {
            leaf: CHANGES[changes[leaf]](w, example) if changes[leaf] else w
            for leaf, w in weights.items()
        }
        return ACTIVATIONS[activation](wrapped(changed, h, example))

    changed = "".join(f" {leaf}[{change}]" for leaf, change in changes.items() if change)
    words = f"{name}:{form}" + (f" in [{wrapper}]" if wrapper else "") + changed
    return weights, stage, f"{words} then {activation}"


_LOSSES = {
    "squared": lambda z, e: jnp.sum((z - e["y"][: z.size]) ** 2),
    "softmax": lambda z, e: jax.nn.logsumexp(z) - z[e["ids"][0] % z.size],
    "logistic": lambda z, e: jnp.mean(
        jax.nn.softplus(z) - z * (e["y"][: z.size] > 0).astype(z.dtype)
    ),
    "huber": lambda z, e: jnp.sum(jnp.sqrt(1 + (z - e["y"][: z.size]) ** 2)),
}
