"""Results as JSON lines: a measurement is kept when it ends, and what is kept is not run again."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Unit = dict[str, Any]


class Store:
    """One file; each line is a unit of work, what identifies it, and its result.

    A line holds the unit (what was measured, with every setting that its numbers depend on), the
    ``context`` that all units share (versions and machine), the result and its digest. The same
    unit under another context is another measurement, unless only this package's own version
    differs: which code measured a line is what the commit says that brought it.
    """

    def __init__(self, path: Path, context: dict[str, Any]):
        """Reads what ``path`` holds; a last line that an interruption cut short is dropped."""
        self.path, self.context = path, plain(context)
        self._results: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        content = path.read_bytes()
        whole, _, cut = content.rpartition(b"\n")
        if cut:
            with path.open("r+b") as file:
                file.truncate(len(content) - len(cut))
        for number, line in enumerate(whole.decode().splitlines(), 1):
            record = json.loads(line)
            # Lines of before have none.
            if record.get("digest", digest(record["result"])) != digest(record["result"]):
                raise ValueError(f"{path}, line {number}: the result is not that of its digest.")
            self._results[_key(record["unit"], record["context"])] = record["result"]

    def get(self, unit: Unit) -> Any | None:
        """The unit's result, or None if it was not measured."""
        return self._results.get(_key(plain(unit), self.context))

    def run(self, unit: Unit, measure: Callable[[], Any]) -> Any:
        """The unit's result, measured now unless it is there."""
        unit = plain(unit)
        key = _key(unit, self.context)
        if key not in self._results:
            result = plain(measure())
            record = {"unit": unit, "context": self.context, "result": result}
            record["digest"] = digest(result)
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._results[key] = result
        return self._results[key]


def _key(unit: Unit, context: dict[str, Any]) -> str:
    """What two lines of one measurement share: unit and context without our own version."""
    others = {k: v for k, v in context.get("versions", {}).items() if k != "lama_optax"}
    return digest([unit, context | {"versions": others}])


def digest(value: Any) -> str:
    """A hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """The value in JSON's types; numbers to six digits, those that are not finite as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def save_json(path: Path, results: dict[str, Any]) -> None:
    """Writes ``results`` for people to read: indented, as `plain` has it."""
    path.write_text(json.dumps(plain(results), indent=1) + "\n")


def save_results(
    folder: Path, context: dict[str, Any], name: str, summary: dict[str, Any], text: str
) -> None:
    """Writes NAME.json and NAME.txt, and prints the text."""
    save_json(folder / f"{name}.json", {"context": context, **summary})
    (folder / f"{name}.txt").write_text(text + "\n")
    print(f"\n{text}\n\nTables and pictures are in {folder}/.")
