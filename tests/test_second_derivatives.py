"""Second derivatives by one pass forwards, against JAX's own in float64.

Each function of three scalars moves arrays along directions of its own. The limit, 1e-12 of the
largest entry, is some thousand roundings of float64; a term that is left out or counted twice is of
the size of the entry.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lama_optax._jaxpr.interpret import names_in
from lama_optax._jaxpr.operations import ELEMENTWISE
from lama_optax._jaxpr.second_derivatives import second_derivatives

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
X, Y, A, B, C = (RNG.normal(size=(4, 4)) for _ in range(5))


def moved(t):
    """Three arrays, each moved by one of the scalars."""
    return X + t[0] * A, Y + t[1] * B, A + t[2] * C


def layers(*t):
    """Tangents that set in at different depths."""
    h = X
    for w in moved(t):
        h = jnp.tanh(h @ w)
    return jnp.sum(h**3)


def residual(*t):
    """What a product uses goes on elsewhere too: its second derivative must count once."""
    x, y, z = moved(t)
    h = jnp.exp(jnp.sin(x))
    h = h + jnp.tanh(h @ y) * jnp.square(h)
    return jnp.sum(jnp.cos(h) @ z) + jnp.sum(h * h)


def attention(*t):
    """Products of two values that move."""
    x, y, z = moved(t)
    weights = jax.nn.softmax((X @ x) @ (X @ y).T, axis=-1)
    return jnp.sum((weights @ (X @ z)) ** 2)


def softmaxes(*t):
    """Along any axis, masked, shifted or not, used on the way too, and what only looks like one."""
    x, y, z = moved(t)
    mask = jnp.tril(jnp.ones((4, 4), bool))
    p = jax.nn.softmax(jnp.where(mask, x @ y, -jnp.inf), axis=-1)
    q = jnp.exp(jnp.sin(y @ x)[None])
    q = q / jnp.sum(q, 1, keepdims=True) + q
    r = jnp.exp(z - jnp.max(z, axis=1, keepdims=True))
    r = r / jnp.sum(r, axis=0, keepdims=True) + r / jnp.sum(jnp.square(r), axis=1, keepdims=True)
    return jnp.sum(jnp.sin(p @ Y)) + jnp.sum(q[0] * p * X) + jnp.sum(r * A)


def normalised(*t):
    """Elementwise operations on values of two roots, and reductions."""
    x, y, z = moved(t)
    x = (x - jnp.mean(x, 1, keepdims=True)) * jax.lax.rsqrt(jnp.var(x, 1, keepdims=True) + 1e-3)
    return jnp.sum(jax.nn.gelu(x * jnp.exp(y)) / (1 + z**2)) + jnp.sum(jnp.max(z, axis=0) * y[0])


def copied(*t):
    """Elementwise functions of values that are copied along an axis, and of a number."""
    x, y, z = moved(t)
    length = jnp.sqrt(jnp.sum(x**2, axis=0, keepdims=True))
    return jnp.sum((Y / length) ** 3) + jnp.sum(
        length * jnp.sin(jnp.sum(y)) * A + jnp.exp(z[:1] * z)
    )


def piecewise(*t):
    """Operations whose results are no real numbers, or do not move."""
    x, y, z = moved(t)
    chosen = jnp.where(x > 0, jnp.square(x), jnp.abs(y) ** 3) * jnp.floor(z)
    best = jnp.take_along_axis(z**2, jnp.argmax(y, axis=1)[:, None], axis=1)
    return jnp.sum(chosen) + jnp.sum(best * x) + jnp.sum(jax.lax.stop_gradient(x) * z**3)


def recurrent(*t):
    """A product in a loop."""
    x, y, z = moved(t)
    h, hs = jax.lax.scan(lambda h, v: (jnp.tanh(h @ x + v), h * h), z, jnp.stack([y, Y]))
    return jnp.sum(h) + jnp.sum(hs**2)


def nested(*t):
    """Calls, rules of the user's own, rematerialisation and branches."""
    x, y, z = moved(t)
    h = jax.jit(lambda a: jax.nn.silu(a @ y))(jax.nn.relu(x))
    h = jax.checkpoint(lambda a: jnp.sin(a @ z))(h)
    h = jax.lax.cond(h[0, 0] > -2, lambda a: a @ a, lambda a: a, h)
    return jax.nn.logsumexp(h) + jax.jit(jnp.sum)(h * h)


