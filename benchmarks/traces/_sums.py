"""Running sums of estimates, so that blocks of rounds add up whatever was interrupted."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.traces._jax import Estimate


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
