"""What is trained: a language model, digits, a physics-informed network and a policy gradient."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lab import _corpus as corpus
from benchmarks.lab import _data as data
from benchmarks.lab._gpt import GPT
from benchmarks.lab._models import CNN
from lama_optax import supervised

PyTree = Any
Parts = dict[str, PyTree]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and its data. Fields are numbers and words, so that a result line can name them."""

    name: str
    title: str
    studies: int
    arms: tuple[str, ...]
    steps: int
    batch: int
    width: int
    b2: float = 0.999
    decay: float = 0.01  # decoupled weight decay of the arms that do not tune it
    interval: int = 10  # steps from one of LAMA's estimates to the next
    margin: float | None = None  # None: a loss, judged on its logarithm; else points that matter

    def parts(self, study: int) -> Parts:
        """The study's own ``train``, ``validation`` and ``test``; the last two of one shape."""
        raise NotImplementedError

    def batches(self, train: PyTree, rng: np.random.Generator) -> PyTree:
        """All batches of a run, with a leading axis of steps."""
        raise NotImplementedError

    def init(self, key: jax.Array) -> PyTree:
        """Initial parameters."""
        raise NotImplementedError

    def prepare(self, params: PyTree, batch: PyTree) -> PyTree:
        """The batch as loss and estimator take it."""
        return batch

    def task(self, batch: PyTree) -> dict[str, Any]:
        """What `supervised` makes of the model and a batch."""
        raise NotImplementedError

    def loss(self, params: PyTree, batch: PyTree) -> jax.Array:
        """What is trained."""
        value: jax.Array = self.task(batch)["value_fn"](params)
        return value

    def measure(self, params: PyTree, part: PyTree) -> jax.Array:
        """What is judged, the less the better."""
        return self.loss(params, part)

    def score(self, measured: Any) -> Any:
        """What differences are taken of: the logarithm of a loss, or points."""
        return measured if self.margin else np.log(measured)

    def shown(self, difference: Any) -> Any:
        """A difference of scores as people read it: % of the loss, or points of return."""
        return -np.asarray(difference) if self.margin else 100 * np.expm1(difference)


class Language(Workload):
    """The next byte of source code: a GPT of 4 blocks, context 64."""

    context = 64
    judged = 192  # windows of validation, and of test

    @property
    def apply_fn(self) -> Callable[..., Any]:
        """Logits of bytes."""
        return GPT(self.width).apply

    def parts(self, study: int) -> Parts:
        """Files apart, see the corpus; what is judged are windows at equal distances."""
        bytes_of = corpus.split(study)
        found: Parts = {"train": bytes_of["train"]}
        for name in ("validation", "test"):
            ends = np.linspace(0, bytes_of[name].size - self.context - 1, self.judged)
            found[name] = self._windows(bytes_of[name], ends.astype(np.int64))
        return found

    def _windows(self, text: np.ndarray, places: np.ndarray) -> np.ndarray:
        return text[places[..., None] + np.arange(self.context + 1)].astype(np.int32)

    def batches(self, train: PyTree, rng: np.random.Generator) -> PyTree:
        """Windows at random places."""
        high = train.size - self.context
        return self._windows(train, rng.integers(high, size=(self.steps, self.batch)))

    def init(self, key: jax.Array) -> PyTree:
        """As Flax starts them."""
        return GPT(self.width).init(key, jnp.zeros((1, self.context), jnp.int32))

    def task(self, batch: PyTree) -> dict[str, Any]:
        """Cross-entropy of every next byte."""
        return supervised(self.apply_fn, batch[..., :-1], batch[..., 1:])


