"""What the measurements say: variances and work."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.lab._jobs import Models, Outcome, pick
from benchmarks.lab._timing import Spread
from benchmarks.traces._jax import EXACT, HESSIAN
from benchmarks.traces._measure import GRADIENT, TORCH_GRADIENT, base, in_torch
from lama_optax import layer_names


def summarize(outcomes: Sequence[Outcome], models: Models) -> dict[str, Any]:
    """Everything that the tables and pictures show, by matrix and model."""
    matrices: dict[str, Any] = {}
    for matrix in dict.fromkeys(outcome.unit["matrix"] for outcome in outcomes):
        matrices[matrix] = {}
        for name, task in models.tasks.items():
            own = pick(outcomes, matrix=matrix, model=name)
            layers = layer_names(models[name].params)
            one = base(matrix, len(layers))
            ((_, compile_seconds),) = pick(own, section="compile")
            matrices[matrix][name] = {
                "title": task.title,
                "layers": layers,
                "base": one,
                "compile": compile_seconds,
                **_contenders(own, one),
            }
    return {"matrices": matrices, "over_hessian": _over_hessian(outcomes, matrices)}


def _contenders(outcomes: Sequence[Outcome], one: str) -> dict[str, Any]:
    """All contenders, held against the exact trace or the reference; ``one`` has work 1."""
    blocks = [result for _, result in pick(outcomes, section="traces")]
    merged = {label: merge([block[label] for block in blocks]) for label in blocks[0]}
    if "error" not in merged[EXACT]:
        trace, error = merged[EXACT]["mean"], np.zeros(())
    else:
        trace, error = _reference(outcomes)
    for label, found in merged.items():
        if "error" in found:
            continue
        gradient = merged[TORCH_GRADIENT if in_torch(label) else GRADIENT]
        found["gradients"] = _block_ratios(found, gradient)
        if not np.ndim(found["mean"]):
            continue
        found["sd"] = np.sqrt(found["squares"] / (found["count"] - 1)) / abs(trace)
        with np.errstate(invalid="ignore"):  # 0/0 where this is the exact one
            apart = abs(found["mean"] - trace) / np.hypot(_std_error(found), error)
        found["largest_z"] = float(np.max(np.nan_to_num(apart)))
    for found in merged.values():
        if "sd" in found:
            found["work"] = _work(found, merged[one])
    return {"trace": trace, "trace_error": error, "contenders": merged}


def _reference(outcomes: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    merged = merge([result for _, result in pick(outcomes, section="reference")])
    return merged["mean"], _std_error(merged)


def _over_hessian(outcomes: Sequence[Outcome], matrices: dict[str, Any]) -> dict[str, Any]:
    """The Gauss-Newton trace over the Hessian's, by layer, and its relative standard error."""
    result = {}
    for model, found in matrices.get("gauss-newton", {}).items():
        own = pick(outcomes, matrix=HESSIAN, model=model)
        if own:
            hessian, error = _reference(own)
            relative = np.hypot(found["trace_error"] / found["trace"], error / hessian)
            result[model] = {"ratio": found["trace"] / hessian, "error": relative}
    return result


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


def _std_error(found: dict[str, Any]) -> np.ndarray:
    """Of the mean of a contender's estimates."""
    return np.sqrt(found["squares"] / (found["count"] - 1) / found["count"])


def _block_ratios(found: dict[str, Any], reference: dict[str, Any]) -> Spread:
    """Time over the reference's, the median over blocks in which they took turns."""
    ratios = np.divide(found["block_seconds"], reference["block_seconds"])
    return Spread.of(ratios[np.isfinite(ratios)].tolist())


def _work(found: dict[str, Any], one: dict[str, Any]) -> dict[str, float]:
    """Time x variance over that of ``one``, the median over layers, in two units of time."""
    variances = np.median(found["sd"] ** 2 / one["sd"] ** 2)
    return {
        "seconds": float(variances * found["median_seconds"] / one["median_seconds"]),
        "gradients": float(variances * found["gradients"].median / one["gradients"].median),
    }
