"""What the numbers depend on beside the settings: versions and machine."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "scipy", "scikit-learn")
#: Peers that are measured where they are installed.
PEERS = (
    "matfree",
    "traceax",
    "torch",
    "curvlinops-for-pytorch",
    "backpack-for-pytorch",
)

NOT_INSTALLED = "not installed: pip install '.[peers]'"


def context() -> dict[str, Any]:
    """Versions and machine."""
    return {"versions": versions(), "machine": machine()}


def versions() -> dict[str, str]:
    """Versions of Python, of this package, of those that it stands on and of installed peers."""
    import lama_optax

    found = {"python": platform.python_version(), "lama_optax": lama_optax.__version__}
    found |= {name: importlib.metadata.version(name) for name in PACKAGES}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int]:
    """What the seconds depend on."""
    import jax

    return {
        "processor": _processor(),
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "jax_devices": f"{jax.device_count()} x {jax.devices()[0].platform}",
    }


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
