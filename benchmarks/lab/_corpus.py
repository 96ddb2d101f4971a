"""Bytes to learn a language from: the source code of Optax, whose pinned version has it."""

import functools
import hashlib
import importlib.metadata
from pathlib import Path

import numpy as np
import optax

#: SHA-256 of all files in order, of the versions whose results are kept.
KNOWN = {"0.2.8": "3c35541c99b098f1c1b434f7818c17fece2faed92ccfcdc3a89232456ad757bd"}
VALUES = 256


@functools.cache
def _files() -> tuple[tuple[str, bytes], ...]:
    root = Path(optax.__file__).parent
    found = sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
    return tuple((name, path.read_bytes()) for name, path in found)


@functools.cache
def digest() -> str:
    """SHA-256 of the files' names and contents."""
    sums = hashlib.sha256()
    for name, content in _files():
        sums.update(name.encode() + b"\0" + content + b"\0")
    return sums.hexdigest()


def warning() -> str | None:
    """A sentence, if this Optax has another source than that whose results are kept."""
    version = importlib.metadata.version("optax")
    if KNOWN.get(version) == digest():
        return None
    return (
        f"The source of optax {version} (SHA-256 {digest()[:16]}...) is not that of the kept"
        f" results ({', '.join(KNOWN)}): figures cannot be compared to the digit."
    )


def split(seed: int = 0) -> dict[str, np.ndarray]:
    """Bytes for ``train`` (8 of 10 files), ``validation`` and ``test``; no file is in two."""
    files = [content for _, content in _files()]
    order = np.random.default_rng([seed, 7]).permutation(len(files))
    tenth = len(files) // 10
    parts = {"test": order[:tenth], "validation": order[tenth : 2 * tenth]}
    parts["train"] = order[2 * tenth :]
    return {
        name: np.frombuffer(b"".join(files[i] for i in rows), np.uint8)
        for name, rows in parts.items()
    }
