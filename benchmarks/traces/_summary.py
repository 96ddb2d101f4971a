"""What the measurements say: variances and work."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.lab._jobs import Models, Outcome, pick
from benchmarks.lab._timing import Spread
from benchmarks.traces._jax import OWN
from benchmarks.traces._measure import (
    GRADIENT,
    STEPS,
    TORCH_GRADIENT,
    default_flipout,
    in_torch,
)
from lama_optax import layer_names


def summarize(outcomes: Sequence[Outcome], models: Models) -> dict[str, Any]:
    """Everything that the tables and pictures show."""
    by_model: dict[str, Any] = {}
    for name, task in models.tasks.items():
        blocks = [result for _, result in pick(outcomes, section="traces", model=name)]
        layers = layer_names(models[name].params)
        by_model[name] = {
            "title": task.title,
            "layers": layers,
            **contenders(blocks, len(layers)),
            "flipout": default_flipout(len(layers)),
            "compile": compile_seconds(outcomes, "hessian", name),
        }
    return {"models": by_model}


def is_peer(label: str) -> bool:
    """Whether the contender is of another library."""
    return label not in OWN and label not in (GRADIENT, TORCH_GRADIENT, *STEPS)


def compile_seconds(outcomes: Sequence[Outcome], matrix: str, model: str) -> dict[str, float]:
    """Seconds to compile the contenders of a matrix; empty where they were not measured."""
    found = pick(outcomes, section="compile", matrix=matrix, model=model)
    return found[0].result if found else {}


def contenders(
    blocks: Sequence[dict[str, Any]],
    num_layers: int,
    reference: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, Any]:
    """All contenders, held against a reference (traces, standard errors) or the best of them."""
    merged = {label: merge([block[label] for block in blocks]) for label in blocks[0]}
    estimates = {
        label: found
        for label, found in merged.items()
        if "error" not in found and np.ndim(found["mean"])
    }
    # Of each layer, the mean that is known best.
    errors = np.stack([std_error(found) for found in estimates.values()])
    means = np.stack([found["mean"] for found in estimates.values()])
    best = np.nanargmin(errors, axis=0)
    trace, error = means[best, range(num_layers)], errors[best, range(num_layers)]
    if reference is not None:
        trace, error = reference
    for label, found in merged.items():
        if "error" in found:
            continue
        gradient = merged[TORCH_GRADIENT if in_torch(label) else GRADIENT]
        found["gradients"] = _block_ratios(found, gradient)
        if label not in estimates:
            continue
        found["sd"] = np.sqrt(found["squares"] / (found["count"] - 1)) / abs(trace)
        is_best = [label == list(estimates)[i] for i in best]
        own = np.asarray(is_best) & (reference is None)
        with np.errstate(invalid="ignore"):  # 0/0 where this is the exact one
            apart = abs(found["mean"] - trace) / np.hypot(std_error(found), error)
        found["largest_z"] = float(np.max(np.where(own, 0, apart)))
        found["work"] = found["median_seconds"] * found["sd"] ** 2
    for label in estimates:
        found = merged[label]
        found["vs_peers"] = {} if is_peer(label) else _against_peers(found, merged)
    return {"trace": trace, "trace_error": error, "contenders": merged}


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Adds up the running sums of several blocks (Chan et al.)."""
    if any("error" in part for part in parts):
        return {"error": next(part["error"] for part in parts if "error" in part)}
    count, mean, squares = 0, np.zeros(()), np.zeros(())
    for part in parts:
        if part["count"] == 0:
            continue
        step = np.asarray(part["mean"], np.float64) - mean
        total = count + part["count"]
        squares = squares + part["squares"] + step**2 * (count * part["count"] / total)
        mean = mean + step * (part["count"] / total)
        count = total
    medians = [float(np.median(p["seconds"])) if p["seconds"] else math.nan for p in parts]
    seconds = [s for part in parts for s in part["seconds"]] or [math.nan]
    return {
        "count": count,
        "mean": mean,
        "squares": squares,
        "median_seconds": float(np.median(seconds)),
        "seconds": Spread.of(seconds),
        "block_seconds": medians,
    }


def std_error(found: dict[str, Any]) -> np.ndarray:
    """Of the mean of a contender's estimates."""
    count = found["count"]
    if count < 2:
        return np.full_like(np.asarray(found["mean"], np.float64), np.inf)
    return np.sqrt(found["squares"] / (count - 1) / count)


def _block_ratios(found: dict[str, Any], reference: dict[str, Any]) -> Spread | None:
    """Time over the reference's, the median over blocks in which they took turns."""
    if "error" in reference:
        return None
    ratios = np.divide(found["block_seconds"], reference["block_seconds"])
    return Spread.of(ratios[np.isfinite(ratios)].tolist())


def _against_peers(found: dict[str, Any], merged: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times more work each peer needs, the median over layers, in two units of time."""
    result = {}
    for label, peer in merged.items():
        if "error" in peer or not is_peer(label):
            continue
        with np.errstate(divide="ignore"):  # without variance: infinitely many times
            variances = np.median(peer["sd"] ** 2 / found["sd"] ** 2)
        seconds = peer["median_seconds"] / found["median_seconds"]
        gradients = peer["gradients"].median / found["gradients"].median
        result[label] = {"seconds": variances * seconds, "gradients": variances * gradients}
    return result


def best_peer(found: dict[str, Any]) -> tuple[str, float] | None:
    """The peer that needs least work, in the unit of time that suits it best."""
    ratios = {label: min(units.values()) for label, units in found["vs_peers"].items()}
    return min(ratios.items(), key=lambda item: item[1]) if ratios else None
