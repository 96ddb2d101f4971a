"""What the benchmarks share: timing, storing, models and data."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
pytest.importorskip("sklearn")

from benchmarks.lab import _data
from benchmarks.lab._jobs import Models, Settings
from benchmarks.lab._models import CNN, Model, Task, Transformer, tasks
from benchmarks.lab._steps import Contender, Step
from benchmarks.lab._store import Store, plain
from benchmarks.lab._timing import Spread, interleave, median_interval, paired_ratios
from benchmarks.lab._training import trained
from benchmarks.traces import _summary
from benchmarks.traces._sums import Sums

# Flax and optax promote implicitly.
pytestmark = [pytest.mark.standard_promotion, pytest.mark.slow]


# Timing and storing


def test_contenders_take_turns():
    calls = []

    def visit(name, seconds):
        def of_window(window):
            calls.append((name, window))
            return seconds * len(calls)  # a machine that slows down

        return of_window

    seconds = interleave({"a": visit("a", 1.0), "b": visit("b", 2.0)}, 50, 0.1, seed=3)
    rounds = [tuple(name for name, _ in calls[i : i + 2]) for i in range(0, 100, 2)]
    assert set(rounds) == {("a", "b"), ("b", "a")}
    assert all(window == 0.1 for _, window in calls)
    # Within a round the two differ by a call: after 100 calls a ratio is known to 2 %, of all
    # rounds' medians to less.
    assert abs(np.median(paired_ratios(seconds, "b", "a")) - 2) < 0.1
    assert Spread.of([3, 1, 2]) == (2, 1, 3)


@pytest.mark.parametrize("count", [6, 40, 200])
def test_medians_interval_covers(count):
    rng = np.random.default_rng(count)
    runs = 4000
    found = [median_interval(rng.exponential(size=count)) for _ in range(runs)]
    covered = np.mean([low <= np.log(2) <= high for low, high in found])
    # The least that order statistics can have from 95 % on; four standard errors of a share.
    assert 0.95 - 4 * (0.05 / runs) ** 0.5 < covered < 0.98 + 4 * (0.02 / runs) ** 0.5
    assert median_interval([1.0] * 5) is None


def test_store_measures_once_and_survives_a_cut(tmp_path):
    path = tmp_path / "kept.jsonl"
    store = Store(path, {"versions": {"jax": "1", "lama_optax": "1"}})
    assert store.run({"n": 1}, lambda: {"x": np.float32(math.nan)}) == {"x": None}
    assert store.run({"n": 2}, lambda: 5) == 5
    with path.open("ab") as file:
        file.write(b'{"unit": "cut')
    # Our own version does not make it another measurement.
    again = Store(path, {"versions": {"jax": "1", "lama_optax": "2"}})
    assert again.run({"n": 2}, lambda: 6) == 5
    assert again.run({"n": 3}, lambda: 7) == 7
    assert [json.loads(line)["unit"]["n"] for line in path.read_text().splitlines()] == [1, 2, 3]
    # Other versions, other numbers.
    assert Store(path, {"versions": {"jax": "2", "lama_optax": "1"}}).run({"n": 2}, lambda: 8) == 8


def test_plain_numbers_have_six_digits():
    assert plain({"a": (1 / 3, np.int64(2)), 3: Spread(1.0, math.inf, 2.0)}) == {
        "a": [0.333333, 2],
        "3": {"median": 1.0, "low": None, "high": 2.0},
    }


def test_running_sums_over_blocks_are_mean_and_variance():
    rng = np.random.default_rng(0)
    values = rng.normal(5, 1, (12, 3))
    parts, at = [], iter(values)
    for count in (5, 4, 3):
        sums = Sums(iter(range(100)))
        for _ in range(count):
            sums.visit(lambda seed: next(at), 0)
        parts.append(plain(sums.result()))
    merged = _summary.merge(parts)
    assert merged["count"] == 12
    # Six digits are kept of each part.
    np.testing.assert_allclose(merged["mean"], values.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(merged["squares"] / 11, values.var(axis=0, ddof=1), rtol=1e-4)


# Models and data


def test_tasks_are_what_the_tables_say():
    sizes = {}
    for name, task in tasks().items():
        leaves = jax.tree.leaves(jax.eval_shape(task.init))
        sizes[name] = sum(math.prod(leaf.shape) for leaf in leaves)
    assert sizes["moons"] == 65
    assert sizes["mlp"] == 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10
    assert 1_000_000 < sizes["transformer"] < 1_100_000


@pytest.mark.parametrize("loss", ["classes", "tokens"])
def test_batch_loss_is_the_mean_of_the_examples(loss):
    if loss == "classes":
        task = Task("cnn", "", CNN((2, 3)), lambda: _data.digits(8), loss, 4, 0)
    else:
        network = Transformer(depth=1, width=8, heads=2)
        task = Task("text", "", network, lambda: _data.characters(6), loss, 4, 0)
    params, batch = task.init(), task.minibatch(0)
    loss_fn = jax.jit(task.loss_fn)
    each = [loss_fn(params, tuple(array[i] for array in batch)) for i in range(4)]
    # float32, sums in another order.
    np.testing.assert_allclose(loss_fn(params, batch), np.mean(each), rtol=1e-5)


def test_data_are_what_they_are_said_to_be():
    small, labels = _data.digits(8)
    large, _ = _data.digits(28)
    assert small.shape == (1797, 8, 8, 1)
    assert large.shape == (1797, 28, 28, 1)
    assert set(labels) == set(range(10))
    # Bilinear weights sum to 1: the mean brightness stays, up to the pictures' edges.
    np.testing.assert_allclose(large.mean(), small.mean(), rtol=0.05)
    (tokens,) = _data.characters(16)
    assert tokens.min() >= 0
    assert tokens.max() < _data.NUM_TOKENS
    np.testing.assert_array_equal(tokens[0, 16], tokens[1, 0])  # the one that follows


def test_training_is_kept_and_used_again(tmp_path, monkeypatch):
    task = tasks(quick=True)["mlp"]
    first = trained(task, tmp_path)
    assert not np.array_equal(jax.tree.leaves(first.params)[1], jax.tree.leaves(task.init())[1])
    monkeypatch.setattr("benchmarks.lab._training._train", None)  # training would raise
    again = Models(Settings(tmp_path, ("mlp",), True, 0))
    again.folder = tmp_path
    jax.tree.map(np.testing.assert_array_equal, first.params, again["mlp"].params)


def test_step_starts_anew_and_makes_whole_intervals():
    task = tasks(quick=True)["mlp"]
    model = Model(task, task.init(), task.minibatch(0))
    seen = []
    counting = optax.GradientTransformation(
        lambda params: jnp.zeros((), jnp.int32),
        lambda updates, state, params=None: (updates, state + 1),
    )
    step = Step(model, Contender(counting, interval=3))
    run = step.run
    step.run = lambda steps: seen.append(steps) or run(steps)
    assert step.visit()(0) > 0
    assert seen == [3]
    # The first run says how many more fill the window; these follow without a pause.
    step.run = lambda steps: seen.append(steps) or 2.0 * steps
    assert step.visit()(25.0) == 2.0
    assert seen == [3, 3, 12]
    # Donated buffers are copies: the model's own parameters are still there.
    assert np.isfinite(float(model.value_fn(model.params)))


def test_torch_models_have_the_same_loss_and_gradient():
    torch = pytest.importorskip("torch")
    from benchmarks.traces._torch_model import TorchModel

    small = {
        "cnn": Task("cnn", "", CNN((2, 3)), lambda: _data.digits(8), "classes", 4, 0),
        "text": Task(
            "text",
            "",
            Transformer(depth=1, width=8, heads=2),
            lambda: _data.characters(6),
            "tokens",
            4,
            0,
        ),
    }
    for task in [*tasks(quick=True).values(), *small.values()]:
        model = Model(task, task.init(), task.minibatch(0))
        theirs = TorchModel(model)  # raises unless the losses agree
        grads = torch.autograd.grad(theirs.loss(), theirs.parameters)
        ours = jax.tree.leaves(jax.grad(model.value_fn)(model.params))
        sizes = [len(layer) for layer in theirs.layers.values()]
        # PyTorch's own modules have the weight first, and in another layout: layers are compared.
        squares = [
            [sum(float((g**2).sum()) for g in itertools.islice(own, size)) for size in sizes]
            for own in map(iter, (ours, grads))
        ]
        # float32: gradients are sums of terms that cancel.
        np.testing.assert_allclose(*squares, rtol=1e-4)
