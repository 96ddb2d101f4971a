"""The matrix products that a loss makes, and the fewest more that an estimate of curvature needs.

What is counted are the products themselves: additions, activations and memory traffic come for
free, so that time above this floor is what an implementation could still win. With y = a b for
any product of the loss, a dot over a tangent and ybar the gradient with respect to y, an estimate
that may use all of the gradient's values needs

    ydot    = adot b + a bdot                      one product for each operand that is perturbed
    abardot = ybardot b^T + ybar bdot^T            the same, where a depends on parameters
    bbardot = ybardot a^T + ybar adot^T            the same, where b depends on parameters

For a weight b with probe V, bdot = V, and of bbardot only <V, bbardot> = <a V, ybardot> +
<adot V, ybar> is asked for: one more product, adot V, since a V is there already. A block estimate
perturbs one layer at a time and needs no gradient of its tangents: the second derivative along V is
the sum of ybar (2 adot bdot) over the products and of terms that need none.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

PRODUCTS = ("dot_general", "conv_general_dilated")
#: How often what they hold is run is not known from the program.
LOOPS = ("scan", "while", "cond")


class Source(NamedTuple):
    """What a value was computed from."""

    layers: frozenset[str] = frozenset()
    data: bool = False

    @property
    def weight(self) -> bool:
        """Made of parameters alone."""
        return bool(self.layers) and not self.data


class Product(NamedTuple):
    """One matrix product (or convolution) of the loss."""

    sources: tuple[Source, Source]
    shapes: tuple[Any, Any]  # of the operands
    multiply: Callable[[jax.Array, jax.Array], jax.Array]
    flops: int  # a multiplication and an addition are two


def products(fn: Callable[..., Any], layer_of_leaf: Sequence[str], *args: Any) -> list[Product]:
    """The products of ``fn(params, *data)``, whose parameters' leaves have the layers named."""
    closed = jax.make_jaxpr(fn)(*args)
    sources = [Source(frozenset([layer])) for layer in layer_of_leaf]
    sources += [Source(data=True)] * (len(closed.jaxpr.invars) - len(sources))
    found: list[Product] = []
    _walk(closed.jaxpr, sources, found)
    return found


def _walk(jaxpr: Any, sources: Sequence[Source], found: list[Product]) -> list[Source]:
    env: dict[Any, Source] = dict(zip(jaxpr.invars, sources, strict=True))

    def read(atom: Any) -> Source:
        return Source() if isinstance(atom, jex.Literal) else env.get(atom, Source())

    for eqn in jaxpr.eqns:
        ins = [read(atom) for atom in eqn.invars]
        inner = _inner(eqn)
        if eqn.primitive.name in LOOPS:
            raise NotImplementedError(f"products inside {eqn.primitive.name} are not counted")
        if inner:
            outs = _walk(inner[0], ins, found)
        else:
            if eqn.primitive.name in PRODUCTS:
                found.append(_product(eqn, ins[0], ins[1]))
            layers = frozenset[str]().union(*(source.layers for source in ins))
            outs = [Source(layers, any(source.data for source in ins))] * len(eqn.outvars)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _inner(eqn: Any) -> list[Any]:
    """The jaxprs in an equation's parameters, as they are called."""
    found = []
    for value in eqn.params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            found.append(inner)
    return found


def _product(eqn: Any, left: Source, right: Source) -> Product:
    shapes = tuple(atom.aval for atom in eqn.invars)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        depth = math.prod(shapes[0].shape[axis] for axis in contracted)
    else:  # every entry of the kernel but those along its output channels
        out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
        depth = shapes[1].size // shapes[1].shape[out_axis]
    flops = 2 * eqn.outvars[0].aval.size * depth

    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        return eqn.primitive.bind(a, b, **eqn.params)

    return Product((left, right), shapes, multiply, flops)


def gradient_products(product: Product) -> int:
    """Products that the gradient makes for one of the loss: itself, and one for each operand."""
    return 1 + sum(bool(source.layers) for source in product.sources)


def joint_products(product: Product) -> int:
    """The fewest more for an estimate that perturbs all layers at once."""
    count = sum(bool(source.layers) for source in product.sources)  # ydot
    for source, other in (product.sources, product.sources[::-1]):
        if source.weight:
            count += bool(other.layers)  # adot V
        elif source.layers:
            count += 1 + bool(other.layers)  # abardot
    return count


def block_products(product: Product, layer: str) -> int:
    """The fewest more for an estimate that perturbs one layer."""
    perturbed = [layer in source.layers for source in product.sources]
    return sum(perturbed) + all(perturbed)


def extra_products(found: Sequence[Product], scope: str, num_probes: int = 1) -> list[int]:
    """For each product of the loss, how many more of its size the estimate needs."""
    layers = frozenset[str]().union(*(s.layers for p in found for s in p.sources))
    if scope == "joint":
        return [num_probes * joint_products(product) for product in found]
    return [num_probes * sum(block_products(p, layer) for layer in layers) for p in found]


def isolated(product: Product) -> Callable[[], jax.Array]:
    """The product alone, compiled, on operands of its own."""
    keys = jax.random.split(jax.random.key(0))
    operands = [
        jax.random.normal(key, aval.shape, jnp.float32).astype(aval.dtype)
        for key, aval in zip(keys, product.shapes, strict=True)
    ]
    compiled = jax.jit(product.multiply).lower(*operands).compile()
    return lambda: jax.block_until_ready(compiled(*operands))