def convolved(*t):
    """A convolution of what moves with a kernel that moves."""
    x, y, z = moved(t)
    out = jax.lax.conv_general_dilated(
        jnp.tanh(x)[None, ..., None], z[:2, :2, None, None], (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    return jnp.sum(jnp.tanh(out[0, ..., 0]) * y)


def partly_moved(*t):
    """One scalar moves a vector, one nothing, one enters as it is."""
    return jnp.sum(jnp.exp(t[0] * X) @ Y) + t[2] ** 2 * jnp.sin(t[2]) + 3 * t[2] ** 2


def constant(*t):
    """Nothing moves."""
    return jnp.sum(X) + 0 * t[0]


FUNCTIONS = [
    layers, residual, attention, softmaxes, normalised, copied, piecewise, recurrent, nested,
    convolved, partly_moved, constant,
]  # fmt: skip


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_they_are_those_of_the_hessian(fn):
    zeros = [jnp.zeros(())] * 3

    @jax.jit
    @jax.vmap
    def both(at):
        found = second_derivatives(lambda *t: fn(*(s + at for s in t)), zeros)
        assert found.unknown is None
        hessian = jax.hessian(lambda t: fn(*(t + at)))(jnp.zeros(3))
        return found.value, fn(at, at, at), found.derivatives, jnp.diag(hessian)

    value, expected_value, found, expected = both(jnp.asarray([0.0, 0.1, -0.2]))
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    limit = 1e-12 * max(1, np.max(np.abs(expected)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit)


def spectrum(x):
    """Complex numbers."""
    return jnp.sum(jnp.abs(jnp.fft.fft(x)) ** 3)


def rule_for_gradients(x):
    """A `jax.custom_vjp`, which has no derivative forwards."""
    sine = jax.custom_vjp(jnp.sin)
    sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    return jnp.sum(sine(x) ** 2)


def inside(x):
    """An operation that is not on the list, in a branch of a loop."""

    def turn(h, _):
        return jax.lax.cond(h[0, 0] > 0, lambda h: h, lambda h: jnp.linalg.inv(h), h), None

    return jnp.sum(jnp.sin(jax.lax.scan(turn, x, length=2)[0]))


@pytest.mark.parametrize(
    ("fn", "name"),
    [(spectrum, "convert_element_type"), (rule_for_gradients, "custom_vjp_call"), (inside, "lu")],
)
def test_what_is_not_on_the_list_is_left_to_the_gradient(fn, name):
    zeros = [jnp.zeros(())] * 2

    def of_t(t, u):
        return fn(X + t * A + u**2 * B) + jnp.sum(jnp.sin(u * C))

    unknown = []

    @jax.jit
    def both(zero):
        found = second_derivatives(of_t, zeros)
        unknown.append(found.unknown)
        return found.derivatives, [
            jax.grad(jax.grad(of_t_alone))(zero)
            for of_t_alone in (lambda t: of_t(t, zero), lambda u: of_t(zero, u))
        ]

    found, expected = both(0.0)
    assert unknown[0].startswith(name)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


def test_what_does_not_move_may_be_anything():
    """Complex numbers, loops without a derivative and calls out of JAX, behind stop_gradient."""

    def fn(t):
        x = X + t * A
        fixed = jax.lax.stop_gradient(x)
        scale = jax.lax.while_loop(lambda s: jnp.sum(s) < 3, lambda s: s + fixed**2, fixed)
        scale += jnp.abs(jnp.fft.fft(fixed))
        scale += jax.pure_callback(np.sign, jax.ShapeDtypeStruct(X.shape, X.dtype), fixed)
        scale += jnp.sin(x).astype(jnp.int32).astype(x.dtype)
        return jnp.sum(scale * jnp.tanh(x))

    found = second_derivatives(fn, [jnp.zeros(())])
    assert found.unknown is None
    expected = jax.grad(jax.grad(fn))(0.0)
    np.testing.assert_allclose(found.derivatives, [expected], rtol=1e-12)


def test_what_counts_as_elementwise_is():
    """Each output depends on the inputs at its own place alone; else no chain would be one."""

    def call(name, x):
        if name in ("add", "div", "max", "min", "mul", "pow", "sub"):
            return getattr(jax.lax, name)(x, x * x)
        return {
            "convert_element_type": lambda: jax.lax.convert_element_type(x, "float32"),
            "copy": lambda: jnp.copy(x),
            "integer_pow": lambda: jax.lax.integer_pow(x, 3),
            "select_n": lambda: jax.lax.select_n(x > 0.4, x, x * x),
        }.get(name, lambda: getattr(jax.lax, name)(x))()

    x = jnp.asarray([0.3, 0.6, 0.7])
    functions = {name: functools.partial(call, name) for name in ELEMENTWISE}
    for name, fn in functions.items():
        assert name in names_in(jax.make_jaxpr(fn)(x))
    jacobians = jax.jit(lambda x: {name: jax.jacobian(fn)(x) for name, fn in functions.items()})(x)
    for name, jacobian in jacobians.items():
        diagonal = np.diag(jacobian)
        np.testing.assert_array_equal(jacobian, np.diag(diagonal), name)
        assert np.all(diagonal != 0), name


def test_one_directions_infinity_is_not_anothers():
    zeros = [jnp.zeros(())] * 3

    def fn(a, b, c):
        return jnp.sum(jnp.sqrt(a * X**2)) + jnp.sum(jnp.tanh(b * Y) @ A) + jnp.sum((c * X) ** 2)

    first, second, third = jax.jit(lambda: second_derivatives(fn, zeros).derivatives)()
    assert not np.isfinite(first)
    assert second == 0
    np.testing.assert_allclose(third, 2 * np.sum(X**2), rtol=1e-12)
