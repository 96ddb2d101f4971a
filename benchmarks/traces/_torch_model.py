"""The same models in PyTorch, with the same parameters, for the peers that are written for it.

Import it only where torch is installed.
"""

import math
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.lab._models import CNN, Model, Transformer

Leaves = dict[str, torch.Tensor]


def _feed_forward(network: Any, layers: dict[str, Leaves]) -> nn.Sequential:
    """An MLP or a CNN of PyTorch's own modules, which BackPACK asks for; channels come first."""
    modules: list[nn.Module] = []
    for name, leaves in layers.items():
        kernel = leaves["kernel"]
        if name.startswith("Conv"):
            # "SAME" for sides that 2 divides: what is left over is padded at the end.
            first = name == "Conv_0"
            modules.append(nn.ZeroPad2d((1, 1, 1, 1) if first else (0, 1, 0, 1)))
            layer: Any = nn.Conv2d(*kernel.shape[2:], 3, 1 if first else 2)
            weight = kernel.permute(3, 2, 0, 1)
        else:
            if name == "Dense_0":
                modules.append(nn.Flatten())
                if isinstance(network, CNN):  # places, channels -> channels, places
                    places = kernel.unflatten(0, (-1, network.channels[1]))
                    kernel = places.transpose(0, 1).flatten(0, 1)
            layer, weight = nn.Linear(*kernel.shape), kernel.T
        layer.weight.data, layer.bias.data = weight.contiguous(), leaves["bias"]
        modules += [layer, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


class Decoder(nn.Module):  # type: ignore[misc]  # torch need not be installed
    """The transformer; kernels keep Flax's layout."""

    def __init__(self, depth: int, layers: dict[str, Leaves]):
        super().__init__()
        self.depth = depth
        self.leaves = nn.ParameterDict()
        for layer, leaves in layers.items():
            for name, leaf in leaves.items():
                # Names must be without dots and slashes.
                self.leaves[f"{layer}/{name}".replace("/", "-")] = nn.Parameter(leaf)

    def _dense(self, name: str, x: torch.Tensor) -> torch.Tensor:
        kernel, bias = self.leaves[f"{name}-kernel"], self.leaves[f"{name}-bias"]
        return x @ kernel + bias

    def _norm(self, number: int, x: torch.Tensor) -> torch.Tensor:
        name = f"LayerNorm_{number}"
        scale, bias = self.leaves[f"{name}-scale"], self.leaves[f"{name}-bias"]
        return functional.layer_norm(x, x.shape[-1:], scale, bias, 1e-6)

    def _attention(self, number: int, x: torch.Tensor) -> torch.Tensor:
        def project(what: str) -> torch.Tensor:
            name = f"MultiHeadDotProductAttention_{number}-{what}"
            kernel, bias = self.leaves[f"{name}-kernel"], self.leaves[f"{name}-bias"]
            heads = x @ kernel.flatten(1) + bias.flatten()
            return heads.unflatten(-1, kernel.shape[1:]).transpose(-2, -3)

        query, key, value = map(project, ("query", "key", "value"))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        mixed = (weights @ value).transpose(-2, -3).flatten(-2)
        name = f"MultiHeadDotProductAttention_{number}-out"
        kernel, bias = self.leaves[f"{name}-kernel"], self.leaves[f"{name}-bias"]
        return mixed @ kernel.flatten(0, 1) + bias

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits, with one row for each target."""
        positions = self.leaves["positions-embedding"]
        x = self.leaves["tokens-embedding"][tokens] + positions
        for i in range(self.depth):
            x = x + self._attention(i, self._norm(2 * i, x))
            h = self._dense(f"Dense_{2 * i}", self._norm(2 * i + 1, x))
            x = x + self._dense(f"Dense_{2 * i + 1}", functional.gelu(h, approximate="tanh"))
        return self._dense("head", self._norm(2 * self.depth, x)).flatten(0, 1)


class TorchModel:
    """A model in PyTorch: network, its parameters by layer, criterion and the batch as tensors."""

    def __init__(self, model: Model):
        """Raises `ValueError` unless the loss is that of the JAX model."""
        # XLA flushes them too; without this, trained ReLU networks are slower here.
        torch.set_flush_denormal(True)
        layers: dict[str, Leaves] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params["params"]):
            *layer, name = (entry.key for entry in path)
            layers.setdefault("/".join(layer), {})[name] = torch.from_numpy(np.array(leaf))
        task, network = model.task, model.task.network
        batch = [torch.from_numpy(np.array(array)) for array in model.batch]
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        if isinstance(network, Transformer):
            self.network: nn.Module = Decoder(network.depth, layers)
            tokens = batch[0].long()
            self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:].flatten()
        else:
            self.network = _feed_forward(network, layers)
            pictures = batch[0].ndim == 4
            self.inputs = batch[0].permute(0, 3, 1, 2) if pictures else batch[0]
            self.targets = batch[1].long()
        if task.loss == "binary":
            self.criterion, self.targets = nn.BCEWithLogitsLoss(), batch[1][:, None]
        own = iter(self.network.parameters())
        self.layers = {layer: [next(own) for _ in leaves] for layer, leaves in layers.items()}
        ours, theirs = float(model.value_fn(model.params)), float(self.loss().detach())
        if not abs(ours - theirs) <= 1e-4 * max(1.0, abs(ours)):
            raise ValueError(f"{model.name}: loss in JAX {ours}, in PyTorch {theirs}")

    def loss(self) -> Any:
        """The batch's mean loss."""
        return self.criterion(self.network(self.inputs), self.targets)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, layer by layer."""
        return list(self.network.parameters())

    def gradient(self) -> None:
        """One evaluation of the gradient."""
        torch.autograd.grad(self.loss(), self.parameters)
