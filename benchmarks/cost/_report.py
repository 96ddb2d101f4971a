"""The tables that a person reads: printed, and kept in results.txt."""

from collections.abc import Sequence
from typing import Any

from benchmarks.lab._timing import Spread
from benchmarks.moons._report import table

NOTES = """\
Medians over rounds in which all contenders took turns; [least, most] in brackets. over Adam: the
median of the rounds' ratios to optax.adam's step. over floor: the step over the gradient's time and
that of the fewest matrix products which the estimate needs, each product timed alone; what the
step does beside products (activations, signs, the update itself) is above the floor by definition.
temp: memory that the compiled step needs beside its arguments and results."""


def report(summary: dict[str, Any]) -> str:
    """All tables, in the order in which their questions arise."""
    sections = [_steps(model) for model in summary["models"].values()]
    sections += [
        NOTES,
        _torch(summary["models"]),
        _probes(summary["models"]),
        _resident(summary["models"]),
        _growth(summary["growth"]),
        _moons(summary["moons"]),
    ]
    return "\n\n".join(section for section in sections if section)


def _times(spread: Spread) -> str:
    low, high = 1e3 * spread.low, 1e3 * spread.high
    return f"{1e3 * spread.median:.3g} [{low:.3g}, {high:.3g}]"


def _ratios(spread: Spread) -> str:
    return f"{spread.median:.3f} [{spread.low:.2f}, {spread.high:.2f}]"


def _steps(model: dict[str, Any]) -> str:
    rows: list[Sequence[str]] = []
    for group, contenders in model["steps"].items():
        rounds = next(iter(contenders.values()))["rounds"]
        rows.append([f"{group}, {rounds} rounds", *[""] * 4])
        for label, found in contenders.items():
            far = "" if found["over_floor"] is None else f"{found['over_floor']:.2f}"
            temp = f"{found['temp_bytes'] / 2**20:.1f}"
            times, ratios = _times(found["seconds"]), _ratios(found["over_adam"])
            rows.append([f"  {label}", times, ratios, far, temp])
    floor = model["floor"]
    joint, block = (1e3 * floor["seconds"][scope] for scope in ("joint", "block"))
    return (
        f"Training steps: {model['title']}\n"
        + table(["", "ms a step", "over Adam", "over floor", "temp, MiB"], rows)
        + f"\nFloor: gradient {1e3 * floor['gradient']:.3g} ms; products of an estimate with one"
        f" probe: joint {joint:.3g} ms, block {block:.3g} ms."
    )


def _torch(models: dict[str, Any]) -> str:
    rows = []
    for name, model in models.items():
        found = model["torch"]
        if found is None:
            continue
        if "missing" in found:
            return f"AdaHessian in PyTorch: {found['missing']}"
        for label, of_label in found.items():
            times, ratios = _times(of_label["seconds"]), _ratios(of_label["over_adam"])
            rows.append([f"{name}: {label}", times, ratios])
    if not rows:
        return ""
    header = ["", "ms a step", "over torch's Adam"]
    return f"AdaHessian, in PyTorch, against PyTorch's Adam\n{table(header, rows)}"


def _probes(models: dict[str, Any]) -> str:
    rows = []
    for name, model in models.items():
        few, many = model["probes"].values()
        for estimator in few:
            ratio = many[estimator] / few[estimator] if few[estimator] else 1.0
            rows.append(
                [
                    f"{name}: {estimator}",
                    f"{few[estimator] / 2**20:.2f}",
                    f"{many[estimator] / 2**20:.2f}",
                    f"{ratio:.2f}",
                ]
            )
    low, high = (f"K={k}, MiB" for k in next(iter(models.values()))["probes"])
    return "Memory of the compiled estimate at the default chunk\n" + table(
        ["", low, high, "ratio"], rows
    )


def _resident(models: dict[str, Any]) -> str:
    rows = []
    for name, model in models.items():
        base = None
        for label, found in model["resident"].items():
            base = base or found["peak"]
            mib = [f"{found[key] / 2**20:.0f}" for key in ("before", "peak")]
            rows.append([f"{name}: {label}", *mib, f"{found['peak'] / base:.2f}"])
    if not rows:
        return ""
    return (
        "Resident memory of a process that makes two steps, MiB\n"
        + table(["", "before", "peak", "over Adam's"], rows)
        + "\nBefore: with everything compiled. Libraries and the compiler's leftovers are in both."
    )


def _growth(growth: dict[str, Any]) -> str:
    rows = []
    for axis, found in growth.items():
        for label, line in found.items():
            ends = [f"{1e3 * line['seconds'][i]:.3g}" for i in (0, -1)]
            sizes = [f"{line['sizes'][i]:,}" for i in (0, -1)]
            fitted = "" if line["slope"] is None else f"{line['slope']:.2f}"
            rows.append([f"{axis}: {label}", *sizes, *ends, fitted])
    header = ["", "from", "to", "ms", "ms", "slope"]
    return (
        "How time grows: time ~ size^slope, fitted to the larger sizes\n"
        + table(header, rows)
        + "\nMLPs of 64 inputs and 10 classes. Devices are virtual and share this machine's cores:"
        "\nmore of them show what sharing the batch out costs, not what it wins."
    )


def _moons(moons: dict[str, Any]) -> str:
    names = {
        "lama": "benchmarks.moons, exact products",
        "lama_fd": "benchmarks.moons, finite differences",
        "torch": "the paper's algorithm in PyTorch, one seed after another",
    }
    rows, notes = [], []
    for key, name in names.items():
        found = moons.get(key)
        if found is None:
            continue
        if "missing" in found:
            notes.append(f"{name}: {found['missing']}")
            continue
        times = f"{found['times_torch']:.0f}" if "times_torch" in found else ""
        rows.append([name, f"{found['seeds_per_second']:.3g}", times])
    if not rows and not notes:
        return ""
    header = ["", "seeds per second", "times PyTorch's"]
    body = "The paper's experiment: trainings of 50 epochs\n" + table(header, rows)
    if (moons["torch"] or {}).get("seconds"):
        notes.append(
            "PyTorch: one seed, a few epochs, extrapolated linearly; the better of one and"
        )
        notes.append("all threads; finite differences, as the paper writes it.")
    return "\n".join([body, *notes])
