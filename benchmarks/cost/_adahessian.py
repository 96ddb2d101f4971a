"""AdaHessian, which PyTorch has, against PyTorch's own Adam in the same run."""

import functools
import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

from benchmarks.lab._environment import NOT_INSTALLED
from benchmarks.lab._jobs import Job, Models, Settings
from benchmarks.lab._models import Model
from benchmarks.lab._timing import Visit, interleave, repeat
from benchmarks.lab._training import describe

TORCH_ADAM = "torch.optim.Adam"


def jobs(settings: Settings, models: Models) -> Iterator[Job]:
    """Units of the section ``"torch"``."""
    if settings.quick:
        return
    timing: dict[str, Any] = {"rounds": 7, "window": 0.1, "seed": settings.seed}
    for name, task in models.tasks.items():
        unit = {"section": "torch", "model": name, "task": describe(task), **timing}
        yield Job(unit, functools.partial(_measure, models, name, **timing))


def _measure(models: Models, name: str, rounds: int, window: float, seed: int) -> dict[str, Any]:
    return times(models[name], rounds, window, seed)


def times(model: Model, rounds: int, window: float, seed: int) -> dict[str, Any]:
    """Seconds a step of each optimizer and round, or why there are none."""
    for package in ("torch", "pytorch_optimizer"):
        if importlib.util.find_spec(package) is None:
            return {"missing": NOT_INSTALLED}
    visits = {
        TORCH_ADAM: _visit(model, None),
        "AdaHessian, every 1": _visit(model, 1),
        "AdaHessian, every 10": _visit(model, 10),
    }
    for visit in visits.values():
        visit(0)
    return dict(interleave(visits, rounds, window, seed))


def _visit(model: Model, interval: int | None) -> Visit:
    """Whole intervals of steps; its own parameters, which go on from visit to visit."""
    import torch
    from pytorch_optimizer import AdaHessian

    from benchmarks.lab._torch import TorchModel

    torch_model = TorchModel(model)
    if interval is None:
        optimizer: Any = torch.optim.Adam(torch_model.parameters, lr=1e-3)
    else:
        optimizer = AdaHessian(torch_model.parameters, lr=1e-3, update_period=interval)
    steps = interval or 1

    def work() -> None:
        for number in range(steps):
            optimizer.zero_grad(set_to_none=True)
            # The graph of the gradient is built where AdaHessian will differentiate it.
            estimates = interval is not None and number == 0
            with warnings.catch_warnings():
                # "create_graph makes a reference cycle": zero_grad breaks it.
                warnings.simplefilter("ignore", UserWarning)
                torch_model.loss().backward(create_graph=estimates)
            optimizer.step()

    return repeat(work, steps)
