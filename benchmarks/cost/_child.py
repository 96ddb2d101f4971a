"""What is measured in a process of its own: `python -m benchmarks.cost._child WHAT ARGUMENTS`.

The last line that it prints is the result as JSON. Arguments are JSON too.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.lab._models import tasks
from benchmarks.lab._store import plain
from benchmarks.lab._training import trained


def main(what: str, arguments: dict[str, Any]) -> Any:
    """The result of one measurement."""
    if what == "resident":
        from benchmarks.cost._memory import peak_of_step

        task = tasks(arguments["quick"])[arguments["model"]]
        model = trained(task, Path(arguments["folder"]))
        return peak_of_step(model, arguments["label"], arguments["quick"])
    if what == "growth":
        from benchmarks.cost._growth import times

        return times(**arguments)
    if what == "moons":
        from benchmarks.cost._moons import jax_seconds

        return jax_seconds(**arguments)
    raise ValueError(f"what must be resident, growth or moons; got {what!r}")


if __name__ == "__main__":
    print(json.dumps(plain(main(sys.argv[1], json.loads(sys.argv[2])))))
