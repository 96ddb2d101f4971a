"""The runs: all optimizers side by side, the traces' accuracy, the learning-rate grid."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.moons._data import Classifier, cross_entropy
from benchmarks.moons._settings import Settings
from benchmarks.moons._train import ARMS, History, Trainer, join
from lama_optax import exact_trace, hutchinson, layer_curvature


class TraceAccuracy(NamedTuple):
    """Average curvature H_l of the whole training set's loss, by three estimators."""

    exact: np.ndarray  # shape=(S, L); every basis vector
    hutchinson: np.ndarray  # shape=(S, L); K probes, exact products
    finite_difference: np.ndarray  # shape=(S, L); the same K probes, differences of gradients


class Grid(NamedTuple):
    """Test accuracies over a grid of learning rates, and runs that tell where gains come from."""

    rates: np.ndarray  # shape=(R,)
    accuracy: dict[str, np.ndarray]  # method -> shape=(R, S)
    gain: dict[str, np.ndarray]  # LAMA methods -> shape=(R, S, L); mean over the steps
    controls: dict[str, np.ndarray]  # at the paper's learning rate: label -> accuracy, shape=(S,)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Everything that was run."""

    histories: dict[str, History]
    step_seconds: dict[str, list[float]]  # per step and seed, of each block
    traces: dict[str, TraceAccuracy]  # "initial" and "trained" parameters
    grid: Grid | None


def run(trainer: Trainer) -> Outcome:
    """Runs everything that the settings ask for."""
    settings = trainer.settings
    parts: dict[str, list[History]] = {arm: [] for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    # Interleaved, so that a machine that slows down slows every optimizer.
    for block in tqdm(trainer.blocks(settings.seeds), "training", disable=None):
        for arm in ARMS:
            history, time = trainer.train_block(
                arm, block, settings.learning_rate, settings.sensitivity
            )
            parts[arm].append(history)
            seconds[arm].append(time)
    histories = {arm: join(part) for arm, part in parts.items()}

    traces = trace_accuracy(
        trainer, {"initial": trainer.runs.params, "trained": histories["lama"].params}
    )
    grid = _run_grid(trainer, histories) if settings.grid else None
    return Outcome(histories, seconds, traces, grid)


def trace_accuracy(trainer: Trainer, params: dict[str, Any]) -> dict[str, TraceAccuracy]:
    """Compares the estimators at several ``params``, same probes, on the first block of seeds."""
    settings, runs = trainer.settings, trainer.runs
    model = Classifier(settings.hidden)
    estimators = (
        exact_trace(),
        hutchinson(settings.probes),
        hutchinson(settings.probes, hvp="finite_difference", fd_step=settings.fd_step),
    )

    @jax.jit
    @jax.vmap
    def estimate(p: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> list[jax.Array]:
        def value_fn(p: Any) -> jax.Array:
            return cross_entropy(model, p, x, y, jnp.ones_like(y))

        return [
            layer_curvature(p, key, estimator=estimator, value_fn=value_fn).mean
            for estimator in estimators
        ]

    first = trainer.blocks(settings.seeds)[0]
    result = {}
    for when, at in params.items():
        arguments = jax.tree.map(lambda a: a[first], (at, runs.x_train, runs.y_train))
        means = estimate(*arguments, jnp.asarray(runs.probe_key[first]))
        result[when] = TraceAccuracy(*jax.device_get(means))
    return result


def grid_methods(settings: Settings) -> dict[str, tuple[str, float]]:
    """The grid's methods: label -> optimizer and lambda."""
    return {
        "Adam": ("adam", settings.sensitivity),
        f"LAMA-Adam, lambda {settings.sensitivity:g}": ("lama", settings.sensitivity),
        f"LAMA-Adam, lambda {settings.grid_sensitivity:g}": ("lama", settings.grid_sensitivity),
    }


def _run_grid(trainer: Trainer, main: dict[str, History]) -> Grid:
    settings = trainer.settings
    seeds = settings.compared_grid_seeds
    # What was trained already is not trained again.
    known = {
        (arm, f"{settings.learning_rate:.6g}", settings.sensitivity): jax.tree.map(
            lambda a: a[:seeds], main[arm]
        )
        for arm in ("adam", "lama")
    }

    def train(arm: str, rate: float, sensitivity: float) -> History:
        run = (arm, f"{rate:.6g}", settings.sensitivity if arm == "adam" else sensitivity)
        if run not in known:
            blocks = trainer.blocks(seeds)
            known[run] = join([trainer.train_block(arm, b, rate, run[2])[0] for b in blocks])
        return known[run]

    rates = np.geomspace(settings.grid_min, settings.grid_max, settings.grid_points)
    accuracy, gain = {}, {}
    for label, (arm, sensitivity) in grid_methods(settings).items():
        grid = tqdm(rates.tolist(), label, disable=None)
        column = [train(arm, rate, sensitivity) for rate in grid]
        accuracy[label] = np.stack([history.accuracy for history in column])
        traces = [history.layers for history in column if history.layers is not None]
        if traces:
            gain[label] = np.stack([trace.gain.mean(axis=1) for trace in traces])

    # Where does a gain at the paper's learning rate come from? The momentum alone ("ema": gain
    # 1), or the step size alone (Adam at the learning rate times each layer's gain)?
    rate, large = settings.learning_rate, settings.grid_sensitivity
    layers = train("lama", rate, large).layers
    assert layers is not None
    gains = np.sort(layers.gain.mean(axis=(0, 1)))[[0, -1]].tolist()
    runs: dict[str, tuple[str, float]] = {
        "Adam": ("adam", 1.0),
        f"LAMA-Adam, lambda {large:g}": ("lama", 1.0),
        f"LAMA-Adam, lambda {large:g}, gain 1 (--momentum ema)": ("lama_ema", 1.0),
    } | {f"Adam, learning rate x {gain:.2f}": ("adam", gain) for gain in gains if np.isfinite(gain)}
    controls = {
        label: train(arm, rate * factor, large).accuracy for label, (arm, factor) in runs.items()
    }
    return Grid(rates, accuracy, gain, controls)
