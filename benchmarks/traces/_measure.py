"""Times and variances together: all contenders estimate in turn, each estimate is timed.

The results are running sums, so that blocks of rounds add up whatever was interrupted.
"""

import dataclasses
import functools
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.lab._jobs import Job, Models, Settings
from benchmarks.lab._models import Model
from benchmarks.lab._steps import (
    ADAM,
    GIVEN,
    Step,
    compiled_gradient,
    contenders,
)
from benchmarks.lab._training import describe
from benchmarks.traces import _jax, _torch
from benchmarks.traces._jax import Estimate, Maker
from lama_optax import layer_names

GRADIENT, TORCH_GRADIENT = "gradient", "gradient, PyTorch"
#: What a quick look is content with.
QUICK = (
    "hutchinson joint",
    _jax.TEN_PROBES,
    "hutchinson block",
    "flipout joint",
    "flipout block",
    _jax.EXACT,
    _jax.QUARTER,
    "matfree",
    "traceax, v * Hv by layer",
)
#: Steps that what an estimate costs is compared with.
STEPS = (ADAM, GIVEN)


def default_flipout(num_layers: int) -> str:
    """The label of what `flipout()` chooses as it comes: it unrolls up to 8 layers."""
    return "flipout block" if num_layers <= 8 else "flipout joint"


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Blocks of rounds; in each round a contender estimates once, a slow one less often."""

    blocks: int = 10
    rounds: int = 10
    window: float = 0.01  # seconds that a fast contender goes on in one visit
    limit: float = 1.0  # seconds a block, beyond which a contender is visited less often
    fewest: int = 20  # estimates of the slowest contender, over all blocks
    compared: int = 100  # of those whose standard errors are compared


def rounds(quick: bool) -> Rounds:
    """How much is measured."""
    if quick:
        return Rounds(blocks=2, rounds=3, window=0, fewest=2, compared=2)
    return Rounds()


def jobs(settings: Settings, models: Models) -> Iterator[Job]:
    """Units of the sections ``"compile"`` and ``"traces"``."""
    how = rounds(settings.quick)
    makers = _jax.makers() | _torch.makers()
    if settings.quick:
        makers = {label: make for label, make in makers.items() if label in QUICK}
    for name, task in models.tasks.items():
        contenders = Contenders(models, name, makers, how, settings.seed)
        shared = {"model": name, "task": describe(task), "seed": settings.seed}
        unit = {"section": "compile", "matrix": "hessian", "contenders": list(makers), **shared}
        yield Job(unit, contenders.compile_seconds)
        for block in range(how.blocks):
            unit = {"section": "traces", **shared, "block": block, **dataclasses.asdict(how)}
            yield Job(unit, functools.partial(contenders.measure, block))


class Contenders:
    """All contenders on one model, built when they are first needed."""

    def __init__(
        self,
        models: Models,
        name: str,
        makers: Mapping[str, Maker],
        how: Rounds,
        seed: int,
        compared: Sequence[str] | None = None,
        steps: Sequence[str] = STEPS,
    ):
        """``compared``: labels whose standard errors are compared; by default the Hessian's."""
        self._models, self._name, self._makers, self._how = models, name, makers, how
        self._seed, self._compared, self._steps = seed, compared, steps

    @property
    def _model(self) -> Model:
        return self._models[self._name]

    @functools.cached_property
    def _built(self) -> dict[str, tuple[Any, float]]:
        """By label: the estimate, or the words of what kept it from working; seconds to build."""
        model = self._model
        jobs: dict[str, Callable[[], Estimate]] = {
            label: functools.partial(make, model) for label, make in self._makers.items()
        }
        jobs[GRADIENT] = lambda: _as_estimate(_gradient(model))
        for label in self._steps:
            jobs[label] = functools.partial(_step, model, label)
        if any(in_torch(label) for label in jobs):
            jobs[TORCH_GRADIENT] = lambda: _as_estimate(_torch.gradient(model))
        built: dict[str, tuple[Any, float]] = {}
        for label, make in jobs.items():
            began = time.perf_counter()
            # A peer that fails is a result, whatever it raises.
            try:
                estimate: Any = make()
                seconds = time.perf_counter() - began
                if not np.isfinite(estimate(0)).all():
                    raise FloatingPointError("the estimate is not finite")
            except Exception as error:
                estimate = f"{type(error).__name__}: {error}".splitlines()[0]
                seconds = math.nan
            built[label] = estimate, seconds
        return built

    def compile_seconds(self) -> dict[str, float]:
        """Seconds to trace and compile each contender that runs in JAX."""
        return {label: s for label, (_, s) in self._built.items() if not in_torch(label)}

    @functools.cached_property
    def _shares(self) -> dict[str, float]:
        """Visits in a round: 1, or less for the slow."""
        how, shares = self._how, {}
        compared = self._compared
        if compared is None:
            flipout = default_flipout(len(layer_names(self._model.params)))
            compared = (_jax.TEN_PROBES, flipout)
        for label, (estimate, _) in self._built.items():
            if not isinstance(estimate, str):
                began = time.perf_counter()
                estimate(0)
                affordable = how.limit / ((time.perf_counter() - began) * how.rounds)
                fewest = how.compared if label in compared else how.fewest
                least = fewest / (how.blocks * how.rounds)
                shares[label] = min(1.0, max(affordable, least))
        return shares

    def measure(self, block: int) -> dict[str, Any]:
        """Each contender's times and the sums of its estimates, over one block of rounds."""
        how = self._how
        rng = np.random.default_rng([self._seed, block])
        sums = {label: Sums(self._seeds(label, block)) for label in self._shares}
        labels = list(sums)
        for number in range(block * how.rounds, (block + 1) * how.rounds):
            for i in rng.permutation(len(labels)):
                label = labels[i]
                share = self._shares[label]
                if int((number + 1) * share + 1e-9) > int(number * share + 1e-9):
                    sums[label].visit(self._built[label][0], how.window)
        failed = {k: {"error": v} for k, (v, _) in self._built.items() if isinstance(v, str)}
        return {label: found.result() for label, found in sums.items()} | failed

    def _seeds(self, label: str, block: int) -> Iterator[int]:
        """Seeds that no other contender, block or run seed shares."""
        stream = [self._seed, block, zlib.crc32(label.encode())]
        rng = np.random.default_rng(stream)
        while True:
            yield int(rng.integers(2**32))


