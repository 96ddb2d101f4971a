"""BackPACK's diagonal of the Gauss-Newton matrix, from targets that are drawn from the outputs.

It squares the gradient of every example before it sums, for modules that it knows: the networks
without attention, built of them here. Import it only where torch is installed.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks.lab._models import CNN, Transformer

if TYPE_CHECKING:
    from benchmarks.lab._torch import TorchModel


def diagonal(model: "TorchModel") -> Callable[[], list[float]]:
    """Its Monte-Carlo diagonal, one draw, summed by layer."""
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNMC

    modules, layers = _modules(model)
    network, criterion = extend(nn.Sequential(*modules)), extend(model.criterion)
    outputs, expected = network(model.inputs), model.network(model.inputs)
    targets = model.targets.reshape(outputs.shape) if outputs.shape[-1] == 1 else model.targets
    torch.testing.assert_close(outputs, expected.reshape(outputs.shape), rtol=1e-4, atol=1e-4)

    def estimate() -> list[float]:
        loss = criterion(network(model.inputs), targets)
        with backpack(DiagGGNMC(mc_samples=1)), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # hooks, where no input has a gradient
            loss.backward()
        network.zero_grad(set_to_none=True)
        return [sum(float(p.diag_ggn_mc.sum()) for p in layer.parameters()) for layer in layers]

    return estimate


def _modules(model: "TorchModel") -> tuple[list[nn.Module], list[nn.Module]]:
    """The network's modules in their order, and of these the ones with parameters."""
    leaves, network = model.network.leaves, model.network.network
    modules: list[nn.Module] = []
    layers: list[nn.Module] = []
    if isinstance(network, CNN):
        from backpack.custom_module.permute import Permute

        modules.append(Permute(0, 3, 1, 2))
        for i, stride in enumerate((1, 2)):
            # "SAME" for sides that 2 divides: what is left over is padded at the end.
            modules.append(nn.ZeroPad2d((1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)))
            kernel, bias = leaves[f"Conv_{i}-kernel"], leaves[f"Conv_{i}-bias"]
            layer = nn.Conv2d(kernel.shape[2], kernel.shape[3], 3, stride)
            layers.append(_with(layer, kernel.permute(3, 2, 0, 1), bias))
            modules += [layer, nn.ReLU()]
        modules.append(Permute(0, 2, 3, 1))
    elif isinstance(network, Transformer):
        raise ValueError("attention and LayerNorm are not among its modules")
    modules.append(nn.Flatten())
    count = sum(name.startswith("Dense") and name.endswith("kernel") for name in leaves)
    for i in range(count):
        kernel, bias = leaves[f"Dense_{i}-kernel"], leaves[f"Dense_{i}-bias"]
        layers.append(_with(nn.Linear(*kernel.shape), kernel.T, bias))
        modules += [layers[-1], nn.ReLU()]
    return modules[:-1], layers


def _with(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    layer.weight.data = weight.detach().clone().contiguous()
    layer.bias.data = bias.detach().clone()
    return layer
