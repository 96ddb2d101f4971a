"""Parts whose weights multiply activations: dense layers, convolutions, attention, gates."""

import jax
import jax.numpy as jnp
import numpy as np

from .rules import form_of, fused_dense


def _softmax_attention(q, k, v, mask=None):
    scores = jnp.einsum("...qd,...kd->...qk", q, k) / 2
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    return jnp.einsum("...qk,...kd->...qd", jax.nn.softmax(scores, axis=-1), v)


def dense(r, t, d):
    form, product = form_of(
        r,
        {
            "matmul": lambda h, w: h @ w,
            "transposed": lambda h, w: (w.T @ h.T).T,
            "einsum": lambda h, w: jnp.einsum("td,do->to", h, w),
            "vmap": lambda h, w: jax.vmap(lambda x: x @ w)(h),
            "map": lambda h, w: jax.lax.map(lambda x: x @ w, h),
            "rows": lambda h, w: jnp.stack([x @ w for x in h]),
            "first_row": lambda h, w: (h[0] @ w)[None],
            "flat": lambda h, w: h[:1] @ w + h[-1:] @ w[::-1],
            "by_hand": lambda h, w: jnp.sum(h[:, :, None] * w[None], axis=1),
            "columns": lambda h, w: jnp.stack([h @ w[:, i] for i in range(w.shape[1])], -1),
            "fused": fused_dense,
            "twice": lambda h, w: h @ w @ (w.T @ w),
            "tied": lambda h, w: jnp.tanh(h @ w) @ w.T,
        },
    )
    params = {"w": r(d, r.pick(2, 3)), "b": r(1)}
    return form, params, lambda p, h, e: product(h, p["w"]) + p["b"][None]


def einsum(r, t, d):
    form, product = form_of(
        r,
        {
            "heads": lambda h, w: jnp.einsum("td,dhk->thk", h, w).reshape(len(h), -1),
            "tensordot": lambda h, w: jnp.tensordot(h, w, 1).sum(-1),
            "bilinear": lambda h, w: jnp.einsum("ti,ijk,tj->tk", h, w[:, :, None, 0], h),
            "batched": lambda h, w: jnp.einsum("td,dhk->dtk", h, w).mean(0),
            "block_diagonal": lambda h, w: jnp.einsum("td,dhk->tdk", h, w).reshape(len(h), -1)[
                :, :3
            ],
            "trace": lambda h, w: h * jnp.einsum("iij->j", w[:2, :2])[None, :1],
        },
    )
    sizes = (d, d, 1) if form == "bilinear" else (d, 2, 2)
    return form, {"w": r(*sizes)}, lambda p, h, e: product(h, p["w"])


def token_mixing(r, t, d):
    form, product = form_of(
        r,
        {
            "left": lambda h, w: w @ h,
            "einsum": lambda h, w: jnp.einsum("sd,st->td", h, w),
            "toeplitz": lambda h, w: jnp.stack([jnp.roll(h, i, 0) * w[0, i] for i in range(t)]).sum(
                0
            ),
            "quadratic": lambda h, w: h * jnp.einsum("ti,ts,si->i", h, w, h)[None],
        },
    )
    return form, {"w": r(t, t)}, lambda p, h, e: product(h, p["w"])


def conv(r, t, d):
    o = 2 * d
    kinds = {  # shape of the kernel (width, in, out) and the convolution's options
        "same": ((2, d, 2), {}),
        "explicit_padding": ((2, d, 2), {"padding": [(2, 1)]}),
        "strided": ((2, d, 2), {"window_strides": (2,)}),
        "dilated": ((2, d, 2), {"rhs_dilation": (2,)}),
        "transposed": ((2, d, 2), {"lhs_dilation": (2,), "padding": [(1, 1)]}),
        "depthwise": ((2, 1, o), {"feature_group_count": d}),
        "flipped": ((2, d, 2), {"flip": True}),
        "dilated_depthwise": ((2, 1, d), {"feature_group_count": d, "rhs_dilation": (2,)}),
    }
    kind = r.pick(*kinds)
    shape, options = kinds[kind]
    options = {"window_strides": (1,), "padding": "SAME"} | options
    flip = options.pop("flip", False)

    def apply(p, h, e):
        w = p["w"][::-1] if flip else p["w"]
        numbers = ("NWC", "WIO", "NWC")
        out = jax.lax.conv_general_dilated(h[None], w, dimension_numbers=numbers, **options)
        return out[0] + p["b"][None]

    return kind, {"w": r(*shape), "b": r(1)}, apply


