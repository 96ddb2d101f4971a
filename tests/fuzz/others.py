"""Parts whose weights are looked up, scanned over, normalised or frozen, and parts without."""

import jax
import jax.numpy as jnp
import numpy as np

from .rules import form_of, frozen_sigma


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


def embedding(r, t, d):
    rows = lambda e: e["ids"][np.arange(t) % 4]  # noqa: E731

    def padded(w, e):  # 3 is padding, past the table; what is taken there is masked
        taken = jnp.take(w[:3], rows(e), axis=0)
        return jnp.where((rows(e) < 3)[:, None], taken, 0)

    form, look_up = form_of(
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


def tied_embedding(r, t, d):
    def apply(p, h, e):
        h = h + p["w"][e["ids"][np.arange(len(h)) % 4]]
        return jnp.tanh(h) @ p["w"].T

    return "logits", {"w": r(4, d)}, apply


def experts(r, t, d):
    def top(p, h, e):
        gates, ids = jax.lax.top_k(jax.nn.softmax(h @ p["gate"], axis=-1), 1)
        return gates * jnp.einsum("td,tdo->to", h, p["w"][ids[:, 0]])

    form, apply = form_of(
        r,
        {
            "top_1": top,
            "soft": lambda p, h, e: jnp.einsum(
                "te,td,edo->to", jax.nn.softmax(h @ p["gate"], axis=-1), h, p["w"]
            ),
            "routed": lambda p, h, e: h @ p["w"][e["ids"][0] % 2] * p["gate"].mean(),
            "dynamic": lambda p, h, e: (
                h @ jax.lax.dynamic_index_in_dim(p["w"], e["ids"][1] % 2, keepdims=False)
            ),
        },
    )
    return form, {"w": r(2, d, 2), "gate": r(d, 2)}, apply


def norm(r, t, d):
    form, normalised = form_of(
        r,
        {
            "layer": lambda h: jax.nn.standardize(h, axis=-1, epsilon=0.1),
            "layer_by_hand": lambda h: (
                (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 0.1)
            ),
            "rms": lambda h: h * jax.lax.rsqrt(0.1 + jnp.mean(h**2, axis=-1, keepdims=True)),
            "group": lambda h: (h - h.mean()) / jnp.sqrt(0.1 + h.var()),
            "unit": lambda h: h / jnp.sqrt(0.1 + jnp.sum(h**2, axis=-1, keepdims=True)),
        },
    )
    params = {"scale": 1 + r(d), "bias": r(d)}
    return form, params, lambda p, h, e: normalised(h) * p["scale"][None] + p["bias"][None]


def normed_weight(r, t, d):
    form, change = form_of(
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


def spectrum(r, t, d):
    form, mixed = form_of(
        r,
        {
            "mixing": lambda h, w: jnp.fft.fft2(h).real @ w,
            "mixing_after": lambda h, w: jnp.fft.fft(h @ w, axis=0).imag,
            "complex_input": lambda h, w: jnp.abs(jnp.fft.fft(h, axis=0) @ w.astype(complex)) ** 2,
            "complex_weight": lambda h, w: (
                (h.astype(complex) @ jax.lax.complex(w, w[::-1] ** 2)).real
            ),
            "filter": lambda h, w: jnp.fft.irfft(
                jnp.fft.rfft(h, axis=0) * w[:1, :1].astype(complex), n=t, axis=0
            ),
            "phase": lambda h, w: jnp.real(jnp.exp(1j * (h @ w).astype(complex))),
            "angle": lambda h, w: jnp.angle(jax.lax.complex(1 + (h @ w) ** 2, h @ w)),
            "weight_spectrum": lambda h, w: h @ jnp.abs(jnp.fft.fft(w, axis=0)),
        },
    )
    return form, {"w": r(d, d)}, lambda p, h, e: mixed(h, p["w"])


def linear_algebra(r, t, d):
    def positive(w):
        return w @ w.T + jnp.eye(d)

    form, solved = form_of(
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


def frozen(r, t, d):
    def stopped_loop(h, w):
        """A normaliser found by a loop that JAX cannot differentiate backwards."""
        fixed = jax.lax.stop_gradient(h @ w)
        grow = lambda s: (s[0] + 1, 1.5 * s[1])  # noqa: E731
        small = lambda s: (s[1] < jnp.sum(fixed**2)) & (s[0] < 5)  # noqa: E731
        return h @ w / jax.lax.while_loop(small, grow, (0, jnp.ones((), h.dtype)))[1]

    def callback(h, w):
        fixed = jax.lax.stop_gradient(h @ w)
        # Booleans: a callback runs in another thread, where float64 may not be enabled.
        result = jax.ShapeDtypeStruct(fixed.shape, bool)
        above = jax.pure_callback(
            lambda x: np.asarray(x) > 0, *(result, fixed), vmap_method="expand_dims"
        )
        return jnp.where(above, 1, -1) * (h @ w)

    form, apply = form_of(
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


def empty(r, t, d):
    form, apply = form_of(
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


def unused(r, t, d):
    form, apply = form_of(
        r,
        {
            "never": lambda p, h: h,
            "times_zero": lambda p, h: h + 0 * jnp.sum(p["w"]),
            "additive": lambda p, h: h + p["w"][:1],
            "dead_branch": lambda p, h: jax.lax.cond(False, lambda: h @ p["w"], lambda: h),
        },
    )
    return form, {"w": r(d, d)}, lambda p, h, e: apply(p, h)


def pooling(r, t, d):
    def window(h, start, combine, **options):
        sizes = {"window_dimensions": (2, 1), "window_strides": (1, 1), "padding": "SAME"}
        return jax.lax.reduce_window(h, np.asarray(start, h.dtype), combine, **sizes | options)

    form, pooled = form_of(
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
            "scatter": lambda h: jnp.zeros_like(h).at[np.arange(len(h)) // 2].add(h),
            "outer": lambda h: jnp.einsum("ti,tj->ij", h, h),
        },
    )
    return form, {"w": r(d)}, lambda p, h, e: pooled(h * p["w"][None])


PARTS = {
    part.__name__: part
    for part in (
        scan_const,
        scan_stacked,
        scan_carry,
        embedding,
        tied_embedding,
        experts,
        norm,
        normed_weight,
        spectrum,
        linear_algebra,
        frozen,
        empty,
        unused,
        pooling,
    )
}
