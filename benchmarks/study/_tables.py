"""Workloads on scikit-learn's data: digits by three networks, breast cancer, wine, diabetes."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from sklearn.model_selection import train_test_split

from benchmarks.study._workload import Workload, apply_mlp, batch_order, lecun_mlp, take_batch

PyTree = Any


@functools.cache
def _load(name: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return np.asarray(x, np.float32), np.asarray(y)


def _hash(name: str) -> str:
    x, y = _load(name)
    return hashlib.sha256(x.tobytes() + y.astype(np.float64).tobytes()).hexdigest()


def _make(seed: int, *, name: str, batch: int, steps: int, target: str) -> tuple[dict, np.ndarray]:
    """60 % to train, 20 % to select, 20 % to test; standardised by the training part."""
    x, y = _load(name)
    classes = y if target == "class" else None
    rest, test = train_test_split(
        np.arange(len(x)), test_size=0.2, random_state=seed, stratify=classes
    )
    train, validation = train_test_split(
        rest,
        test_size=0.25,
        random_state=seed,
        stratify=None if classes is None else classes[rest],
    )
    mean, std = x[train].mean(axis=0), x[train].std(axis=0)
    # Pixels that are the same in every training image carry nothing.
    scaled = (x - mean) / np.where(std > 0, std, 1)
    if name == "digits":
        scaled = np.clip(scaled, -4, 4)  # a pixel that is rarely inked can be 30 deviations off
    scaled = scaled.astype(np.float32)
    if target == "number":
        y = ((y - y[train].mean()) / y[train].std()).astype(np.float32)
    elif target == "image":
        y = (x / 16).astype(np.float32)
        scaled = y
    else:
        y = y.astype(np.int32)
    parts = {"train": train, "validation": validation, "test": test}
    data = {part: {"x": scaled[rows], "y": y[rows]} for part, rows in parts.items()}
    order = batch_order(np.random.default_rng(seed), len(train), batch, steps)
    return data, order


def _cross_entropy(apply: Callable, params: PyTree, batch: PyTree) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(apply(params, batch["x"]), batch["y"])
    return jnp.mean(losses)


def _squared_error(apply: Callable, params: PyTree, batch: PyTree) -> jax.Array:
    outputs = apply(params, batch["x"]).reshape(batch["y"].shape)
    return jnp.mean((outputs - batch["y"]) ** 2)


def _judge_class(apply: Callable, params: PyTree, part: PyTree) -> tuple[jax.Array, jax.Array]:
    right = jnp.argmax(apply(params, part["x"]), axis=-1) == part["y"]
    return _cross_entropy(apply, params, part), jnp.mean(right)


def _judge_number(apply: Callable, params: PyTree, part: PyTree) -> tuple[jax.Array, jax.Array]:
    loss = _squared_error(apply, params, part)
    return loss, jnp.sqrt(loss)


def _patches(x: jax.Array) -> jax.Array:
    """3 x 3 neighbourhoods of images (N, H, W, C): (N, H - 2, W - 2, 9 C).

    A convolution is then one matrix product, which runs many times faster than XLA's
    convolution where, as here, every run of a batch of runs has weights of its own.
    """
    height, width = x.shape[1] - 2, x.shape[2] - 2
    shifted = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1)


def _pool(x: jax.Array) -> jax.Array:
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def _apply_cnn(params: PyTree, x: jax.Array) -> jax.Array:
    """Two 3 x 3 convolutions of 8 and 16 channels, mean pooling between, a dense layer."""
    first, second, dense = (params[name] for name in ("Conv_0", "Conv_1", "Dense_0"))
    x = x.reshape(-1, 8, 8, 1)
    x = _pool(jax.nn.relu(_patches(x) @ first["kernel"] + first["bias"]))  # (N, 3, 3, 8)
    x = jax.nn.relu(_patches(x) @ second["kernel"] + second["bias"])  # (N, 1, 1, 16)
    return x.reshape(len(x), -1) @ dense["kernel"] + dense["bias"]


def _init_cnn(key: jax.Array) -> PyTree:
    shapes = {"Conv_0": (9, 8), "Conv_1": (72, 16), "Dense_0": (16, 10)}
    keys = jax.random.split(key, len(shapes))
    return {
        name: {
            # He's variance before a ReLU.
            "kernel": jax.random.normal(k, shape) * jnp.sqrt(2 / shape[0]),
            "bias": jnp.zeros(shape[1]),
        }
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _table(
    name: str,
    source: str,
    target: str,
    init: Callable,
    apply: Callable = apply_mlp,
    *,
    steps: int,
    batch: int,
    cost: float,
    tune_seeds: int = 10,
    final_seeds: int = 200,
) -> Workload:
    is_class = target == "class"
    return Workload(
        name=name,
        metric_name="accuracy" if is_class else "root mean squared error",
        steps=steps,
        batch_size=batch,
        trials=24,
        tune_seeds=tune_seeds,
        final_seeds=final_seeds,
        chunk=120,
        step_microseconds=cost,
        make=functools.partial(_make, name=source, batch=batch, steps=steps, target=target),
        init=init,
        loss=functools.partial(_cross_entropy if is_class else _squared_error, apply),
        evaluate=functools.partial(_judge_class if is_class else _judge_number, apply),
        prepare=take_batch,
        data_hash=_hash(source),
    )


def table_workloads() -> list[Workload]:
    """The six workloads on scikit-learn's data."""

    def mlp(*sizes: int) -> Callable:
        return functools.partial(lecun_mlp, sizes=sizes)

    coder = mlp(64, 32, 8, 32, 64)
    return [
        _table("digits_mlp", "digits", "class", mlp(64, 32, 10), steps=300, batch=32, cost=30),
        _table(
            *("digits_cnn", "digits", "class", _init_cnn, _apply_cnn),
            steps=200,
            batch=32,
            cost=250,
            tune_seeds=5,
            final_seeds=100,
        ),
        _table(
            "digits_autoencoder",
            "digits",
            "image",
            coder,
            steps=300,
            batch=32,
            cost=60,
            tune_seeds=5,
        ),
        _table(
            "breast_cancer", "breast_cancer", "class", mlp(30, 16, 2), steps=100, batch=32, cost=12
        ),
        _table("wine", "wine", "class", mlp(13, 16, 3), steps=100, batch=16, cost=12),
        _table("diabetes", "diabetes", "number", mlp(10, 16, 1), steps=160, batch=32, cost=12),
    ]