class Digits(Workload):
    """A convolutional network on scikit-learn's digits under pixel noise, anew at every step.

    Without noise the held-out loss is near 0, and its logarithm is the luck of few pictures.
    """

    noise = 0.5  # pixels are in [0, 1]

    @property
    def network(self) -> CNN:
        """Two convolutions and a dense layer."""
        return CNN((self.width, 2 * self.width))

    def parts(self, study: int) -> Parts:
        """3 of 5 pictures train, 1 of 5 selects, 1 of 5 tests, the last two four times each."""
        pictures, labels = data.digits(8)
        rng = np.random.default_rng([study, 3])
        order = rng.permutation(len(labels))
        fifth = len(order) // 5
        found: Parts = {"train": (pictures[order[2 * fifth :]], labels[order[2 * fifth :]])}
        for i, name in enumerate(("validation", "test")):
            rows = np.tile(order[i * fifth : (i + 1) * fifth], 4)
            found[name] = self._noisy(pictures[rows], rng), labels[rows]
        return found

    def _noisy(self, pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return pictures + self.noise * rng.standard_normal(pictures.shape, np.float32)

    def batches(self, train: PyTree, rng: np.random.Generator) -> PyTree:
        """Rows drawn with replacement."""
        rows = rng.integers(len(train[1]), size=(self.steps, self.batch))
        return self._noisy(train[0][rows], rng), train[1][rows]

    def init(self, key: jax.Array) -> PyTree:
        """As Flax starts them."""
        return self.network.init(key, jnp.zeros((1, 8, 8, 1)))

    def task(self, batch: PyTree) -> dict[str, Any]:
        """Cross-entropy of the classes."""
        apply_fn: Callable[..., Any] = self.network.apply
        return supervised(apply_fn, *batch)


def _init_mlp(key: jax.Array, sizes: tuple[int, ...]) -> PyTree:
    lecun, zeros = jax.nn.initializers.lecun_normal(), jnp.zeros
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = itertools.pairwise(sizes)
    return {
        f"dense_{i}": {"kernel": lecun(own, shape), "bias": zeros(shape[1])}
        for i, (own, shape) in enumerate(zip(keys, shapes, strict=True))
    }


def _mlp(params: PyTree, x: jax.Array) -> jax.Array:
    *hidden, last = params.values()  # jit keeps the order: dense_0, dense_1, ...
    for layer in hidden:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def _solution(params: PyTree, x: jax.Array) -> jax.Array:
    """The network times a bump: 0 on the square's edge, whatever the parameters."""
    return jnp.prod(x * (1 - x), axis=-1) * _mlp(params, 2 * x - 1)[..., 0]


def _laplacian(params: PyTree, x: jax.Array) -> jax.Array:
    """Of every point, shape (n, 1)."""
    hessian = jax.hessian(_solution, argnums=1)
    return jax.vmap(lambda point: jnp.trace(hessian(params, point)))(x)[:, None]


class Poisson(Workload):
    """A physics-informed network: Laplace u = f on the unit square, u = 0 on its edge.

    Every study has its own f, of 36 sine waves, whose solution is known. What is trained is the
    squared residual at random points, what is judged the squared error of u over its mean square.
    """

    judged = 1024
    frequencies = 6

    def parts(self, study: int) -> Parts:
        """The waves' coefficients, for a mean square of f of 1; points and the solution there."""
        rng = np.random.default_rng([study, 5])
        waves = rng.normal(size=(self.frequencies, self.frequencies))
        waves *= 2 / np.sqrt(np.sum(waves**2))  # the mean square of sine times sine is 1/4
        found: Parts = {"train": waves}
        for name in ("validation", "test"):
            points = rng.uniform(size=(self.judged, 2))
            found[name] = points.astype(np.float32), self._waves(waves, points)[0]
        return found

    @staticmethod
    def _waves(waves: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The solution u and its Laplacian f."""
        j = np.arange(1, len(waves) + 1)
        x, y = (np.sin(np.pi * j * points[..., i, None]) for i in (0, 1))
        roots = np.pi**2 * (j[:, None] ** 2 + j**2)
        u = np.einsum("...j,jk,...k->...", x, waves / roots, y)
        f = -np.einsum("...j,jk,...k->...", x, waves, y)
        return u.astype(np.float32), f.astype(np.float32)

    def batches(self, train: PyTree, rng: np.random.Generator) -> PyTree:
        """Fresh points at every step, and f there."""
        points = rng.uniform(size=(self.steps, self.batch, 2)).astype(np.float32)
        return points, self._waves(train, points)[1][..., None]

    def init(self, key: jax.Array) -> PyTree:
        """Two hidden layers, tanh."""
        return _init_mlp(key, (2, self.width, self.width, 1))

    def task(self, batch: PyTree) -> dict[str, Any]:
        """The squared residual."""
        return supervised(_laplacian, *batch, loss="squared_error")

    def measure(self, params: PyTree, part: PyTree) -> jax.Array:
        """The squared error of u over its mean square."""
        points, solution = part
        return jnp.mean((_solution(params, points) - solution) ** 2) / jnp.mean(solution**2)


class CartPole(Workload):
    """A policy gradient: REINFORCE on the pole of Barto, Sutton and Anderson (1983).

    The return is the number of moves for which the pole stands, at most 500. What is judged is the
    negative of its mean over the run, since in the end all that learn at all stand. Curvature is
    that of the policy's own distribution (its Fisher matrix).
    """

    horizon = 500
    judged = 64

    def parts(self, study: int) -> Parts:
        """Seeds of the episodes that are judged."""
        seeds = np.random.default_rng([study, 11]).integers(2**31, size=2)
        return {"train": None, "validation": seeds[0], "test": seeds[1]}

    def batches(self, train: PyTree, rng: np.random.Generator) -> PyTree:
        """A seed a step."""
        return rng.integers(2**31, size=self.steps)

    def init(self, key: jax.Array) -> PyTree:
        """One hidden layer, tanh."""
        return _init_mlp(key, (4, self.width, 2))

    def episodes(self, params: PyTree, seed: jax.Array, count: int) -> dict[str, jax.Array]:
        """Plays the policy as it is; arrays are (horizon, count), ``alive`` 1 before the fall."""
        start, moves = jax.random.split(jax.random.key(seed))
        state = jax.random.uniform(start, (count, 4), minval=-0.05, maxval=0.05)

        def move(carry: Any, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
            state, alive = carry
            action = jax.random.categorical(key, _mlp(params, state))
            seen = {"state": state, "action": action, "alive": alive}
            state = _pole(state, action)
            fell = (jnp.abs(state[:, 0]) > 2.4) | (jnp.abs(state[:, 2]) > 12 * jnp.pi / 180)
            return (state, alive * (1 - fell)), seen

        keys = jax.random.split(moves, self.horizon)
        return jax.lax.scan(move, (state, jnp.ones(count)), keys)[1]

    def prepare(self, params: PyTree, batch: PyTree) -> PyTree:
        """Episodes, with the discounted return to go, standardised over all their moves."""
        seen = self.episodes(params, batch, self.batch)
        alive = seen["alive"]

        def to_go(later: jax.Array, reward: jax.Array) -> tuple[jax.Array, jax.Array]:
            total = reward + 0.99 * later
            return total, total

        returns = jax.lax.scan(to_go, jnp.zeros(self.batch), alive, reverse=True)[1]
        centred = (returns - jnp.sum(returns * alive) / jnp.sum(alive)) * alive
        scale = jnp.sqrt(jnp.sum(centred**2) / jnp.sum(alive))
        return seen | {"advantage": centred / (scale + 1e-6)}

    def task(self, batch: PyTree) -> dict[str, Any]:
        """The policy as a classifier of its own moves."""
        return supervised(_mlp, batch["state"], batch["action"], weights=batch["alive"])

    def loss(self, params: PyTree, batch: PyTree) -> jax.Array:
        """The moves' negative log likelihood, weighed by their advantage."""
        losses, weights = self.task(batch)["losses_fn"](params)
        return jnp.sum(losses * weights * batch["advantage"]) / jnp.sum(weights)

    def measure(self, params: PyTree, part: PyTree) -> jax.Array:
        """The mean return's negative."""
        return -jnp.sum(self.episodes(params, part, self.judged)["alive"]) / self.judged


def _pole(state: jax.Array, action: jax.Array) -> jax.Array:
    """A move of 0.02 s under a push of 10 N: cart 1 kg, pole 0.1 kg, half a metre to its middle."""
    _, speed, angle, turning = state.T
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    push = (jnp.where(action == 1, 10.0, -10.0) + 0.05 * turning**2 * sine) / 1.1
    bend = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    change = jnp.stack([speed, push - 0.05 * bend * cosine / 1.1, turning, bend], axis=-1)
    return state + 0.02 * change


_MAIN = ("A", "A'", "M", "L", "E")
_SMALL = ("A", "A'", "M", "L", "LAM weight", "LAM layer", "AMSGrad", "RAdam")


def workloads(quick: bool, steps: int | None, width: int | None) -> dict[str, Workload]:
    """All workloads; tiny ones for a quick look. ``steps`` and ``width`` replace the usual."""
    found: tuple[Workload, ...] = (
        Language("gpt", "GPT, bytes of Optax's source", 8, _MAIN, 1000, 16, 96, b2=0.95, decay=0.1),
        Digits("cnn", "CNN, noisy digits", 10, _SMALL, 400, 64, 8),
        Poisson("pinn", "physics-informed network, Poisson", 10, _SMALL, 1000, 64, 32),
        CartPole(
            "cartpole", "policy gradient, cart-pole", 10, _SMALL, 60, 32, 32, interval=5, margin=5
        ),
    )
    changes: dict[str, Any] = {"studies": 2, "steps": 20, "batch": 4, "width": 4} if quick else {}
    changes |= {"steps": steps} if steps is not None else {}
    changes |= {"width": width} if width is not None else {}
    return {workload.name: dataclasses.replace(workload, **changes) for workload in found}
