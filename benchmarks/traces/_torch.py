"""Estimates of every layer's trace in PyTorch: curvlinops' and BackPACK's own calls."""

import importlib.util
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.lab._environment import NOT_INSTALLED
from benchmarks.lab._models import Model
from benchmarks.traces._jax import GAUSS_NEWTON, HESSIAN, Estimate, Maker, of_few_layers

if TYPE_CHECKING:
    from benchmarks.traces._torch_model import TorchModel


def makers(matrix: str) -> dict[str, Maker]:
    """Every contender that estimates the matrix's traces in PyTorch."""
    operator = {HESSIAN: "HessianLinearOperator", GAUSS_NEWTON: "GGNLinearOperator"}[matrix]
    found = {
        "curvlinops, diagonal by layer": _curvlinops_diagonal(operator),
        "curvlinops, a layer at a time": _curvlinops_blocks(operator, "hutchinson_trace", 1),
        "curvlinops XTrace, 16 products": of_few_layers(_curvlinops_blocks(operator, "xtrace", 16)),
    }
    if matrix == GAUSS_NEWTON:
        found["BackPACK, diagonal by layer"] = backpack_diagonal()
    return found


def gradient(model: Model) -> Callable[[], object]:
    """One gradient in PyTorch."""
    return _model(model, "torch").gradient


def _model(model: Model, package: str) -> "TorchModel":
    for name in ("torch", package):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(NOT_INSTALLED)
    from benchmarks.traces._torch_model import TorchModel

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


def _operator(kind: str, model: "TorchModel", parameters: list[Any]) -> Any:
    import curvlinops

    data = [(model.inputs, model.targets)]
    # The check costs several products; the losses were compared when the model was built.
    return getattr(curvlinops, kind)(
        model.network, model.criterion, parameters, data, check_deterministic=False
    )


def _curvlinops_diagonal(kind: str) -> Maker:
    """Its Hutchinson diagonal of the whole matrix, summed by layer."""

    def make(model: "TorchModel") -> Callable[[], list[float]]:
        from curvlinops import hutchinson_diag

        sizes = [sum(p.numel() for p in layer) for layer in model.layers.values()]

        def estimate() -> list[float]:
            diagonal = hutchinson_diag(_operator(kind, model, model.parameters), 1)
            return [float(part.sum()) for part in diagonal.split(sizes)]

        return estimate

    return _in_torch("curvlinops", make)


def _curvlinops_blocks(kind: str, method: str, products: int) -> Maker:
    """Its estimators of the trace, of each layer's own operator."""

    def make(model: "TorchModel") -> Callable[[], list[float]]:
        import curvlinops

        estimator = getattr(curvlinops, method)

        def trace(layer: list[Any]) -> float:
            # XTrace's products must be fewer than the layer's parameters.
            count = min(products, max(1, 2 * (sum(p.numel() for p in layer) // 4)))
            return float(estimator(_operator(kind, model, layer), count))

        return lambda: [trace(layer) for layer in model.layers.values()]

    return _in_torch("curvlinops", make)


def backpack_diagonal() -> Maker:
    """BackPACK's Monte-Carlo diagonal of the Gauss-Newton matrix, one draw, summed by layer.

    It squares the gradient of every example before it sums, for modules that it knows.
    """

    def make(model: "TorchModel") -> Callable[[], list[float]]:
        from backpack import backpack, extend
        from backpack.extensions import DiagGGNMC
        from torch import nn

        if not isinstance(model.network, nn.Sequential):
            raise ValueError("attention and LayerNorm are not among its modules")
        network, criterion = extend(model.network), extend(model.criterion)

        def estimate() -> list[float]:
            loss = criterion(network(model.inputs), model.targets)
            with backpack(DiagGGNMC(mc_samples=1)), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # hooks, where no input has a gradient
                loss.backward()
            network.zero_grad(set_to_none=True)
            return [sum(float(p.diag_ggn_mc.sum()) for p in own) for own in model.layers.values()]

        return estimate

    return _in_torch("backpack", make)
