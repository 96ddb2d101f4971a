"""One training: curvature by every way, predictions, and the bits that each way chooses."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import spearmanr

from benchmarks.rounding._networks import Network, Trained
from lama_optax import (
    Estimator,
    LayerCurvature,
    fisher,
    flipout,
    hutchinson,
    layer_curvature,
    layer_names,
    supervised,
)
from lama_optax.layers import resolve_layers
from lama_optax.rounding import allocate_bits, round_symmetric

#: Widths of the random configurations, and those that a choice is made from.
RANDOM_WIDTHS, WIDTHS = (3, 4, 5, 6, 8), (2, 3, 4, 5, 6, 8)
CONFIGURATIONS, BATCHES = 100, 16
ESTIMATORS: dict[str, Estimator] = {
    "fisher": fisher(),
    "hutchinson": hutchinson(1),
    "flipout": flipout(1),
}
BUDGETS = (4, 3)


def measure(network: Network, seed: int, quick: bool) -> dict[str, Any]:
    """All results of one independent training."""
    trained = network.train(seed)
    params = trained.params
    configurations, batches = (5, 2) if quick else (CONFIGURATIONS, BATCHES)
    loss = {part: _loss(network, trained, part) for part in ("test", "validation")}
    start = {part: float(loss[part](params)) for part in loss}
    rng = np.random.default_rng([seed, 2])
    examples = _examples(network, rng, batches)
    curvature, seconds = _curvature(network, trained, examples, seed)
    gradient = _seconds_of_gradient(network, trained, examples[0])

    rounder = _Rounder(params)
    configured = rounder.configurations(rng, configurations)
    rises = [float(loss["test"](rounder.tree(c))) - start["test"] for c in configured]
    prediction, pairs = {}, {}
    for way, values in curvature.items():
        predicted = [rounder.predict(values, c) for c in configured]
        if way == "fisher":
            pairs = {"predicted": predicted, "measured": rises}
        prediction[way] = _agreement(predicted, rises)

    choices: dict[str, Any] = {}
    greedy = rounder.greedy(loss["validation"])
    for budget in BUDGETS:
        trees = {"uniform": rounder.tree(dict.fromkeys(rounder.rows, budget))}
        for way, values in curvature.items():
            # All widths, to hold the ways against each other.
            trees[way], _ = _chosen(values, params, budget, max_change=1.0)
        fisher_alone = curvature["fisher"], params, budget
        trees["fisher, trusted widths"], choice = _chosen(*fisher_alone)
        trees["fisher, verified"], verified = _chosen(*fisher_alone, value_fn=loss["validation"])
        seconds |= {f"choice at {budget}": choice, f"verified choice at {budget}": verified}
        trees["greedy measurement"], seconds[f"greedy at {budget}"] = next(greedy)
        random = [rounder.random(rng, budget) for _ in range(2 if quick else 20)]
        trees = {way: tree for way, tree in trees.items() if tree is not None}
        found_rises = {
            way: float(loss["test"](tree)) - start["test"] for way, tree in trees.items()
        }
        found_rises["random"] = float(
            np.median([float(loss["test"](tree)) - start["test"] for tree in random])
        )
        accuracy = {way: _accuracy(network, trained, tree) for way, tree in trees.items()}
        choices[str(budget)] = {"rises": found_rises, "accuracy": accuracy}
    return {
        "loss": start["test"],
        "accuracy": _accuracy(network, trained, params),
        "layers": len(rounder.rows),
        "prediction": prediction,
        "pairs": pairs,
        "choices": choices,
        "seconds": seconds,
        "gradient": gradient,
    }


def measure_on_validation(network: Network, seed: int, quick: bool) -> dict[str, Any]:
    """The same training and configurations, with `fisher` on data that training did not see."""
    trained = network.train(seed)
    configurations, batches = (5, 2) if quick else (CONFIGURATIONS, BATCHES)
    loss = _loss(network, trained, "test")
    start = float(loss(trained.params))
    rng = np.random.default_rng([seed, 2])
    _examples(network, rng, batches)  # so that what follows is drawn alike
    rounder = _Rounder(trained.params)
    configured = rounder.configurations(rng, configurations)
    rises = [float(loss(rounder.tree(c))) - start for c in configured]
    examples = _examples(network, np.random.default_rng([seed, 3]), batches, "validation")
    values, _ = _estimate(network, trained, examples, seed, fisher())
    choices = {}
    for budget in BUDGETS:
        tree, _ = _chosen(values, trained.params, budget, max_change=1.0)
        rise, accuracy = float(loss(tree)) - start, _accuracy(network, trained, tree)
        choices[str(budget)] = {"rise": rise, "accuracy": accuracy}
    predicted = [rounder.predict(values, c) for c in configured]
    return {"prediction": _agreement(predicted, rises), "choices": choices}


def _examples(
    network: Network, rng: np.random.Generator, batches: int, part: str = "train"
) -> list[Any]:
    return [network.batch(rng, network.batch_size, part) for _ in range(batches)]


def _agreement(predicted: list[float], rises: list[float]) -> dict[str, float]:
    ratio = np.median(np.divide(predicted, rises))
    return {"rank": float(spearmanr(predicted, rises)[0]), "ratio": float(ratio)}


def _chosen(
    values: np.ndarray, params: Any, budget: float, **options: Any
) -> tuple[Any | None, float]:
    """The rounded parameters, None where the budget is below what is offered, and the seconds."""
    found = LayerCurvature(jnp.asarray(values), jnp.zeros(len(values)), jnp.ones(1))
    began = time.perf_counter()
    try:
        choice = allocate_bits(
            found, params, mean_bits=budget, bits=WIDTHS, layers="leaf", **options
        ).params
    except ValueError as error:
        if "what is offered begins at" not in str(error):
            raise
        choice = None
    return choice, time.perf_counter() - began


def _loss(network: Network, trained: Trained, part: str) -> Callable[[Any], jax.Array]:
    inputs, targets = network.judged(part)

    def loss(params: Any) -> jax.Array:
        logits = network.apply(params, trained.statistics, inputs)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    return jax.jit(loss)


def _accuracy(network: Network, trained: Trained, params: Any) -> float:
    inputs, targets = network.judged("test")
    logits = network.apply(params, trained.statistics, inputs)
    return float(jnp.mean(jnp.argmax(logits, axis=-1) == targets))


def _curvature(
    network: Network, trained: Trained, examples: list[Any], seed: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Way -> each leaf's curvature; and the seconds that the estimators took."""
    params = trained.params
    found, seconds = {}, {}
    for way, estimator in ESTIMATORS.items():
        _estimate(network, trained, examples[:2], seed, estimator)
        found[way], seconds[way] = _estimate(network, trained, examples, seed, estimator)
    layers = resolve_layers("leaf", params)
    found["empirical Fisher"] = _empirical(network, trained, examples, layers)
    second = layers.sum(trained.second_moment)
    found["Adam's second moment"] = np.asarray(layers.average(second), np.float64)
    found["weight error alone"] = np.ones(len(layer_names(params, "leaf")))
    return found, seconds


