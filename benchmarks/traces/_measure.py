"""Times and variances together: all contenders estimate in turn, each estimate is timed."""

import dataclasses
import functools
import math
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.lab._jobs import Job, Models, Settings
from benchmarks.lab._models import Model
from benchmarks.lab._steps import compiled_gradient
from benchmarks.lab._training import describe
from benchmarks.traces import _jax, _reference, _torch
from benchmarks.traces._jax import FISHER, HESSIAN, Estimate, Maker
from benchmarks.traces._sums import Sums
from lama_optax import layer_names

GRADIENT, TORCH_GRADIENT = "gradient", "gradient, PyTorch"
#: What a quick look is content with.
QUICK = ("hutchinson block", "flipout block", FISHER, _jax.EXACT, "matfree")


def base(matrix: str, num_layers: int) -> str:
    """The contender whose work counts 1: the default, `fisher()` or `flipout()`.

    `flipout` unrolls up to 8 layers.
    """
    if matrix != HESSIAN:
        return FISHER
    return "flipout block" if num_layers <= 8 else "flipout joint"


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Blocks of rounds; in each round a contender estimates once, a slow one less often."""

    blocks: int = 5
    rounds: int = 20
    window: float = 0.01  # seconds that a fast contender goes on in one visit
    limit: float = 1.0  # seconds a block, beyond which a contender is visited less often
    fewest: int = 10  # estimates of the slowest contender, over all blocks
    compared: int = 100  # of that with work 1


def jobs(settings: Settings, models: Models, matrix: str) -> Iterator[Job]:
    """Units of the sections ``"compile"``, ``"traces"`` and ``"reference"``."""
    quick = settings.quick
    how = Rounds(blocks=1, rounds=3, window=0, fewest=2, compared=2) if quick else Rounds()
    makers = _jax.makers(matrix) | _torch.makers(matrix)
    if quick:
        makers = {label: make for label, make in makers.items() if label in QUICK}
    for name, task in models.tasks.items():
        contenders = Contenders(models, name, matrix, makers, how, settings.seed)
        shared = {"matrix": matrix, "model": name, "task": describe(task), "seed": settings.seed}
        unit = shared | {"contenders": list(makers)}
        yield Job({"section": "compile", **unit}, contenders.compile_seconds)
        for block in range(how.blocks):
            own = {"section": "traces", "block": block, **unit, **dataclasses.asdict(how)}
            yield Job(own, functools.partial(contenders.measure, block))
        if count := _reference.count(name, matrix, quick):
            measure = functools.partial(_against, models, name, matrix, count, settings.seed)
            yield Job({"section": "reference", "count": count, **shared}, measure)


def _against(models: Models, name: str, *options: Any) -> dict[str, Any]:
    return _reference.reference(models[name], *options)


class Contenders:
    """All contenders on one model, built when they are first needed."""

    def __init__(
        self,
        models: Models,
        name: str,
        matrix: str,
        makers: dict[str, Maker],
        how: Rounds,
        seed: int,
    ):
        self._models, self._name, self._matrix = models, name, matrix
        self._makers, self._how, self._seed = makers, how, seed

    @functools.cached_property
    def _built(self) -> dict[str, tuple[Any, float]]:
        """By label: the estimate, or the words of what kept it from working; seconds to build."""
        model = self._models[self._name]
        jobs: dict[str, Callable[[], Estimate]] = {
            label: functools.partial(make, model) for label, make in self._makers.items()
        }
        jobs[GRADIENT] = lambda: _as_estimate(_gradient(model))
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
        compared = base(self._matrix, len(layer_names(self._models[self._name].params)))
        for label, (estimate, _) in self._built.items():
            if not isinstance(estimate, str):
                began = time.perf_counter()
                estimate(0)
                affordable = how.limit / ((time.perf_counter() - began) * how.rounds)
                fewest = how.compared if label in (compared, GRADIENT) else how.fewest
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


def _as_estimate(work: Callable[[], object]) -> Estimate:
    def estimate(seed: int) -> np.ndarray:
        del seed
        work()
        return np.zeros(())

    return estimate


def in_torch(label: str) -> bool:
    """Whether the contender's time is to be compared with PyTorch's gradient."""
    return label.startswith(("curvlinops", "BackPACK")) or label == TORCH_GRADIENT


def is_peer(label: str) -> bool:
    """Whether the contender is of another library."""
    own = {label for labels in _jax.OURS.values() for label in labels}
    return label not in own and label not in (GRADIENT, TORCH_GRADIENT)


def _gradient(model: Model) -> Callable[[], object]:
    gradient = compiled_gradient(model)
    return lambda: jax.block_until_ready(gradient(model.params, model.batch))
