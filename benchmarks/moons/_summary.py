"""From runs to numbers: the dictionary that results.json holds and the tables print."""

import dataclasses
from typing import Any

import jax
import numpy as np

from benchmarks.lab._environment import context
from benchmarks.lab._statistics import Interval, mean_interval
from benchmarks.moons._experiment import Grid, Outcome, TraceAccuracy
from benchmarks.moons._settings import Settings
from benchmarks.moons._train import ARMS, History, Trainer
from lama_optax import layer_names

#: What the paper reports, from one seed.
PAPER = {
    "adam": {"accuracy": 87.33, "loss": 0.39},
    "lama": {"accuracy": 88.67, "loss": 0.37},
}


def summarize(trainer: Trainer, outcome: Outcome) -> dict[str, Any]:
    """Every number of the run, as JSON holds it."""
    settings = trainer.settings
    first_seed = jax.tree.map(lambda a: a[0], trainer.runs.params)
    names = layer_names(first_seed)
    adam = outcome.histories["adam"]
    of_run = dataclasses.asdict(settings)
    # Where the results went is no setting of the experiment, and would name a directory.
    del of_run["results"]
    epoch = settings_epoch(of_run) - 1
    return {
        "settings": of_run,
        **context(),
        "layers": names,
        "paper": PAPER,
        "optimizers": {
            arm: {
                "label": ARMS[arm],
                **_optimizer(epoch, names, history, adam),
                "microseconds_per_step": float(np.median(outcome.step_seconds[arm])) * 1e6,
            }
            for arm, history in outcome.histories.items()
        },
        "curvature_order": _curvature_order(outcome.histories["lama"]),
        "traces": {
            when: {name: _trace_errors(traces, i) for i, name in enumerate(names)}
            for when, traces in outcome.traces.items()
        },
        "grid": None if outcome.grid is None else _grid(settings, names, outcome.grid),
        "divergence": {
            arm: _divergence(names, history) for arm, history in outcome.histories.items()
        },
    }


def _optimizer(
    epoch: int, names: tuple[str, ...], history: History, adam: History
) -> dict[str, Any]:
    result = {
        "accuracy": mean_interval(history.accuracy),
        "accuracy_of_base_seed": float(history.accuracy[0]),
        "accuracy_minus_adam": mean_interval(history.accuracy - adam.accuracy),
        "accuracy_std": float(np.std(history.accuracy)),
        "loss": mean_interval(history.loss[:, epoch]),
        "loss_of_base_seed": float(history.loss[0, epoch]),
        "loss_minus_adam": mean_interval(history.loss[:, epoch] - adam.loss[:, epoch]),
        "loss_by_epoch": history.loss.mean(axis=0),
        "accuracy_by_seed": history.accuracy,
        "loss_by_seed": history.loss[:, epoch],
    }
    if history.layers is not None:
        means = {k: getattr(history.layers, k).mean(axis=1) for k in ("curvature", "alpha", "gain")}
        result["by_layer"] = {
            name: {k: mean_interval(values[:, i]) for k, values in means.items()}
            | {"largest_momentum": float(history.layers.momentum[..., i].max())}
            for i, name in enumerate(names)
        }
    return result


def _curvature_order(history: History) -> float:
    """The share of seeds whose output layer has the larger curvature, mean over training."""
    assert history.layers is not None
    curvature = history.layers.curvature.mean(axis=1)
    return float(np.mean(curvature[:, -1] > curvature[:, 0]))


def _trace_errors(traces: TraceAccuracy, layer: int) -> dict[str, float]:
    exact, hutchinson, difference = (estimate[:, layer] for estimate in traces)

    def rms(errors: np.ndarray) -> float:
        return float(np.sqrt(np.mean(errors.astype(np.float64) ** 2)))

    return {
        "exact_trace": float(exact.mean()),
        "exact_hvp": float(hutchinson.mean()),
        "finite_difference": float(difference.mean()),
        "exact_hvp_rms_error": rms(hutchinson - exact),
        "finite_difference_rms_error": rms(difference - exact),
        "rms_between_the_two": rms(difference - hutchinson),
    }


def _grid(settings: Settings, names: tuple[str, ...], grid: Grid) -> dict[str, Any]:
    def of_rates(values: np.ndarray) -> list[Interval]:
        return [mean_interval(row) for row in values]

    adam = grid.accuracy["Adam"]
    # Tuned on every other seed and compared on the rest: the best of several means is biased.
    tuning, fresh = slice(0, None, 2), slice(1 if settings.seeds > 1 else 0, None, 2)
    best = {
        label: int(np.argmax(accuracy[:, tuning].mean(axis=1)))
        for label, accuracy in grid.accuracy.items()
    }
    tuned_adam = adam[best["Adam"], fresh]
    return {
        "seeds": settings.compared_grid_seeds,
        "rates": grid.rates,
        "methods": {
            label: {
                "accuracy": of_rates(grid.accuracy[label]),
                "accuracy_minus_adam": of_rates(grid.accuracy[label] - adam),
                "gain": {
                    name: grid.gain[label][..., i].mean(axis=1)
                    for i, name in enumerate(names)
                    if label in grid.gain
                },
                "best_rate": float(grid.rates[best[label]]),
                "tuned_accuracy": mean_interval(grid.accuracy[label][best[label], fresh]),
                "tuned_minus_tuned_adam": mean_interval(
                    grid.accuracy[label][best[label], fresh] - tuned_adam
                ),
            }
            for label in grid.accuracy
        },
        "controls": {
            label: {
                "accuracy": mean_interval(accuracy),
                "minus_adam": mean_interval(accuracy - grid.controls["Adam"]),
            }
            for label, accuracy in grid.controls.items()
        },
    }


def _divergence(names: tuple[str, ...], history: History) -> dict[str, Any]:
    """Diverged: the loss is not finite, or ends above where it began."""
    finite = np.isfinite(history.loss).all(axis=1) & np.isfinite(history.final_loss)
    worse = ~finite | ~(history.final_loss <= history.initial_loss)
    reached = {}
    unstable = np.zeros(len(worse), bool)
    if history.layers is not None:
        unstable = (history.layers.momentum >= 1).any(axis=(1, 2))
        largest = history.layers.momentum.max(axis=(0, 1))
        reached = {name: float(x) for name, x in zip(names, largest, strict=True)}
    return {
        "seeds": int(worse.sum()),
        "seeds_with_both": int((worse & unstable).sum()),
        "largest_momentum": reached,
        "median_loss_ratio": float(np.median(history.final_loss / history.initial_loss)),
    }


def settings_epoch(settings: dict[str, Any]) -> int:
    """The epoch whose loss is compared."""
    return int(min(settings["loss_epoch"], settings["epochs"]))
