"""Evaluates a function while it follows some of its inputs, the weights, to where they are used.

A weight goes through transpose, reshape, conversion, multiplication by another array, calls,
`jax.checkpoint` and `jax.lax.scan`. At a product it is asked for the product's output. Every other
use gets the weight as an array, so the function keeps its value whatever it is made of.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, Optional

import jax

from lama_optax._jaxpr import operations
from lama_optax._jaxpr.interpret import apply, interpret, source
from lama_optax._jaxpr.operations import Movement, Product, Scan

PyTree = Any


class Followed(abc.ABC):
    """A weight on its way. Each method returns None where the weight itself must be used."""

    value: jax.Array

    @abc.abstractmethod
    def formed(self, why: str) -> jax.Array:
        """The weight as an array, for the use that ``why`` describes."""

    @abc.abstractmethod
    def multiplied(self, product: Product, activation: jax.Array, why: str) -> jax.Array | None:
        """What a product of the weight and an activation gives."""

    @abc.abstractmethod
    def moved(
        self, movement: Movement, change: Callable[[jax.Array], jax.Array], why: str
    ) -> Optional["Followed"]:
        """The weight after a change of its layout or dtype."""

    def scaled(self, change: Callable[[jax.Array], jax.Array]) -> Optional["Followed"]:
        """The weight after a multiplication of its entries by those of another array."""
        return None

    def scanned(self, scan: Scan, ins: Sequence["Value"], why: str) -> list[jax.Array] | None:
        """What a scan gives that the weight is an input of."""
        return None

    def in_checkpoint(self) -> Optional["Followed"]:
        """The same weight for use in a function that JAX will evaluate again."""
        return None


Value = jax.Array | Followed


def trace_example(fn: Callable[[PyTree, PyTree], jax.Array], params: PyTree, batch: PyTree) -> Any:
    """The jaxpr of ``fn(params, example)`` for one example of a batch, and what it returns."""
    found: list[Any] = []

    # Inside of `jax.vmap` an example has the sharding that JAX gives it.
    def traced(example: PyTree) -> None:
        found.append(jax.make_jaxpr(fn)(params, example))

    jax.eval_shape(jax.vmap(traced), batch)
    return found[0]


def evaluate(closed: Any, args: Sequence[Value]) -> list[jax.Array]:
    """Evaluates a jaxpr some of whose inputs are followed; its outputs are arrays."""
    outs = interpret(closed, args, _equation)
    return [formed(out, "the function returns it") for out in outs]


def formed(x: Value, why: str) -> jax.Array:
    """A value as an array."""
    return x.formed(why) if isinstance(x, Followed) else x


def _equation(jaxpr: Any, eqn: Any, ins: Sequence[Value]) -> Sequence[Value]:
    weights = [i for i, x in enumerate(ins) if isinstance(x, Followed)]
    if any(operations.varies_already(eqn, x.value if isinstance(x, Followed) else x) for x in ins):
        return ins
    if not weights:
        return apply(jaxpr, eqn, ins)
    why, first = source(eqn), ins[weights[0]]
    scan, checkpoint = operations.scan(eqn), operations.rematerialised(eqn)
    if checkpoint is not None:
        return _checkpointed(*checkpoint, ins, why)
    outs: Sequence[Value] | None = None
    if scan is not None and isinstance(first, Followed):
        outs = first.scanned(scan, ins, why)
    elif operations.is_plain(eqn):
        # Of two weights the smaller one is formed.
        place = max(weights, key=lambda i: eqn.invars[i].aval.size)
        ins = [x if i == place else formed(x, why) for i, x in enumerate(ins)]
        out = _used(jaxpr, eqn, ins, place, why)
        outs = None if out is None else [out]
    return apply(jaxpr, eqn, [formed(x, why) for x in ins]) if outs is None else outs


def _used(jaxpr: Any, eqn: Any, ins: Sequence[Value], place: int, why: str) -> Value | None:
    """What the one output of an equation is that uses one weight, by the rule for it."""
    weight = ins[place]
    assert isinstance(weight, Followed)

    def change(x: jax.Array) -> jax.Array:
        return apply(jaxpr, eqn, [x if i == place else other for i, other in enumerate(ins)])[0]

    product = operations.product(eqn, place)
    movement = operations.movement(eqn)
    if product is not None:
        activation = ins[1 - place]
        assert not isinstance(activation, Followed)
        return weight.multiplied(product, activation, why)
    if movement is not None:
        return weight.moved(movement, change, why)
    return weight.scaled(change) if operations.scales(eqn, place) else None


def _checkpointed(
    jaxpr: Any, checkpoint: Callable[..., Any], ins: Sequence[Value], why: str
) -> list[jax.Array]:
    """The user's `jax.checkpoint` stays in force."""
    inner = [x.in_checkpoint() or x.formed(why) if isinstance(x, Followed) else x for x in ins]
    return checkpoint(lambda: evaluate(jaxpr, inner))()
