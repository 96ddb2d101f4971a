"""Evaluates a function at perturbed parameters without forming one perturbed copy an example.

This file interprets the jaxpr of the function of one example, follows each weight through
transpose, reshape, convert, scan and nested calls to the products that use it, and perturbs there
(`rules`); under `jax.vmap` over examples each stays one matrix product. A use
without a rule gets the perturbed weight itself if it is small; a large one loses its signs, in all
its uses alike.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lama_optax._jaxpr.interpret import CALLS, apply, interpret
from lama_optax._jaxpr.weights.perturbed import Perturbed, Signs, Uses, Value, formed
from lama_optax._jaxpr.weights.rules import RULES


def evaluate(closed: Any, args: Sequence[Value]) -> list[jax.Array]:
    """Evaluates a jaxpr whose inputs may be perturbed weights; its outputs are arrays."""
    return [formed(out) for out in interpret(closed, args, _equation)]


def _equation(jaxpr: Any, eqn: Any, ins: Sequence[Value]) -> Sequence[Value]:
    if any(isinstance(x, Perturbed) for x in ins):
        if eqn.primitive.name in _INLINED:
            return interpret(eqn.params["jaxpr"], ins, _equation)
        rule = _RULES.get(eqn.primitive.name)
        outs = rule(eqn.params, *ins) if rule else None
        if outs is not None:
            return outs
    return apply(jaxpr, eqn, [formed(x) for x in ins])


def _scan(params: dict[str, Any], *ins: Value) -> list[Value]:
    if "num_consts" in params:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    else:
        num_consts, num_carry = (len(part) for part in params["ft_in"].unpack()[:2])
    consts = ins[:num_consts]
    carry = [formed(x) for x in ins[num_consts : num_consts + num_carry]]
    xs = ins[num_consts + num_carry :]
    weights = [x for x in ins if isinstance(x, Perturbed)]
    for x in weights:
        x.uses.add(x.leaf, repeated=any(x is const for const in consts))

    def body(carry: list[jax.Array], slices: list[Any]) -> tuple[list[jax.Array], list[jax.Array]]:
        uses = Uses(weights[0].uses.single, in_loop=True)
        shared = [x._replace(uses=uses) if isinstance(x, Perturbed) else x for x in consts]
        rows = [_row(x, part, uses) for x, part in zip(xs, slices, strict=True)]
        outs = evaluate(params["jaxpr"], [*shared, *carry, *rows])
        return outs[:num_carry], outs[num_carry:]

    carry, ys = jax.lax.scan(
        body,
        carry,
        [_rows(x) for x in xs],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _rows(x: Value) -> Any:
    """What `jax.lax.scan` slices along the leading axis."""
    if not isinstance(x, Perturbed):
        return x
    moved = [
        jnp.moveaxis(group.values, group.axes.index(0), 0) for group in x.signs if 0 in group.axes
    ]
    return x.value, x.probe, x.scale if x.scale.ndim else None, moved


def _row(x: Value, part: Any, uses: Uses) -> Value:
    """One slice of a perturbed weight, rebuilt from `_rows`."""
    if not isinstance(x, Perturbed):
        return part
    value, probe, scale, moved = part
    sliced = iter(moved)
    signs = tuple(
        Signs(
            group.origins,
            tuple(axis - 1 for axis in group.axes if axis != 0),
            next(sliced) if 0 in group.axes else group.values,
        )
        for group in x.signs
    )
    scale = x.scale if scale is None else scale.reshape(())
    return Perturbed(x.leaf, value, probe, scale, signs, uses)


_INLINED = (*CALLS, "remat2", "checkpoint", "remat")
_RULES: dict[str, Callable[..., Any]] = {**RULES, "scan": _scan}
