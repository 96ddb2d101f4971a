"""Brings the models to where curvature is of interest: trained parameters, kept in a file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from benchmarks.lab._data import KNOWN_TEXTS, text
from benchmarks.lab._models import Model, Params, Task


def trained(task: Task, folder: Path) -> Model:
    """The task after its training by `optax.adam`, from ``folder`` if it was trained before."""
    path = folder / f"{task.name}.npz"
    settings = json.dumps(describe(task), sort_keys=True)
    start = task.init()
    batch = task.minibatch(task.training_steps)  # a batch that follows the training's
    leaves, structure = jax.tree.flatten(start)
    if path.exists():
        with np.load(path) as file:
            if str(file["settings"]) == settings:
                kept = [jax.numpy.asarray(file[f"leaf{i}"]) for i in range(len(leaves))]
                return Model(task, jax.tree.unflatten(structure, kept), batch)
    params = _train(task, start)
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(params))
    }
    partial = path.with_suffix(".partial")
    with partial.open("wb") as target:
        np.savez(target, settings=np.asarray(settings), **arrays)
    partial.rename(path)  # whole or not at all
    return Model(task, params, batch)


def describe(task: Task) -> dict[str, Any]:
    """What trained parameters depend on, for the record."""
    record = {
        field.name: getattr(task, field.name)
        for field in dataclasses.fields(task)
        if field.name not in ("network", "load")
    }
    record["network"] = repr(task.network)
    if task.loss == "tokens":
        record["text_sha256"] = text()[1]
    return record


def text_warning() -> str | None:
    """A sentence, if this Python ships another text than those whose results are kept."""
    digest = text()[1]
    if digest in KNOWN_TEXTS:
        return None
    return (
        f"The text of pydoc_data.topics is unknown here (SHA-256 {digest[:16]}...): the"
        " transformer's numbers cannot be compared to the digit with those kept, which are of"
        f" Python {' and '.join(KNOWN_TEXTS.values())}."
    )


def _train(task: Task, params: Params) -> Params:
    tx = optax.adam(task.learning_rate)

    @jax.jit
    def step(params: Params, state: Any, batch: Any) -> tuple[Params, Any]:
        grads = jax.grad(task.loss_fn)(params, batch)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for number in tqdm(range(task.training_steps), f"training {task.name}", disable=None):
        params, state = step(params, state, task.minibatch(number))
    return params
