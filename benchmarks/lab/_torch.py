"""The same models in PyTorch, with the same parameters, for the peers that are written for it.

Import it only where torch is installed. Kernels keep Flax's layout, so that a leaf is a leaf.
"""

import math
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.lab._models import CNN, MLP, Model, Transformer


class Network(nn.Module):  # type: ignore[misc]  # torch need not be installed
    """A model of the workbench; its parameters are named as their leaves are in JAX."""

    def __init__(self, model: Model):
        super().__init__()
        self.network = model.task.network
        self.leaves = nn.ParameterDict()
        self.layers: dict[str, list[nn.Parameter]] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params["params"]):
            names = [entry.key for entry in path]
            # ParameterDict's names must be without dots and slashes.
            parameter = nn.Parameter(torch.from_numpy(np.array(leaf)))
            self.leaves["-".join(names)] = parameter
            self.layers.setdefault("/".join(names[:-1]), []).append(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, with one row for each target."""
        if isinstance(self.network, Transformer):
            return self._transformer(x)
        if isinstance(self.network, CNN):
            return self._cnn(x)
        x = x.flatten(1)
        for i in range(len(self.layers)):
            x = self._dense(f"Dense_{i}", x if i == 0 else functional.relu(x))
        return x if isinstance(self.network, MLP) else x[:, 0]

    def _dense(self, name: str, x: torch.Tensor) -> torch.Tensor:
        kernel, bias = self.leaves[f"{name}-kernel"], self.leaves[f"{name}-bias"]
        return x @ kernel + bias

    def _cnn(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 3, 1, 2)
        for i, stride in enumerate((1, 2)):
            # "SAME": what is left over is padded at the end.
            total = (math.ceil(x.shape[-1] / stride) - 1) * stride + 3 - x.shape[-1]
            x = functional.pad(x, [total // 2, total - total // 2] * 2)
            kernel = self.leaves[f"Conv_{i}-kernel"].permute(3, 2, 0, 1)
            x = functional.conv2d(x, kernel, self.leaves[f"Conv_{i}-bias"], stride)
            x = functional.relu(x)
        return self._dense("Dense_0", x.permute(0, 2, 3, 1).flatten(1))

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

    def _transformer(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = self.leaves["positions-embedding"]
        x = self.leaves["tokens-embedding"][tokens] + positions
        for i in range(self.network.depth):
            x = x + self._attention(i, self._norm(2 * i, x))
            h = self._dense(f"Dense_{2 * i}", self._norm(2 * i + 1, x))
            x = x + self._dense(f"Dense_{2 * i + 1}", functional.gelu(h, approximate="tanh"))
        return self._dense("head", self._norm(2 * self.network.depth, x)).flatten(0, 1)


class TorchModel:
    """A model in PyTorch: network, criterion and the batch as tensors."""

    def __init__(self, model: Model):
        """Raises `ValueError` unless the loss is that of the JAX model."""
        # XLA flushes them too; without this, trained ReLU networks are slower here.
        torch.set_flush_denormal(True)
        batch = [torch.from_numpy(np.array(array)) for array in model.batch]
        if model.task.loss == "tokens":
            tokens = batch[0].long()
            self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:].flatten()
        else:
            self.inputs = batch[0]
            self.targets = batch[1] if model.task.loss == "binary" else batch[1].long()
        binary = model.task.loss == "binary"
        self.criterion: nn.Module = nn.BCEWithLogitsLoss() if binary else nn.CrossEntropyLoss()
        self.network = Network(model)
        ours, theirs = float(model.value_fn(model.params)), float(self.loss().detach())
        if not abs(ours - theirs) <= 1e-4 * max(1.0, abs(ours)):
            raise ValueError(f"{model.name}: loss in JAX {ours}, in PyTorch {theirs}")

    def loss(self) -> Any:
        """The batch's mean loss."""
        return self.criterion(self.network(self.inputs), self.targets)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, layer by layer."""
        return [p for layer in self.network.layers.values() for p in layer]

    def gradient(self) -> None:
        """One evaluation of the gradient."""
        torch.autograd.grad(self.loss(), self.parameters)
