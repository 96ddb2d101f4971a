"""Final runs: the selected hyper-parameters and their controls on fresh seeds, tested once."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.study._arms import make_arm
from benchmarks.study._plan import Bench, final_seeds
from benchmarks.study._programs import PROGRAMS
from benchmarks.study._settings import CONTROLS
from benchmarks.study._store import Line, plain
from benchmarks.study._train import CHECKPOINTS, History
from benchmarks.study._tune import at_edge, score, selected, trials
from lama_optax import layer_names

Hypers = dict[str, Any]

#: The target of "steps to target": tuned Adam's mean validation loss, times this.
TARGET_FACTOR = 1.05


CONTROL_PROGRAMS = {
    "adam_matched": "layered",
    "lama_frozen": "layered",
    "lama_shuffled": "lama",
    "lama_flipped": "lama",
    "v1_shuffled": "v1",
    "v6_shuffled": "v6",
}


def final(bench: Bench, arms: Sequence[str]) -> None:
    """Runs the arms, then the controls of those among them."""
    target = TARGET_FACTOR * score(selected(bench, "adam"))
    for arm in arms:
        chosen = selected(bench, arm)
        built = make_arm(arm, bench.workload.trials)
        _run(
            *(bench, arm, built.program, chosen["hypers"], target),
            selected_from=len(trials(bench, arm)),
            edge=at_edge(bench, built),
        )
    for control, of in CONTROLS.items():
        if of in arms:
            hypers = plain(_control(bench, control))  # trained with the digits that are stored
            program = CONTROL_PROGRAMS[control]
            _run(bench, control, program, hypers, target, selected_from=0, control_of=of)


def final_work(bench: Bench, arms: Sequence[str]) -> float:
    """Seconds of arms and controls, as `Bench.work` has them."""
    names = [make_arm(arm, bench.workload.trials).program for arm in arms]
    names += [CONTROL_PROGRAMS[control] for control, of in CONTROLS.items() if of in arms]
    return sum(bench.work(PROGRAMS[name], len(final_seeds(bench))) for name in names)


def _control(bench: Bench, name: str) -> Hypers:
    """The hyper-parameters of a control, from the arm that it explains."""
    of = finished(bench, CONTROLS[name])
    hypers = of["hypers"]
    if name in ("lama_shuffled", "v1_shuffled", "v6_shuffled"):
        return hypers | {"shift": 1}
    if name == "lama_flipped":
        return hypers | {"sensitivity": -hypers["sensitivity"]}
    ones = np.ones(len(of["layers"]))
    paper = {"weight": 0.1 * ones, "correction": 0.9 * ones}
    if name == "lama_frozen":
        decay = np.minimum(0.9 * np.asarray(of["alpha_mean"], float), 0.999)
        return {"lr": hypers["lr"] * ones, "decay": decay, **paper}
    assert name == "adam_matched", name
    rates = hypers["lr"] * np.asarray(of["gain_mean"], float)
    return {"lr": rates, "decay": 0.9 * ones, **paper}


def finished(bench: Bench, arm: str) -> Line:
    """The final line of an arm.

    Raises:
      LookupError: if it has not been run.
    """
    lines = bench.store.find(kind="final", arm=arm, seeds=final_seeds(bench))
    if not lines:
        raise LookupError(f"{bench.workload.name}: {arm} has no final runs: run the phase final.")
    return lines[-1]


def _run(
    bench: Bench, arm: str, program: str, hypers: Hypers, target: float, **fields: Any
) -> None:
    seeds = final_seeds(bench)
    identity = bench.identity("final", arm=arm, hypers=hypers, seeds=seeds)
    if bench.store.get(identity) is not None:
        bench.skip(PROGRAMS[program], len(seeds))
        return
    bench.progress.say(f"{bench.workload.name} final {arm}")
    jobs = [(hypers, seed) for seed in seeds]
    history, seconds = bench.train(program, PROGRAMS[program], jobs)
    curve = history.validation_curve
    bench.store.add(
        bench.header("final", identity, arm, hypers, seeds)
        | fields
        | {"seconds": seconds}
        | outcome(bench, history)
        | {
            "target": target,
            "steps_to_target": _steps_to(curve, target, bench.workload.steps),
            "gradient_equivalents_per_step": PROGRAMS[program].gradient_equivalents,
            "microseconds_per_step": 1e6 * seconds / (_padded(bench, seeds) * bench.workload.steps),
            "curve": {
                "steps": _checkpoints(bench.workload.steps),
                "validation_loss": _quartiles(curve),
            },
        }
        | layer_fields(bench, history, rearranged="shift" in hypers)
    )


def outcome(bench: Bench, history: History) -> Line:
    """Losses and metric of every seed."""
    return {
        "validation_loss": history.validation_loss,
        "test_loss": history.test_loss,
        "train_loss": history.train_loss,
        "test_metric": history.test_metric,
        "metric_name": bench.workload.metric_name,
        "diverged": history.diverged,
    }


def layer_fields(bench: Bench, history: History, *, rearranged: bool = False) -> Line:
    """Per layer, averaged over the seeds that did not diverge: Section 4.4's traces and more."""
    seen = {key: np.asarray(x)[~history.diverged] for key, x in history.layers.items()}
    if rearranged:  # not the layers' own
        seen.pop("curvature", None)
    if not seen or not len(next(iter(seen.values()))):
        return {}
    groups = bench.trainer.groups
    if next(iter(seen.values())).shape[-1] != len(groups.sizes):
        return {}  # a question that takes other layers than the workload's modules
    fields: Line = {"layers": list(layer_names(bench.trainer.params))}
    times = {"start": 0, "middle": CHECKPOINTS // 2, "end": CHECKPOINTS - 1}
    for key in ("curvature", "q"):
        if key in seen:
            fields[key] = {when: seen[key][:, i].mean(axis=0) for when, i in times.items()}
    if "curvature" in seen:
        sizes = np.asarray(groups.sizes)
        fields["trace"] = {when: mean * sizes for when, mean in fields["curvature"].items()}
    for key in ("alpha", "gain", "momentum"):
        if key in seen:
            fields[f"{key}_mean"] = seen[key].mean(axis=(0, 1))
    return fields


def _checkpoints(steps: int) -> list[int]:
    return [steps // CHECKPOINTS * (i + 1) for i in range(CHECKPOINTS)]


def _steps_to(curve: np.ndarray, target: float, steps: int) -> list[int | None]:
    """The first checkpoint at or below the target, of each seed."""
    reached = curve <= target
    at = _checkpoints(steps)
    return [at[int(row.argmax())] if row.any() else None for row in reached]


def _quartiles(curve: np.ndarray) -> np.ndarray:
    # A loss that is not finite is the worst there is, not a missing one.
    finite = np.where(np.isfinite(curve), curve, np.finfo(np.float32).max)
    return np.quantile(finite, [0.25, 0.5, 0.75], axis=0).T


def _padded(bench: Bench, seeds: Sequence[int]) -> int:
    chunk = bench.trainer.chunk
    return -(-len(seeds) // chunk) * chunk
