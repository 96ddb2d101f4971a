"""What a workload is: data and batches of a seed, a model, a loss and how it is judged."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

#: Training loss is that of the first examples of the training part, at most so many.
TRAIN_LOSS_EXAMPLES = 512


class Run(NamedTuple):
    """What one training run starts from; it depends on the seed alone, never on the optimizer."""

    data: dict[str, PyTree]  # "train", "validation", "test"
    batches: PyTree  # leading axis: the steps
    params: PyTree
    probe_key: Any  # shape=(2,), uint32; of the estimators' probes


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row of the study.

    `prepare` turns the batch of one step into what `loss` is evaluated on: the chosen examples,
    or the episodes of the policy as it stands. `evaluate` returns loss and metric of one part.
    """

    name: str
    metric_name: str
    steps: int
    batch_size: int
    trials: int  # per arm and round of tuning
    tune_seeds: int
    final_seeds: int
    chunk: int  # runs trained at once
    step_microseconds: float  # one gradient step of one run on one core, for estimates of time
    make: Callable[[int], tuple[dict[str, PyTree], PyTree]]  # seed -> data, batches
    init: Callable[[jax.Array], PyTree]
    loss: Callable[[PyTree, PyTree], jax.Array]
    evaluate: Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array]]
    prepare: Callable[[PyTree, dict[str, PyTree], PyTree], PyTree]
    independent_examples: bool = True  # whether `loss` is a mean over the batch's examples
    data_hash: str = ""
    needs: tuple[str, ...] = ()  # packages beyond the benchmarks' own


def take_batch(params: PyTree, data: dict[str, PyTree], indices: jax.Array) -> PyTree:
    """The examples of a mini-batch."""
    del params
    return jax.tree.map(lambda array: array[indices], data["train"])


def batch_order(rng: np.random.Generator, examples: int, batch: int, steps: int) -> np.ndarray:
    """Indices, shape (steps, batch): every epoch is a permutation, its remainder left out."""
    per_epoch = examples // batch
    epochs = -(-steps // per_epoch)
    order = [rng.permutation(examples)[: per_epoch * batch] for _ in range(epochs)]
    return np.concatenate(order).reshape(-1, batch)[:steps].astype(np.int32)


def make_run(workload: Workload, seed: int) -> Run:
    """Split, batch order, initial parameters and probe key of one seed."""
    data, batches = workload.make(seed)
    batches = jax.tree.map(lambda array: array[: workload.steps], batches)
    init_key, probe_key = jax.random.split(jax.random.key(seed))
    params = jax.device_get(workload.init(init_key))
    return Run(data, batches, params, np.asarray(jax.random.key_data(probe_key)))


def lecun_mlp(key: jax.Array, sizes: Sequence[int]) -> PyTree:
    """Dense layers as Flax names them; kernels of variance 1/fan_in, biases 0."""
    params = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        kernel = jax.random.normal(jax.random.fold_in(key, i), (fan_in, fan_out))
        params[f"Dense_{i}"] = {
            "kernel": kernel / jnp.sqrt(float(fan_in)),
            "bias": jnp.zeros(fan_out),
        }
    return params


def apply_mlp(params: PyTree, x: jax.Array, activation: Callable = jnp.tanh) -> jax.Array:
    """The network of `lecun_mlp`, linear in its last layer."""
    layers = list(params.values())
    for layer in layers[:-1]:
        x = activation(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]
