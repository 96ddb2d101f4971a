"""Estimates of every layer's trace in PyTorch: curvlinops' and PyHessian's own calls."""

import importlib.util
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.traces._jax import Estimate, Maker
from benchmarks.workbench._environment import NOT_INSTALLED
from benchmarks.workbench._models import Model

if TYPE_CHECKING:
    from benchmarks.workbench._torch import TorchModel


def makers() -> dict[str, Maker]:
    """Every contender that runs in PyTorch."""
    return {
        "curvlinops, diagonal by layer": _in_torch("curvlinops", _curvlinops_diagonal),
        "curvlinops, a layer at a time": _in_torch("curvlinops", _curvlinops_blocks),
        "PyHessian, v * Hv by layer": _in_torch("pyhessian", _pyhessian(1)),
        "PyHessian, K=10": _in_torch("pyhessian", _pyhessian(10)),
    }


def gradient(model: Model) -> Callable[[], object]:
    """One gradient in PyTorch."""
    return _model(model, "torch").gradient


def _model(model: Model, package: str) -> "TorchModel":
    for name in ("torch", package):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(NOT_INSTALLED)
    from benchmarks.workbench._torch import TorchModel

    return TorchModel(model)


def _in_torch(package: str, make: Callable[["TorchModel"], Callable[[], list[float]]]) -> Maker:
    def made(model: Model) -> Estimate:
        estimate = make(_model(model, package))
        import torch

        def of_seed(seed: int) -> np.ndarray:
            torch.manual_seed(seed)
            return np.asarray(estimate(), np.float64)

        return of_seed

    return made


def _operator(model: "TorchModel", parameters: list[Any]) -> Any:
    from curvlinops import HessianLinearOperator

    data = [(model.inputs, model.targets)]
    # The check costs several products; the losses were compared when the model was built.
    return HessianLinearOperator(
        model.network, model.criterion, parameters, data, check_deterministic=False
    )


def _curvlinops_diagonal(model: "TorchModel") -> Callable[[], list[float]]:
    """Its Hutchinson diagonal of the whole Hessian, summed by layer."""
    from curvlinops import hutchinson_diag

    sizes = [sum(p.numel() for p in layer) for layer in model.network.layers.values()]

    def estimate() -> list[float]:
        diagonal = hutchinson_diag(_operator(model, model.parameters), 1)
        return [float(part.sum()) for part in diagonal.split(sizes)]

    return estimate


def _curvlinops_blocks(model: "TorchModel") -> Callable[[], list[float]]:
    """Its Hutchinson trace of each layer's own operator."""
    from curvlinops import hutchinson_trace

    def estimate() -> list[float]:
        layers = model.network.layers.values()
        return [float(hutchinson_trace(_operator(model, layer), 1)) for layer in layers]

    return estimate


def _pyhessian(num_probes: int) -> Callable[["TorchModel"], Callable[[], list[float]]]:
    """Its product with the Hessian and its signs; its own trace adds all layers up."""

    def make(model: "TorchModel") -> Callable[[], list[float]]:
        import torch
        from pyhessian import hessian
        from pyhessian.utils import hessian_vector_product

        number = {id(p): i for i, layer in enumerate(model.network.layers.values()) for p in layer}

        def estimate() -> list[float]:
            model.network.zero_grad(set_to_none=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # create_graph's reference cycle
                data = (model.inputs, model.targets)
                found = hessian(model.network, model.criterion, data=data, cuda=False)
            traces = [0.0] * len(model.network.layers)
            for _ in range(num_probes):
                probe = [torch.randint_like(p, high=2) * 2 - 1 for p in found.params]
                product = hessian_vector_product(found.gradsH, found.params, probe)
                for p, v, hv in zip(found.params, probe, product, strict=True):
                    traces[number[id(p)]] += float(torch.sum(v * hv)) / num_probes
            model.network.zero_grad(set_to_none=True)
            return traces

        return estimate

    return make