def conv_other(r, t, d):
    def general(lhs, rhs, numbers, strides=1, **options):
        strides = (strides,) * (lhs.ndim - 2)
        options = {"padding": "SAME"} | options
        return jax.lax.conv_general_dilated(lhs, rhs, strides, dimension_numbers=numbers, **options)

    image = ("NHWC", "HWIO", "NHWC")
    form, (shape, apply) = form_of(
        r,
        {
            "image": ((2, 2, 1, 2), lambda w, h: general(h[None, :, :, None], w, image)[0].sum(-1)),
            "image_strided": (
                (2, 2, 1, 2),
                lambda w, h: general(h[None, :, :, None], w, image, 2)[0].reshape(-1, 2),
            ),
            "channels_first": (
                (2, 1, 2, 2),
                lambda w, h: general(h[None, None], w, ("NCHW", "OIHW", "NCHW"))[0].mean(0),
            ),
            "grouped": (
                (2, 1, 4),
                lambda w, h: general(
                    h[None, :, :2], w, ("NWC", "WIO", "NWC"), feature_group_count=2
                )[0],
            ),
            "batch_group": (
                (2, 1, d),
                lambda w, h: general(h.T[..., None], w, ("NWC", "WIO", "NWC"), batch_group_count=d)[
                    0
                ],
            ),
            "kernel_left": (
                (2, 2, d),
                lambda w, h: general(w, h[:, :, None], ("NWC", "WIO", "NWC"))[..., 0].T,
            ),
            "both": (
                (2, d, d),
                lambda w, h: general(h[None], w * h.mean(), ("NWC", "WIO", "NWC"))[0],
            ),
            "conv_transpose": (
                (2, d, 2),
                lambda w, h: jax.lax.conv_transpose(
                    h[None], w, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
                )[0],
            ),
            "correlate": ((2,), lambda w, h: jax.vmap(lambda x: jnp.convolve(x, w))(h)),
        },
    )
    return form, {"w": r(*shape)}, lambda p, h, e: apply(p["w"], h)


def attention(r, t, d):
    causal = jnp.asarray(np.tril(np.ones((t, t), bool)))

    def jax_nn(q, k, v, **options):
        with jax.numpy_dtype_promotion("standard"):  # it promotes
            return jax.nn.dot_product_attention(q[:, None], k[:, None], v[:, None], **options)[:, 0]

    def by_loop(q, k, v):
        out = [jax.nn.softmax(k @ x, axis=-1) @ v for x in q]
        return jnp.stack(out)

    def flash(q, k, v):
        """Online softmax: a scan over keys."""

        def step(state, kv):
            top, total, out = state
            score = q @ kv[0]
            new = jnp.maximum(top, score)
            weight, old = jnp.exp(score - new), jnp.exp(top - new)
            return (
                new,
                total * old + weight,
                out * old[:, None] + weight[:, None] * kv[1][None],
            ), None

        zeros = jnp.zeros_like(q[:, 0])
        start = (zeros - 10, zeros, jnp.zeros((len(q), v.shape[1]), q.dtype))
        (_, total, out), _ = jax.lax.scan(step, start, (k, v))
        return out / total[:, None]

    form, attend = form_of(
        r,
        {
            "by_hand": lambda q, k, v: jax.nn.softmax(q @ k.T, axis=-1) @ v,
            "einsum": _softmax_attention,
            "causal": lambda q, k, v: _softmax_attention(q, k, v, causal),
            "jax_nn": jax_nn,
            "jax_nn_causal": lambda q, k, v: jax_nn(q, k, v, is_causal=True),
            "linear": lambda q, k, v: jax.nn.elu(q) @ (jax.nn.elu(k).T @ v),
            "sigmoid": lambda q, k, v: jax.nn.sigmoid(q @ k.T) @ v,
            "by_loop": by_loop,
            "flash": flash,
        },
    )
    params = {"q": r(d, 2), "k": r(d, 2), "v": r(d, 2)}
    return form, params, lambda p, h, e: attend(h @ p["q"], h @ p["k"], h @ p["v"])


