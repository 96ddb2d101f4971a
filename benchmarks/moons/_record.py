"""What a result must carry to be repeated: versions, machine, settings; and how it is saved."""

import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lama_optax
from benchmarks.moons._settings import available_cores

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "scipy", "scikit-learn")


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those that it stands on."""
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    ours = {"python": platform.python_version(), "lama_optax": lama_optax.__version__}
    return ours | installed


def machine() -> dict[str, str | int | float]:
    """What the seconds depend on."""
    return {
        "processor": _processor(),
        "cores": available_cores(),
        # Above the number of cores, others were at work too and the seconds are too many.
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan,
        "system": f"{platform.system()} {platform.machine()}",
        "jax_devices": f"{jax.device_count()} x {jax.devices()[0].platform}",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def save_json(path: Path, results: dict[str, Any]) -> None:
    """Writes ``results`` as JSON; numbers to six digits, those that are not finite as null."""
    path.write_text(json.dumps(_plain(results), indent=1) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
