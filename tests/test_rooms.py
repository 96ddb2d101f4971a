"""One room meets the parts of JAX that are not stable, and one file of it equations' params."""

import ast
import pathlib

import pytest

import lama_optax

PACKAGE = pathlib.Path(lama_optax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def _of(file):
    tree = ast.walk(ast.parse(file.read_text()))
    names, attributes = set(), set()
    for node in tree:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Attribute):
            attributes.add(node.attr)
    return names, attributes


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_one_room_meets_equations(file):
    names, attributes = _of(file)
    assert not any("jax._src" in name or "jax.interpreters" in name for name in names)
    if PACKAGE / "_jaxpr" not in file.parents:
        assert not any(name.startswith("jax.extend") for name in names)
        assert attributes.isdisjoint({"eqns", "invars", "outvars", "primitive", "bind"})
    if file != PACKAGE / "_jaxpr" / "operations.py":
        assert "params" not in attributes


def test_the_room_is_small():
    lines = {file: len(file.read_text().splitlines()) for file in FILES}
    room = {file: n for file, n in lines.items() if PACKAGE / "_jaxpr" in file.parents}
    assert sum(room.values()) <= 1000
    assert max(room.values()) < 350