def multi_head(r, t, d):
    form = r.pick("fused", "einsum", "tied")

    def apply(p, h, e):
        if form == "fused":  # one matrix, split after the product
            q, k, v = jnp.split(h @ p["qkv"].reshape(d, -1), 3, axis=-1)
            q, k, v = (x.reshape(len(h), 2, 2).swapaxes(0, 1) for x in (q, k, v))
        elif form == "einsum":
            q, k, v = jnp.einsum("td,dchk->chtk", h, p["qkv"])
        else:  # queries are the keys
            q, _, v = jnp.einsum("td,dchk->chtk", h, p["qkv"])
            k = q
        return _softmax_attention(q, k, v).swapaxes(0, 1).reshape(len(h), -1)[:, :3]

    return form, {"qkv": r(d, 3, 2, 2)}, apply


def gated(r, t, d):
    def glu(p, h):
        a, b = jnp.split(h @ p["w"] + p["b"][None], 2, axis=-1)
        return a * jax.nn.sigmoid(b)

    def highway(p, h):
        gate = jax.nn.sigmoid(h @ p["w"][:, :1])
        return gate * h + (1 - gate) * (h @ p["w"][:, 1:2]) + p["b"][None, :1]

    def film(p, h):
        scale, shift = p["w"].mean(0)[:1], p["b"][:1]
        return (1 + scale[None]) * h + shift[None]

    def sampled(p, h):  # a variational autoencoder's reparametrisation
        mean, log_scale = jnp.split(h @ p["w"] + p["b"][None], 2, axis=-1)
        return mean + jnp.exp(log_scale) * jax.random.normal(jax.random.key(0), mean.shape, h.dtype)

    forms = {"glu": glu, "highway": highway, "film": film, "sampled": sampled}
    form, apply = form_of(r, forms)
    return form, {"w": r(d, 4), "b": r(4)}, lambda p, h, e: apply(p, h)


def scalars(r, t, d):
    form, apply = form_of(
        r,
        {
            "scale": lambda h, s, e: s * h,
            "temperature": lambda h, s, e: jax.nn.softmax(h / (0.3 + s**2), axis=-1),
            "power": lambda h, s, e: (1 + h**2) ** s,
            "prelu": lambda h, s, e: jnp.where(h > 0, h, s * h),
            "swish": lambda h, s, e: h * jax.nn.sigmoid(s * h),
            "gate": lambda h, s, e: h * jnp.tanh(s) + e["s"],
            "cond": lambda h, s, e: jax.lax.cond(e["s"] > 1, jnp.sin, lambda x: x * x, s * h),
        },
    )
    return form, {"s": r()}, lambda p, h, e: apply(h, p["s"], e)


def factors(r, t, d):
    form, weight = form_of(
        r,
        {
            "low_rank": lambda a, b: jnp.outer(a, b),
            "low_rank_added": lambda a, b: jnp.eye(d, 2) + a[:, None] @ b[None],
            "hyper": lambda a, b: jnp.tanh(a[:, None] + b[None]),
            "kronecker": lambda a, b: jnp.kron(a, b).reshape(d, 2),
            "circulant": lambda a, b: jnp.stack([a, jnp.roll(a, 1)], -1) * b[None],
            "diagonal": lambda a, b: jnp.diag(a)[:, :2] * b[None],
        },
    )
    return form, {"a": r(d), "b": r(2)}, lambda p, h, e: h @ weight(p["a"], p["b"])


PARTS = {
    part.__name__: part
    for part in (
        dense,
        einsum,
        token_mixing,
        conv,
        conv_other,
        attention,
        multi_head,
        gated,
        scalars,
        factors,
    )
}
