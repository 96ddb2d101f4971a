"""Which width each layer gets: an integer program over what each costs at each width."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lama_optax.layers import Layers, match_to_params

PyTree = Any


class Point(NamedTuple):
    """One point of the curve of size against predicted loss."""

    mean_bits: float
    size_bytes: int
    increase: float


class Table(NamedTuple):
    """What each layer (row) costs at each width (column)."""

    widths: tuple[int, ...]
    counts: np.ndarray  # (L,), weights that are rounded
    squares: np.ndarray  # (L, W), squared change
    offered: np.ndarray  # (L, W), whether a prediction is trusted

    @classmethod
    def of(
        cls,
        layers: Layers,
        params: PyTree,
        rounded: Mapping[int, PyTree],
        widths: tuple[int, ...],
        max_change: float,
    ) -> "Table":
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
        kept = [np.asarray(leaf) for leaf in jax.tree.leaves(rounded[widths[-1]])]
        moved = [
            jnp.full(a.shape, float(not np.array_equal(a, b)))
            for a, b in zip(leaves, kept, strict=True)
        ]
        counts = np.asarray(layers.sum(jax.tree.unflatten(jax.tree.structure(params), moved)))
        squares = np.stack([squared_change(layers, params, rounded[w]) for w in widths], axis=1)
        norms = squared_change(layers, params, jax.tree.map(jnp.zeros_like, params))
        offered = np.isfinite(squares) & (squares <= max_change**2 * norms[:, None])
        offered[:, -1] = True
        return cls(widths, np.rint(counts).astype(np.int64), squares, offered)

    @property
    def rows(self) -> np.ndarray:
        return np.arange(len(self.counts))

    @property
    def used(self) -> np.ndarray:
        return self.counts > 0

    def size(self, choice: np.ndarray) -> int:
        """In bits."""
        return int(np.sum(self.counts * np.asarray(self.widths)[choice]))

    def solve(self, costs: np.ndarray, budget: float, known: np.ndarray) -> np.ndarray:
        """The columns of least cost within the budget of bits."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        shape = costs.shape
        allowed = self.offered.copy()
        allowed[~known] = False
        allowed[:, -1] = True
        sizes = self.counts[:, None] * np.asarray(self.widths)
        least = int(np.sum(np.min(np.where(allowed, sizes, np.iinfo(np.int64).max), axis=1)))
        if least > budget:
            weights = max(1, int(self.counts.sum()))
            raise ValueError(
                f"the budget is {budget / weights:.4g} bits a weight, and what is offered begins at"
                f" {least / weights:.4g}: a layer has no width at which its prediction is trusted"
                " (max_change) or its curvature is known. Pass value_fn, by which such widths are"
                " measured, or raise the budget."
            )
        one = np.kron(np.eye(shape[0]), np.ones(shape[1]))
        scale = max(float(np.max(costs)), 1e-300)
        # In the largest unit that all sizes share, so that the solver's tolerance is less than one.
        unit = max(1, int(np.gcd.reduce(sizes, axis=None)))
        found = milp(
            costs.ravel() / scale,
            integrality=np.ones(costs.size),
            bounds=Bounds(0, allowed.ravel().astype(float)),
            constraints=[
                LinearConstraint(one, 1, 1),
                LinearConstraint(sizes.ravel() // unit, -np.inf, budget // unit),
            ],
            # The presolver writes lines to the terminal that cannot be turned off.
            options={"mip_rel_gap": 0.0, "presolve": False},
        )
        return np.argmax(found.x.reshape(shape), axis=1)

    def uniform(self, budget: float) -> np.ndarray | None:
        """The largest width that all layers can have, whether trusted or not."""
        fits = [i for i, w in enumerate(self.widths) if self.counts.sum() * w <= budget]
        return np.full(len(self.counts), fits[-1]) if fits else None

    def curve(self, costs: np.ndarray, known: np.ndarray) -> tuple[Point, ...]:
        points = []
        weights = max(1, int(self.counts.sum()))
        for mean in np.linspace(self.widths[0], self.widths[-1], 13):
            try:
                choice = self.solve(costs, mean * weights, known)
            except ValueError:
                continue
            size = self.size(choice)
            rise = float(np.sum(costs[self.rows, choice]))
            points.append(Point(size / weights, -(-size // 8), rise))
        return tuple(dict.fromkeys(points))


class Alone:
    """The rise that each layer causes alone, as measured: over that of all at the largest width."""

    def __init__(self, table: Table, costs: np.ndarray, rise: Callable[[np.ndarray], float]):
        self.table, self.costs, self._rise = table, costs, rise
        self._top = np.full(len(table.counts), len(table.widths) - 1)
        self._base = rise(self._top)

    def _of(self, row: int, column: int) -> float:
        choice = self._top.copy()
        choice[row] = column
        return self._rise(choice) - self._base

    def beyond_trust(self, known: np.ndarray) -> tuple[Table, np.ndarray]:
        """What is not trusted is offered at what it costs, but at no less than was predicted."""
        open_to = known & self.table.used
        costs, offered = self.costs.copy(), self.table.offered.copy()
        for row, column in np.argwhere(~offered & open_to[:, None]).tolist():
            costs[row, column] = max(costs[row, column], self._of(row, column) + costs[row, -1])
            offered[row, column] = np.isfinite(costs[row, column])
        return self.table._replace(offered=offered), np.where(np.isfinite(costs), costs, 0.0)

    def corrections(self, chosen: np.ndarray) -> np.ndarray:
        """(L, W), measured over predicted where a trusted width was chosen: within threefold."""
        factors = np.ones(self.costs.shape)
        for row in self.table.rows[self.table.used]:
            predicted = self.costs[row, chosen[row]] - self.costs[row, -1]
            if predicted > 0 and self.table.offered[row, chosen[row]]:
                factor = np.clip(self._of(row, chosen[row]) / predicted, 1 / 3, 3)
                factors[row, self.table.offered[row]] = factor
        return factors


def squared_change(layers: Layers, params: PyTree, changed: PyTree) -> np.ndarray:
    """Each layer's squared distance, shape (L,)."""
    after = match_to_params("changed", changed, params)
    before, treedef = jax.tree.flatten(params)
    squares = [
        jnp.square(b.astype(layers.dtype) - a.astype(layers.dtype))
        for a, b in zip(before, after, strict=True)
    ]
    return np.asarray(layers.sum(jax.tree.unflatten(treedef, squares)), np.float64)