class Sums:
    """Running mean and sum of squared deviations of estimates, and their times."""

    def __init__(self, seeds: Iterator[int]):
        self._seeds = seeds
        self._count = 0
        self._mean: Any = 0.0
        self._squares: Any = 0.0
        self._seconds: list[float] = []

    def visit(self, estimate: Estimate, window: float) -> None:
        """Estimates for ``window`` seconds, at least once."""
        calls, began = 0, time.perf_counter()
        values = []
        while calls == 0 or time.perf_counter() - began < window:
            values.append(estimate(next(self._seeds)))
            calls += 1
        self._seconds.append((time.perf_counter() - began) / calls)
        for value in values:
            self._count += 1
            step = np.asarray(value, np.float64) - self._mean
            self._mean = self._mean + step / self._count
            self._squares = self._squares + step * (value - self._mean)

    def result(self) -> dict[str, Any]:
        """What is kept of a block."""
        return {
            "seconds": self._seconds,
            "count": self._count,
            "mean": self._mean,
            "squares": self._squares,
        }


def _as_estimate(work: Callable[[], object]) -> Estimate:
    def estimate(seed: int) -> np.ndarray:
        del seed
        work()
        return np.zeros(())

    return estimate


def in_torch(label: str) -> bool:
    """Whether the contender's time is to be compared with PyTorch's gradient."""
    return label.startswith(("curvlinops", "PyHessian", "BackPACK")) or label == TORCH_GRADIENT


def _step(model: Model, label: str) -> Estimate:
    return _as_estimate(Step(model, contenders()[label]).endless())


def _gradient(model: Model) -> Callable[[], object]:
    gradient = compiled_gradient(model)
    return lambda: jax.block_until_ready(gradient(model.params, model.batch))
