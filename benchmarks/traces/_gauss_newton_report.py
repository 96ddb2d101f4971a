"""What the measurements of the Gauss-Newton trace say, as numbers and as a text."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.lab._jobs import Models, Outcome, pick
from benchmarks.lab._tables import table
from benchmarks.traces._jax import EXACT, FISHER, TEN_SAMPLES
from benchmarks.traces._report import contenders as contenders_table
from benchmarks.traces._report import peers
from benchmarks.traces._summary import compile_seconds, contenders, merge, std_error
from lama_optax import layer_names

NOTES = """\
compile: tracing and compilation. n: independent estimates. gradients: time over that of a gradient
in the same framework, median over blocks of rounds in which all took turns. sd: standard deviation
of one estimate over the layer's trace. work: time x variance, over that of fisher, median over the
layers. z: largest distance, over the layers, of the mean from the reference, in standard errors.
The reference is gauss_newton's exact trace; on the transformer the mean of many estimates that draw
random signs at the outputs, for each sequence by itself."""


def summarize(outcomes: Sequence[Outcome], models: Models) -> dict[str, Any]:
    """Everything that the tables and pictures show."""
    result = {}
    for name, task in models.tasks.items():
        layers = layer_names(models[name].params)
        blocks = [result for _, result in pick(outcomes, section="gauss-newton", model=name)]
        reference = _reference(outcomes, "gauss-newton", name)
        if "error" not in blocks[0][EXACT]:
            reference = None  # the exact one is the best
        found = contenders(blocks, len(layers), reference)
        hessian = _reference(outcomes, "hessian", name)
        assert hessian is not None
        result[name] = {
            "title": task.title,
            "layers": layers,
            **found,
            "compile": compile_seconds(outcomes, "gauss-newton", name),
            "hessian": {"trace": hessian[0], "trace_error": hessian[1]},
            "over_hessian": found["trace"] / hessian[0],
        }
    return {"models": result}


def _reference(
    outcomes: Sequence[Outcome], matrix: str, model: str
) -> tuple[np.ndarray, np.ndarray] | None:
    found = pick(outcomes, section="reference", matrix=matrix, model=model)
    if not found:
        return None
    merged = merge([result for _, result in found])
    return merged["mean"], std_error(merged)


def report(summary: dict[str, Any]) -> str:
    """The tables, model by model."""
    sections = []
    for model in summary["models"].values():
        sections.append(contenders_table(model, FISHER))
        sections.append(peers(model, (FISHER, TEN_SAMPLES), FISHER))
    return "\n\n".join([*sections, NOTES, _over_hessian(summary["models"])])


def _over_hessian(models: dict[str, Any]) -> str:
    rows = []
    for name, model in models.items():
        ratio = model["over_hessian"]
        known = model["trace_error"] / model["trace"]
        error = np.hypot(known, model["hessian"]["trace_error"] / model["hessian"]["trace"])
        figures = (np.median(ratio), ratio.min(), ratio.max())
        rows.append([name, *(f"{x:.3f}" for x in figures), f"{np.median(error):.3f}"])
    header = ["", "median layer", "least", "most", "standard error"]
    return f"Gauss-Newton trace over the Hessian's\n{table(header, rows)}"
