"""Hyper-parameters that are tuned: their first values, and how a later round goes on from them."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

#: Rounds of tuning: the first grid and its extensions or refinements.
MIN_ROUNDS = 3
MAX_ROUNDS = 10

#: Relative difference of two scores below which a direction is flat: a tenth of what counts as
#: equivalent. A trial inside the grid is then selected before one at an edge.
FLAT = 0.001


@dataclasses.dataclass(frozen=True)
class Axis:
    """One hyper-parameter, laid out in a coordinate u in which equal steps are alike.

    scale: "log" u = log10(x); "momentum" u = -log10(1 - x); "signed" u = sign(x) log10(1 + |x|);
    "linear" u = x. An optimum at one of the bounds is no edge: nothing lies beyond.
    """

    name: str
    scale: str
    low: float  # of the first round, in u
    high: float
    count: int
    bounds: tuple[float, float] = (-math.inf, math.inf)

    @property
    def spacing(self) -> float:
        """Of the first round's values."""
        return (self.high - self.low) / max(self.count - 1, 1)

    def value(self, u: float) -> float:
        """The value at a coordinate, to the six digits that are stored."""
        if self.scale == "log":
            x = 10.0**u
        elif self.scale == "momentum":
            x = 1 - 10.0**-u
        elif self.scale == "signed":
            x = math.copysign(10.0 ** abs(u) - 1, u)
        else:
            x = u
        return float(f"{x:.6g}")

    def coordinate(self, x: float) -> float:
        """The coordinate of a value."""
        if self.scale == "log":
            return math.log10(x)
        if self.scale == "momentum":
            return -math.log10(1 - x)
        if self.scale == "signed":
            return math.copysign(math.log10(1 + abs(x)), x)
        return x

    def first(self) -> list[float]:
        """The first round's coordinates."""
        return [self.low + i * self.spacing for i in range(self.count)]

    def edge(self, best: float, tried: Sequence[float]) -> int:
        """-1 or 1 where the best coordinate is the lowest or highest tried, else 0."""
        tiny = 1e-4
        if best <= min(tried) + tiny and best > self.bounds[0] + tiny:
            return -1
        if best >= max(tried) - tiny and best < self.bounds[1] - tiny:
            return 1
        return 0

    def following(self, best: float, tried: Sequence[float], spacing: float) -> list[float]:
        """The next round's coordinates: outward from an edge, else around the best."""
        side = self.edge(best, tried)
        if side:
            # As coarse as the first round, since finer steps might never arrive; up to a bound.
            end = best + side * self.spacing * self.count
            end = min(max(end, self.bounds[0]), self.bounds[1])
            return [best + (end - best) * (i + 1) / self.count for i in range(self.count)]
        middle = (self.count - 1) / 2
        step = 2 * spacing / self.count
        wanted = [best + (i - middle) * step for i in range(self.count)]
        # At a bound the values move together, so that no two are the same.
        low, high = max(wanted[0], self.bounds[0]), min(wanted[-1], self.bounds[1])
        return [low + i * (high - low) / max(self.count - 1, 1) for i in range(self.count)]


Hypers = dict[str, float]


def first_round(axes: Sequence[Axis]) -> list[Hypers]:
    """The grid of the first round."""
    return _product(axes, [axis.first() for axis in axes])


def next_round(
    axes: Sequence[Axis], tried: Sequence[Hypers], best: Hypers, inside: int
) -> list[Hypers]:
    """As many trials again: outward, or around the best, which was inside after so many rounds."""
    columns = []
    for axis in axes:
        coordinates = [axis.coordinate(trial[axis.name]) for trial in tried]
        # Every round resolves twice as finely as the one before, but none before the optimum is
        # inside on all axes: on a ridge it moves along one as far as along another.
        spacing = axis.spacing / 2 ** max(inside - 1, 0)
        columns.append(axis.following(axis.coordinate(best[axis.name]), coordinates, spacing))
    return _product(axes, columns)


def edges(axes: Sequence[Axis], tried: Sequence[Hypers], best: Hypers) -> list[str]:
    """Names of the axes on which the best trial is the outermost of those tried."""
    return [
        axis.name
        for axis in axes
        if axis.edge(
            axis.coordinate(best[axis.name]),
            [axis.coordinate(trial[axis.name]) for trial in tried],
        )
    ]


def _product(axes: Sequence[Axis], columns: Sequence[Sequence[float]]) -> list[Hypers]:
    return [
        {axis.name: axis.value(u) for axis, u in zip(axes, row, strict=True)}
        for row in itertools.product(*columns)
    ]