def _estimate(
    network: Network, trained: Trained, examples: list[Any], seed: int, estimator: Estimator
) -> tuple[np.ndarray, float]:
    """Each leaf's curvature, and the seconds that it took, with compilation."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return network.apply(params, trained.statistics, x)

    began = time.perf_counter()
    tasks = (supervised(apply_fn, *batch) for batch in examples)
    found = layer_curvature(trained.params, seed, estimator=estimator, layers="leaf", batches=tasks)
    return np.asarray(found.mean, np.float64), time.perf_counter() - began


def _empirical(network: Network, trained: Trained, examples: list[Any], layers: Any) -> np.ndarray:
    """Squared gradients of the examples, with the data's own targets."""

    @jax.jit
    def one(batch: Any) -> jax.Array:
        def loss(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            logits = network.apply(p, trained.statistics, x[None])[0]
            return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, y))

        each = jax.vmap(jax.grad(loss), (None, 0, 0))(trained.params, *batch)
        # A prediction is a position: an example of t positions has t of them.
        count = batch[1].size
        return layers.average(
            layers.sum(jax.tree.map(lambda g: jnp.square(g).sum(0), each)) / count
        )

    return np.mean([np.asarray(one(batch), np.float64) for batch in examples], axis=0)


def _seconds_of_gradient(network: Network, trained: Trained, batch: Any) -> float:
    def loss(params: Any) -> jax.Array:
        logits = network.apply(params, trained.statistics, batch[0])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

    gradient = jax.jit(jax.grad(loss))
    jax.block_until_ready(gradient(trained.params))
    times = []
    for _ in range(9):
        began = time.perf_counter()
        jax.block_until_ready(gradient(trained.params))
        times.append(time.perf_counter() - began)
    return float(np.median(times))


