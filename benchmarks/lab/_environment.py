"""What the numbers depend on beside the settings: versions and machine."""

import importlib.metadata
from typing import Any

from benchmarks.moons._record import machine, versions

#: Peers that are measured where they are installed.
PEERS = (
    "matfree",
    "traceax",
    "torch",
    "curvlinops-for-pytorch",
    "backpack-for-pytorch",
    "PyHessian",
    "pytorch_optimizer",
)

NOT_INSTALLED = "not installed: pip install '.[peers]'"


def context() -> dict[str, Any]:
    """Versions and machine, without what changes from minute to minute."""
    here = machine()
    del here["load_average"]
    return {"versions": versions() | peer_versions(), "machine": here}


def peer_versions() -> dict[str, str]:
    """The versions of the peers that are installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
