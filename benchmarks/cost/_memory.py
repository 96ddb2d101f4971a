"""Memory: of the compiled estimates as K grows, and resident, each in a process of its own."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks.lab._jobs import Job, Models, Settings
from benchmarks.lab._models import Model
from benchmarks.lab._steps import (
    ADAM,
    PAPERS,
    Step,
    compiled_estimate,
    default_flipout,
    lama_label,
)
from benchmarks.lab._training import describe
from lama_optax import Estimator, flipout, hutchinson, layer_names

#: Models whose resident memory is measured: in the small ones the process itself hides it.
RESIDENT = ("mlp", "transformer")
PROBES = (1, 64)


def jobs(settings: Settings, models: Models) -> Iterator[Job]:
    """Units of the sections ``"probes"`` and ``"resident"``."""
    for name, task in models.tasks.items():
        for num_probes in PROBES:
            unit = {"model": name, "task": describe(task), "num_probes": num_probes}
            yield Job(
                {"section": "probes", **unit},
                functools.partial(_estimates, models, name, num_probes),
            )
        if name not in RESIDENT:
            continue
        for label in contenders(models[name], settings.quick):
            unit = {"model": name, "task": describe(task), "contender": label}
            yield Job(
                {"section": "resident", **unit},
                functools.partial(_resident, settings, models, name, label),
            )


def contenders(model: Model, quick: bool) -> list[str]:
    """Labels of the steps whose resident memory is measured."""
    flipout_ = default_flipout(len(layer_names(model.params)))
    estimators = [] if quick else [PAPERS, "K=1", flipout_]
    return [ADAM, *(lama_label(estimator, 1) for estimator in estimators)]


def _estimates(models: Models, name: str, num_probes: int) -> dict[str, int]:
    return {
        "hutchinson": temp_bytes(models[name], hutchinson(num_probes)),
        "flipout": temp_bytes(models[name], flipout(num_probes)),
    }


def temp_bytes(model: Model, estimator: Estimator) -> int:
    """Bytes that the compiled estimate needs beside its arguments and results."""
    return compiled_estimate(model, estimator).memory_analysis().temp_size_in_bytes


def _resident(settings: Settings, models: Models, name: str, label: str) -> dict[str, int]:
    models[name]  # trained and kept, so that the child need not train
    arguments = {"folder": str(models.folder), "quick": settings.quick, "model": name}
    return in_child("resident", arguments | {"label": label})


def in_child(what: str, arguments: dict[str, Any], devices: int | None = None) -> Any:
    """Measures in a new process; with ``devices``, on so many virtual ones."""
    environment = dict(os.environ)
    if devices is not None:
        flag = "--xla_force_host_platform_device_count"
        others = [f for f in environment.get("XLA_FLAGS", "").split() if not f.startswith(flag)]
        environment["XLA_FLAGS"] = " ".join([*others, f"{flag}={devices}"])
    command = [sys.executable, "-m", "benchmarks.cost._child", what, json.dumps(arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"the measurement of {what} {arguments} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def peak_of_step(model: Model, label: str, quick: bool) -> dict[str, int]:
    """Bytes resident before and, at most, while the step runs: call it in a new process."""
    from benchmarks.cost._steps import groups

    everything = {k: v for group, _ in groups(quick).values() for k, v in group.items()}
    step = Step(model, everything[label])
    jax.block_until_ready(step.compiled)
    reset_peak()
    before = resident_bytes()
    step.run(2)
    return {"before": before["now"], "peak": resident_bytes()["peak"]}


def reset_peak() -> None:
    """Forgets the peak of the compilation, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def resident_bytes() -> dict[str, int]:
    """Resident memory of this process: now, and its peak since `reset_peak`."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in fields and "VmRSS" in fields:
            return {
                "now": 1024 * int(fields["VmRSS"].split()[0]),
                "peak": 1024 * int(fields["VmHWM"].split()[0]),
            }
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    return {"now": peak, "peak": peak}
