"""The parts of random programs, as users write them.

A part takes random numbers and the shape (t, d) of the activations; it returns its weights and a
function ``(weights, activations, example) -> activations``. An example holds ``x`` of shape (t, d),
``ids`` (four integers from 0 to 3) and the positive number ``s``.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .rules import frozen_sigma, fused_dense

PARTS = {}


def part(function):
    PARTS[function.__name__] = function
    return function


def _form(r, forms):
    """One of several ways to write the same, and its name for the report."""
    name = r.pick(*forms)
    return name, forms[name]


def _softmax_attention(q, k, v, mask=None):
    scores = jnp.einsum("...qd,...kd->...qk", q, k) / 2
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    return jnp.einsum("...qk,...kd->...qd", jax.nn.softmax(scores, axis=-1), v)


@part
def dense(r, t, d):
    form, product = _form(
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


@part
def einsum(r, t, d):
    form, product = _form(
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


@part
def token_mixing(r, t, d):
    form, product = _form(
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


@part
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


@part
def conv_other(r, t, d):
    def general(lhs, rhs, numbers, strides=1, **options):
        strides = (strides,) * (lhs.ndim - 2)
        options = {"padding": "SAME"} | options
        return jax.lax.conv_general_dilated(lhs, rhs, strides, dimension_numbers=numbers, **options)

    image = ("NHWC", "HWIO", "NHWC")
    form, (shape, apply) = _form(
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
                lambda w, h: general(h[None, :, :2], w, ("NWC", "WIO", "NWC"), feature_group_count=2)[
                    0
                ],
            ),
            "batch_group": (
                (2, 1, d),
                lambda w, h: general(h.T[..., None], w, ("NWC", "WIO", "NWC"), batch_group_count=d)[0],
            ),
            "kernel_left": (
                (2, 2, d),
                lambda w, h: general(w, h[:, :, None], ("NWC", "WIO", "NWC"))[..., 0].T,
            ),
            "both": ((2, d, d), lambda w, h: general(h[None], w * h.mean(), ("NWC", "WIO", "NWC"))[0]),
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


@part
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
            return (new, total * old + weight, out * old[:, None] + weight[:, None] * kv[1][None]), None

        zeros = jnp.zeros_like(q[:, 0])
        start = (zeros - 10, zeros, jnp.zeros((len(q), v.shape[1]), q.dtype))
        (_, total, out), _ = jax.lax.scan(step, start, (k, v))
        return out / total[:, None]

    form, attend = _form(
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


@part
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


@part
def scan_const(r, t, d):
    form = r.pick("rnn", "reverse", "unrolled", "remat", "gru")

    def step(p, c, x):
        new = jnp.tanh(x @ p["w"] + c @ p["u"])
        if form == "gru":
            z = jax.nn.sigmoid(c @ p["u"].T)
            new = z * c + (1 - z) * new
        return new, new

    def apply(p, h, e):
        body = jax.checkpoint(step) if form == "remat" else step
        options = {"reverse": form == "reverse", "unroll": 2 if form == "unrolled" else 1}
        return jax.lax.scan(lambda c, x: body(p, c, x), jnp.zeros(2, h.dtype), h, **options)[1]

    return form, {"w": r(d, 2), "u": r(2, 2)}, apply


@part
def scan_stacked(r, t, d):
    form = r.pick("layers", "layers_and_const", "reverse", "experts", "sliced")

    def apply(p, h, e):
        def step(h, w):
            out = h @ (w + w.T if form == "layers_and_const" else w)
            return jnp.tanh(out + p["b"][None] if form == "layers_and_const" else out), w.sum()

        ws = p["w"]
        if form == "experts":
            return jax.lax.map(lambda w: h @ w, ws).sum(0)
        if form == "sliced":
            return jax.lax.fori_loop(0, 2, lambda i, h: step(h, ws[i])[0], h)
        return jax.lax.scan(step, h, ws, reverse=form == "reverse")[0]

    return form, {"w": r(2, d, d), "b": r(1)}, apply


@part
def scan_carry(r, t, d):
    form = r.pick("fast_weights", "decayed", "descent", "associative")

    def apply(p, h, e):
        def step(w, x):
            if form == "descent":  # a step of gradient descent on the weight, inside
                w = w - 0.1 * jax.grad(lambda w: jnp.sum((x @ w - x) ** 2))(w)
            elif form == "fast_weights":
                w = 0.9 * w + jnp.outer(x, jnp.tanh(x @ w))
            else:
                w = 0.5 * w
            return w, x @ w

        if form == "associative":
            gates = jnp.tanh(h @ p["w"])
            return jax.lax.associative_scan(
                lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (gates, h)
            )[1]
        return jax.lax.scan(step, p["w"], h)[1]

    return form, {"w": r(d, d)}, apply


@part
def embedding(r, t, d):
    rows = lambda e: e["ids"][np.arange(t) % 4]  # noqa: E731

    def padded(w, e):  # 3 is padding, past the table; what is taken there is masked
        taken = jnp.take(w[:3], rows(e), axis=0)
        return jnp.where((rows(e) < 3)[:, None], taken, 0)

    form, look_up = _form(
        r,
        {
            "index": lambda w, e: w[rows(e)],
            "fill": lambda w, e: jnp.take(w, rows(e), axis=0, mode="fill", fill_value=0.5),
            "clip": lambda w, e: jnp.take(w, 2 * rows(e), axis=0, mode="clip"),
            "wrap": lambda w, e: jnp.take(w, 3 * rows(e), axis=0, mode="wrap"),
            "in_bounds": lambda w, e: w.at[rows(e)].get(mode="promise_in_bounds"),
            "past_the_table": padded,
            "one_hot": lambda w, e: jax.nn.one_hot(rows(e), 4, dtype=w.dtype) @ w,
            "columns": lambda w, e: w.T[:, rows(e)].T,
            "entries": lambda w, e: w[rows(e)[:, None], jnp.arange(d)[None] % 2],
            "one_row": lambda w, e: w[e["ids"][0]][None],
            "scatter": lambda w, e: jnp.zeros((t, d), w.dtype).at[e["ids"] % t].add(w),
            "set": lambda w, e: jnp.ones((4, d), w.dtype).at[1].set(w[2])[rows(e)] * w[:1],
        },
    )
    return form, {"w": r(4, d)}, lambda p, h, e: h + look_up(p["w"], e)[: len(h)]


@part
def tied_embedding(r, t, d):
    def apply(p, h, e):
        h = h + p["w"][e["ids"][np.arange(len(h)) % 4]]
        return jnp.tanh(h) @ p["w"].T

    return "logits", {"w": r(4, d)}, apply


@part
def experts(r, t, d):
    def top(p, h, e):
        gates, ids = jax.lax.top_k(jax.nn.softmax(h @ p["gate"], axis=-1), 1)
        return gates * jnp.einsum("td,tdo->to", h, p["w"][ids[:, 0]])

    form, apply = _form(
        r,
        {
            "top_1": top,
            "soft": lambda p, h, e: jnp.einsum(
                "te,td,edo->to", jax.nn.softmax(h @ p["gate"], axis=-1), h, p["w"]
            ),
            "routed": lambda p, h, e: h @ p["w"][e["ids"][0] % 2] * p["gate"].mean(),
            "dynamic": lambda p, h, e: h @ jax.lax.dynamic_index_in_dim(
                p["w"], e["ids"][1] % 2, keepdims=False
            ),
        },
    )
    return form, {"w": r(2, d, 2), "gate": r(d, 2)}, apply


@part
def norm(r, t, d):
    form, normalised = _form(
        r,
        {
            "layer": lambda h: jax.nn.standardize(h, axis=-1, epsilon=0.1),
            "layer_by_hand": lambda h: (h - h.mean(-1, keepdims=True))
            / jnp.sqrt(h.var(-1, keepdims=True) + 0.1),
            "rms": lambda h: h * jax.lax.rsqrt(0.1 + jnp.mean(h**2, axis=-1, keepdims=True)),
            "group": lambda h: (h - h.mean()) / jnp.sqrt(0.1 + h.var()),
            "unit": lambda h: h / jnp.sqrt(0.1 + jnp.sum(h**2, axis=-1, keepdims=True)),
        },
    )
    params = {"scale": 1 + r(d), "bias": r(d)}
    return form, params, lambda p, h, e: normalised(h) * p["scale"][None] + p["bias"][None]


@part
def normed_weight(r, t, d):
    form, change = _form(
        r,
        {
            "weight_norm": lambda w: w / jnp.linalg.norm(w, axis=0, keepdims=True),
            "spectral": lambda w: w / frozen_sigma(w),
            "centred": lambda w: (w - w.mean(0, keepdims=True)) / (0.3 + w.std(0, keepdims=True)),
            "orthogonal": lambda w: jnp.linalg.qr(w)[0],
            "sigma_in_graph": lambda w: w / (0.1 + jnp.linalg.norm(w @ (w.T @ w))),
        },
    )
    params = {"w": r(d, 2), "g": 1 + r(2)}
    return form, params, lambda p, h, e: h @ (change(p["w"]) * p["g"][None])


@part
def spectrum(r, t, d):
    form, mixed = _form(
        r,
        {
            "mixing": lambda h, w: jnp.fft.fft2(h).real @ w,
            "mixing_after": lambda h, w: jnp.fft.fft(h @ w, axis=0).imag,
            "complex_input": lambda h, w: jnp.abs(jnp.fft.fft(h, axis=0) @ w.astype(complex)) ** 2,
            "complex_weight": lambda h, w: (
                h.astype(complex) @ jax.lax.complex(w, w[::-1] ** 2)
            ).real,
            "filter": lambda h, w: jnp.fft.irfft(
                jnp.fft.rfft(h, axis=0) * w[:1, :1].astype(complex), n=t, axis=0
            ),
            "phase": lambda h, w: jnp.real(jnp.exp(1j * (h @ w).astype(complex))),
            "angle": lambda h, w: jnp.angle(jax.lax.complex(1 + (h @ w) ** 2, h @ w)),
            "weight_spectrum": lambda h, w: h @ jnp.abs(jnp.fft.fft(w, axis=0)),
        },
    )
    return form, {"w": r(d, d)}, lambda p, h, e: mixed(h, p["w"])


@part
def linear_algebra(r, t, d):
    def positive(w):
        return w @ w.T + jnp.eye(d)

    form, solved = _form(
        r,
        {
            "solve": lambda h, w: jnp.linalg.solve(w + 3 * jnp.eye(d), h.T).T,
            "cholesky": lambda h, w: h @ jnp.linalg.cholesky(positive(w)),
            "inverse": lambda h, w: h @ jnp.linalg.inv(positive(w)),
            "determinant": lambda h, w: h * jnp.linalg.slogdet(positive(w))[1],
            "expm": lambda h, w: h @ jax.scipy.linalg.expm(0.5 * (w - w.T)),
            "triangular": lambda h, w: jax.scipy.linalg.solve_triangular(w + 2 * jnp.eye(d), h.T).T,
            "cg": lambda h, w: jax.scipy.sparse.linalg.cg(lambda x: positive(w) @ x, h.T)[0].T,
            "eigenvalues": lambda h, w: h * jnp.linalg.eigvalsh(positive(w))[None],
        },
    )
    return form, {"w": r(d, d)}, lambda p, h, e: solved(h, p["w"])


@part
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

    form, apply = _form(r, {"glu": glu, "highway": highway, "film": film})
    return form, {"w": r(d, 4), "b": r(4)}, lambda p, h, e: apply(p, h)


@part
def scalars(r, t, d):
    form, apply = _form(
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


@part
def factors(r, t, d):
    form, weight = _form(
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


@part
def frozen(r, t, d):
    def stopped_loop(h, w):
        """A normaliser found by a loop that JAX cannot differentiate backwards."""
        fixed = jax.lax.stop_gradient(h @ w)
        grow = lambda s: (s[0] + 1, 1.5 * s[1])  # noqa: E731
        small = lambda s: (s[1] < jnp.sum(fixed**2)) & (s[0] < 5)  # noqa: E731
        return h @ w / jax.lax.while_loop(small, grow, (0, jnp.ones((), h.dtype)))[1]

    def callback(h, w):
        fixed = jax.lax.stop_gradient(h @ w)
        result = jax.ShapeDtypeStruct(fixed.shape, fixed.dtype)
        seen = jax.pure_callback(np.sign, result, fixed, vmap_method="expand_dims")
        return h @ w * seen

    form, apply = _form(
        r,
        {
            "stop_gradient": lambda h, w: h + jax.lax.stop_gradient(h @ w),
            "target": lambda h, w: (h @ w - jax.lax.stop_gradient(jnp.sin(h @ w))) ** 2,
            "weight": lambda h, w: h @ jax.lax.stop_gradient(w) + w[:1],
            "integer": lambda h, w: h + (4 * (h @ w)).astype(jnp.int32).astype(h.dtype),
            "sign": lambda h, w: h * jnp.sign(h @ w),
            "argmax": lambda h, w: h * (1 + jnp.argmax(h @ w, axis=-1)[:, None]).astype(h.dtype),
            "compared": lambda h, w: jnp.where(h @ w > 0, h, h**2),
            "loop": stopped_loop,
            "callback": callback,
        },
    )
    return form, {"w": r(d, d)}, lambda p, h, e: apply(h, p["w"])


@part
def empty(r, t, d):
    form, apply = _form(
        r,
        {
            "rows": lambda p, h: h + p["none"].sum(0)[None],
            "product": lambda p, h: h + h @ p["none"].T @ p["none"],
            "concatenated": lambda p, h: h @ jnp.concatenate([p["w"], p["none"]]),
            "unused": lambda p, h: h @ p["w"],
            "mapped": lambda p, h: h + jax.lax.map(jnp.sin, p["none"]).sum(),
        },
    )
    return form, {"none": r(0, d), "w": r(d, d)}, lambda p, h, e: apply(p, h)


@part
def unused(r, t, d):
    form, apply = _form(
        r,
        {
            "never": lambda p, h: h,
            "times_zero": lambda p, h: h + 0 * jnp.sum(p["w"]),
            "additive": lambda p, h: h + p["w"][:1],
            "dead_branch": lambda p, h: jax.lax.cond(False, lambda: h @ p["w"], lambda: h),
        },
    )
    return form, {"w": r(d, d)}, lambda p, h, e: apply(p, h)


@part
def pooling(r, t, d):
    def window(h, start, combine, **options):
        sizes = {"window_dimensions": (2, 1), "window_strides": (1, 1), "padding": "SAME"}
        return jax.lax.reduce_window(h, np.asarray(start, h.dtype), combine, **sizes | options)

    form, pooled = _form(
        r,
        {
            "max": lambda h: window(h, -np.inf, jax.lax.max),
            "sum": lambda h: window(h, 0, jax.lax.add, window_strides=(2, 1)),
            "cumsum": lambda h: jnp.cumsum(h, axis=0),
            "cumprod": lambda h: jnp.cumprod(h, axis=0),
            "cummax": lambda h: jax.lax.cummax(h),
            "cumlogsumexp": lambda h: jax.lax.cumlogsumexp(h),
            "sort": lambda h: jnp.sort(h, axis=0),
            "sort_by_key": lambda h: jax.lax.sort((h[:, 0], h[:, 1]), num_keys=1)[1][:, None],
            "top_k": lambda h: jax.lax.top_k(h, 2)[0],
            "median": lambda h: jnp.median(h, axis=0)[None],
            "max_tokens": lambda h: h.max(0)[None],
            "prod": lambda h: jnp.prod(h, axis=0)[None],
            "logsumexp": lambda h: jax.nn.logsumexp(h, axis=0)[None],
            "pad": lambda h: jnp.pad(h, ((1, 0), (0, 0)), mode="edge"),
            "concatenate": lambda h: jnp.concatenate([h, h[::-1] ** 2]),
            "dynamic_slice": lambda h: jax.lax.dynamic_slice_in_dim(h, 0, 1),
            "outer": lambda h: jnp.einsum("ti,tj->ij", h, h),
        },
    )
    return form, {"w": r(d)}, lambda p, h, e: pooled(h * p["w"][None])
