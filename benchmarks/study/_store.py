"""Results as JSON lines, one for each finished unit; what is there is never run again."""

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

import lama_optax

Line = dict[str, Any]

PACKAGES = ("jax", "optax", "flax", "numpy", "scikit-learn")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those that it stands on."""
    ours = {"python": platform.python_version(), "lama_optax": lama_optax.__version__}
    return ours | {name: importlib.metadata.version(name) for name in PACKAGES}


def unit_id(**settings: Any) -> str:
    """The name of a unit: a hash of everything that decides its result, but for versions."""
    text = json.dumps(plain(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Store:
    """The lines of one workload; a new one is on the disk before `add` returns."""

    def __init__(self, directory: Path, workload: str) -> None:
        self.path = directory / f"{workload}.jsonl"
        self.lines: list[Line] = []
        if self.path.exists():
            self._load()
        self._by_id = {line["id"]: line for line in self.lines}

    def _load(self) -> None:
        """Reads the lines; one cut short by a crash, the last, is dropped from the file too."""
        kept = 0
        content = self.path.read_bytes()
        for raw in content.splitlines(keepends=True):
            try:
                line = json.loads(raw)
            except ValueError:
                line = None
            if line is None or not raw.endswith(b"\n"):
                if kept + len(raw) != len(content):
                    raise ValueError(
                        f"{self.path} is damaged at byte {kept}: move the file away, or delete the"
                        " line there; what it held is run again."
                    )
                os.truncate(self.path, kept)
                return
            kept += len(raw)
            self.lines.append(line)

    def get(self, identity: str) -> Line | None:
        """The finished unit of that name."""
        return self._by_id.get(identity)

    def find(self, **values: Any) -> list[Line]:
        """The lines whose fields have these values, in the order in which they were added."""
        return [
            line
            for line in self.lines
            if all(line.get(field) == value for field, value in values.items())
        ]

    def add(self, line: Line) -> Line:
        """Appends one unit and waits until it is on the disk."""
        line = plain(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)
        self._by_id[line["id"]] = line
        return line


def plain(value: Any) -> Any:
    """JSON's types; numbers to six digits, those that are not finite as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(np.asarray(value).tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