class _Rounder:
    """All matrices of a network at all widths."""

    def __init__(self, params: Any):
        self.leaves, self.treedef = jax.tree.flatten(params)
        self.rows = [i for i, leaf in enumerate(self.leaves) if leaf.ndim > 1]
        self.sizes = {row: self.leaves[row].size for row in self.rows}
        self.rounded = {
            (row, width): round_symmetric(self.leaves[row], width)
            for row in self.rows
            for width in WIDTHS
        }

    def configurations(self, rng: np.random.Generator, count: int) -> list[dict[int, int]]:
        """Widths of all matrices, at random."""
        return [{row: int(rng.choice(RANDOM_WIDTHS)) for row in self.rows} for _ in range(count)]

    def tree(self, widths: dict[int, int]) -> Any:
        """The parameters with each matrix at its width."""
        leaves = list(self.leaves)
        for row, width in widths.items():
            leaves[row] = self.rounded[row, width]
        return jax.tree.unflatten(self.treedef, leaves)

    def predict(self, curvature: np.ndarray, widths: dict[int, int]) -> float:
        """sum_l H_l |dW_l|^2 / 2."""
        return sum(
            float(curvature[row] * jnp.sum(jnp.square(self.rounded[row, width] - self.leaves[row])))
            / 2
            for row, width in widths.items()
        )

    def _mean(self, widths: dict[int, int]) -> float:
        total = sum(self.sizes[row] * width for row, width in widths.items())
        return total / sum(self.sizes.values())

    def random(self, rng: np.random.Generator, budget: float) -> Any:
        """Widths drawn until they fit, then as they are."""
        while True:
            widths = {row: int(rng.choice(WIDTHS[1:])) for row in self.rows}
            while self._mean(widths) > budget:
                row = int(rng.choice(self.rows))
                widths[row] = WIDTHS[max(1, WIDTHS.index(widths[row]) - 1)]
            return self.tree(widths)

    def greedy(self, loss: Callable[[Any], jax.Array]) -> Iterator[tuple[Any, float]]:
        """Lowers, again and again, the layer that costs least for each bit saved, as measured.

        Yields the tree at each budget, the largest first, and the seconds that led there.
        """
        widths = dict.fromkeys(self.rows, WIDTHS[-1])
        before = float(loss(self.tree(widths)))
        seconds = 0.0
        for budget in BUDGETS:
            began = time.perf_counter()
            while self._mean(widths) > budget:
                found = {}
                for row in self.rows:
                    index = WIDTHS.index(widths[row])
                    if index:
                        lower = widths | {row: WIDTHS[index - 1]}
                        saved = self.sizes[row] * (widths[row] - WIDTHS[index - 1])
                        value = float(loss(self.tree(lower)))
                        found[row] = ((value - before) / saved, value, lower)
                _, before, widths = min(found.values(), key=lambda entry: entry[0])
            seconds += time.perf_counter() - began
            yield self.tree(widths), seconds
