"""What may happen to a weight before its use, and to a part as a whole.

A change is a function ``(weight, example) -> weight`` that keeps the shape. A wrapper takes a
part's function ``(weights, activations, example) -> activations`` and returns another.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from .rules import clip_gradient, frozen_sigma, fused_tanh, powered, round_through


def _mask(w):
    return jnp.asarray(np.arange(w.size).reshape(w.shape) % 3 > 0)


# Changes of a weight before its use; they keep its shape, and work for one without entries.
CHANGES = {
    "transpose": lambda w, e: w.T.reshape(w.T.shape).T,
    "reshape": lambda w, e: w.reshape(-1).reshape(w.shape),
    "new_axis": lambda w, e: w[None].repeat(2, 0)[1],
    "expand_squeeze": lambda w, e: jnp.expand_dims(w, -1).squeeze(-1),
    "broadcast": lambda w, e: jnp.broadcast_to(w, (2, *w.shape)).sum(0),
    "reverse": lambda w, e: w[::-1],
    "strided": lambda w, e: jnp.concatenate([w[::2], w[1::2]]),
    "split": lambda w, e: jnp.concatenate(jnp.split(w, [1])[::-1]),
    "pad": lambda w, e: jnp.pad(w, 1)[tuple(slice(1, n + 1) for n in w.shape)],
    "roll": lambda w, e: jnp.roll(w, 1, axis=0),
    "stack": lambda w, e: jnp.stack([w, 2 * w])[e["ids"][0] % 2],
    "permute": lambda w, e: jnp.take(w, np.arange(w.shape[0])[::-1], axis=0, mode="clip"),
    "dynamic_slice": lambda w, e: jax.lax.dynamic_slice_in_dim(
        jnp.concatenate([w, -w]), e["ids"][0], w.shape[0]
    ),
    "mask": lambda w, e: w * _mask(w).astype(w.dtype),
    "where": lambda w, e: jnp.where(_mask(w), w, 0.5),
    "drop_connect": lambda w, e: jnp.where(
        jax.random.bernoulli(jax.random.fold_in(jax.random.key(0), e["ids"][1]), 0.5, w.shape), w, 0
    ),
    "constant": lambda w, e: 0.5 * w,
    "shift": lambda w, e: 1 - w,
    "example_scale": lambda w, e: w * e["s"],
    "half": lambda w, e: w.astype(jnp.bfloat16).astype(w.dtype),
    "single": lambda w, e: w.astype(jnp.float32).astype(w.dtype),
    "reduce_precision": lambda w, e: jax.lax.reduce_precision(w, 8, 10),
    "integer": lambda w, e: (4 * w).astype(jnp.int8).astype(w.dtype) / 4,
    "half_frozen": lambda w, e: jnp.concatenate([jax.lax.stop_gradient(w[:1]), w[1:]]),
    "quantized": lambda w, e: w + jax.lax.stop_gradient(jnp.round(4 * w) / 4 - w),
    "rounded": lambda w, e: round_through(w),
    "clipped": lambda w, e: jnp.clip(w, -0.7, 0.7),
    "name": lambda w, e: checkpoint_name(w, "w"),
    "barrier": lambda w, e: jax.lax.optimization_barrier(w),
    "copy": lambda w, e: jnp.array(w, copy=True),
    "sharded": lambda w, e: jax.lax.with_sharding_constraint(
        w, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ),
    "jit": lambda w, e: jax.jit(lambda w: w.T)(w).T,
    "remat": lambda w, e: jax.checkpoint(jnp.sin)(w),
    "square": lambda w, e: w**2,
    "centred": lambda w, e: w - w.mean(axis=0, keepdims=True),
    "sort": lambda w, e: jnp.sort(w, axis=-1),
    "cumsum": lambda w, e: jnp.cumsum(w, axis=0),
    "softmax": lambda w, e: jax.nn.softmax(w, axis=-1),
    "real": lambda w, e: ((1 + 2j) * jax.lax.complex(w, w**2)).imag,
    "weight_norm": lambda w, e: w / (0.1 + jnp.sqrt(jnp.sum(w**2))),
    "spectral_norm": lambda w, e: w / (0.1 + frozen_sigma(w)),
    "own_jvp": lambda w, e: powered(3, w),
    "own_vjp": lambda w, e: fused_tanh(w),
    "reused": lambda w, e: w + w * w[:1],
}

ACTIVATIONS = {
    "identity": lambda h: h,
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "elu": jax.nn.elu,
    "elu_by_hand": lambda h: jnp.where(h > 0, h, jnp.expm1(h)),
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "standardize": lambda h: jax.nn.standardize(h, epsilon=0.1),
    "arctan": jnp.arctan,
    "erf": jax.lax.erf,
    "abs": jnp.abs,
    "clip": lambda h: h.clip(-1, 1),
    "square": jnp.square,
    "log1p": lambda h: jnp.log1p(h**2),
    "rsqrt": lambda h: jax.lax.rsqrt(1 + h**2),
    "jit": jax.jit(jnp.cos),
    "remat": jax.checkpoint(jnp.sinh),
    "own_jvp": lambda h: powered(2, h),
    "own_vjp": fused_tanh,
    "clip_gradient": clip_gradient,
    "round_through": round_through,
}


def jit(f, r):
    return jax.jit(f)


def checkpoint(f, r):
    policy = r.pick(None, jax.checkpoint_policies.dots_saveable)
    return jax.checkpoint(f, policy=policy)


def residual(f, r):
    return lambda p, h, e: h + f(p, h, e)


def twice(f, r):
    return lambda p, h, e: f(p, jnp.tanh(f(p, h, e)), e)


def cond(f, r):
    return lambda p, h, e: jax.lax.cond(
        e["s"] > 1, lambda p, h: f(p, h, e), lambda p, h: jnp.sin(f(p, -h, e)), p, h
    )


def switch(f, r):
    return lambda p, h, e: jax.lax.switch(
        e["ids"][0] % 3, [lambda h: f(p, h, e), lambda h: h, lambda h: f(p, 2 * h, e)], h
    )


def fori_loop(f, r):
    return lambda p, h, e: jax.lax.fori_loop(0, 2, lambda i, h: jnp.tanh(f(p, h, e)), h)


def scan_remat(f, r):
    body = jax.checkpoint(lambda p, h, e: jnp.tanh(f(p, h, e)))
    return lambda p, h, e: jax.lax.scan(lambda h, _: (body(p, h, e), h), h, None, length=2)[0]


def vmap(f, r):
    def of_one(p, h, e):
        out = f(p, h, e)
        return out - 0.5 * jax.lax.pmean(jnp.sin(out), "i")

    def apply(p, h, e):
        return jax.vmap(lambda h: of_one(p, h, e), axis_name="i")(jnp.stack([h, -h])).mean(0)

    return apply


def vmap_weights(f, r):
    def apply(p, h, e):
        both = jax.tree.map(lambda w: jnp.stack([w, 0.5 * w]), p)
        return jax.vmap(lambda p: f(p, h, e))(both).sum(0)

    return apply


def input_gradient(f, r):
    """As a network that solves a differential equation uses itself."""
    return lambda p, h, e: jax.grad(lambda h: jnp.sum(jnp.sin(f(p, h, e))))(h)


def own_vjp(f, r):
    """A rule that calls `jax.vjp` again, so that it can be differentiated."""
    g = jax.custom_vjp(f)
    g.defvjp(
        lambda p, h, e: (f(p, h, e), (p, h, e)),
        lambda phe, d: (*jax.vjp(lambda p, h: f(p, h, phe[2]), *phe[:2])[1](d), None),
    )
    return g


def half_stopped(f, r):
    return lambda p, h, e: f(p, h, e) + jax.lax.stop_gradient(f(p, jnp.sin(h), e))


def stopped_input(f, r):
    return lambda p, h, e: f(p, jax.lax.stop_gradient(h), e) * (1 + h.mean())


def half_precision(f, r):
    def apply(p, h, e):
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (p, h))
        return f(*half, e | {"s": e["s"].astype(jnp.bfloat16)}).astype(h.dtype)

    return apply


def dropout(f, r):
    def apply(p, h, e):
        out = f(p, h, e)
        key = jax.random.fold_in(jax.random.key(1), e["ids"][0])
        return jnp.where(jax.random.bernoulli(key, 0.7, out.shape), out / 0.7, 0)

    return apply


def debug(f, r):
    def apply(p, h, e):
        out = f(p, h, e)
        jax.debug.callback(lambda x: None, out)
        return out

    return apply


WRAPPERS = {
    wrapper.__name__: wrapper
    for wrapper in (
        jit,
        checkpoint,
        residual,
        twice,
        cond,
        switch,
        fori_loop,
        scan_remat,
        vmap,
        vmap_weights,
        input_gradient,
        own_vjp,
        half_stopped,
        stopped_input,
        half_precision,
        dropout,
        debug,
    )
}
