"""The main job, `python -m benchmarks.moons`: what it trains on, what it writes, how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
pytest.importorskip("sklearn")

from benchmarks.lab._statistics import mean_interval
from benchmarks.moons._data import Classifier, batch_weights, cross_entropy, make_runs
from benchmarks.moons._settings import Settings, parse
from benchmarks.moons._train import ARMS, Trainer, train_one

ROOT = Path(__file__).parents[1]

# Flax and optax.adam promote implicitly.
pytestmark = pytest.mark.standard_promotion


def command(results, *options):
    """Runs the command in a process of its own, without LLVM's slow optimizations."""
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_NUM_CPU_DEVICES": "2"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "benchmarks.moons", "--results", results, *options],
        cwd=ROOT,
        env=os.environ | flags | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("moons")
    run = command(directory, "--seeds", "3", "--epochs", "2", "--grid-points", "2")
    assert run.returncode == 0, run.stderr
    return directory, run.stdout


@pytest.mark.slow
def test_command_writes_figures_and_tables(finished):
    directory, printed = finished
    names = {path.name for path in directory.iterdir()}
    assert names == {
        "curvature.png",
        "decision_boundaries.png",
        "learning_rates.png",
        "loss_curves.png",
        "results.json",
        "results.txt",
    }
    assert (directory / "results.txt").read_text().strip() in printed
    for phrase in ("the paper, one seed", "seed 42", "mean of 3 seeds", "Tuned against tuned"):
        assert phrase in printed


@pytest.mark.slow
def test_results_carry_settings_versions_machine_and_every_seed(finished):
    results = json.loads((finished[0] / "results.json").read_text())
    assert results["settings"]["seeds"] == 3
    assert results["settings"]["sensitivity"] == 0.01
    assert {
        "python",
        "jax",
        "jaxlib",
        "optax",
        "flax",
        "numpy",
        "scikit-learn",
        "lama_optax",
    } <= set(results["versions"])
    assert {"processor", "cores", "system"} <= set(results["machine"])
    assert set(results["optimizers"]) == set(ARMS)
    for arm in results["optimizers"].values():
        assert len(arm["accuracy_by_seed"]) == 3
        assert len(arm["loss_by_epoch"]) == 2
    assert results["layers"] == ["Dense_0", "Dense_1"]
    assert set(results["traces"]) == {"initial", "trained"}
    assert len(results["grid"]["rates"]) == 2
    assert str(finished[0]) not in json.dumps(results)  # no paths of the machine


@pytest.mark.slow
def test_divergence_ends_with_status_2_and_words(tmp_path):
    options = ["--seeds", "2", "--epochs", "20", "--no-grid", "--loss-scale", "1000"]
    run = command(tmp_path, *options, "--sensitivity", "1000", "--max-momentum", "none")
    assert run.returncode == 2, run.stderr
    words = " ".join(run.stdout.split())
    assert "DIVERGED: LAMA-Adam, exact HVP, 2 of 2 seeds" in words
    assert "alpha b1 reached 1 or more in Dense_0 (alpha b1 = 1.350)" in words
    assert not (tmp_path / "learning_rates.png").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--seeds", "0"],
        ["--epochs", "x"],
        ["--max-momentum", "1.5"],
        ["--momentum", "fast"],
        ["--learning-rate", "nan"],
    ],
)
def test_wrong_option_is_named(options, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(options)
    assert ended.value.code == 2
    assert f"argument {options[0]}: " in capsys.readouterr().err


def test_defaults_are_the_papers():
    settings = parse([])
    assert settings == Settings()
    assert (settings.learning_rate, settings.probes, settings.fd_step) == (0.001, 10, 0.01)
    assert parse(["--max-momentum", "none"]).max_momentum is None
    assert parse(["--sensitivity", "-10"]).sensitivity == -10


SMALL = Settings(seeds=3, epochs=2)


@pytest.mark.slow
def test_runs_do_not_depend_on_how_many_there_are():
    """Seed 42 is the same run whatever --seeds says, and twice the same."""
    few, more = make_runs(SMALL), make_runs(Settings(seeds=5, epochs=2))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:3]), few, more)
    starts = np.asarray(few.params["params"]["Dense_0"]["kernel"])
    assert len(np.unique(starts)) == starts.size  # each seed has a start of its own
    assert not np.array_equal(few.batches[0], few.batches[1])


def test_initialisation_is_the_papers_frameworks():
    """Uniform on +-1/sqrt(fan_in), kernels and biases: fan_in is 2, then 16."""
    params = make_runs(Settings(seeds=100, epochs=1)).params["params"]
    for layer, fan_in in (("Dense_0", 2), ("Dense_1", 16)):
        for leaf in params[layer].values():
            scaled = np.asarray(leaf) * fan_in**0.5
            assert np.abs(scaled).max() <= 1
            # 100 draws or more: the largest is above 0.9 but once in 0.9^-100 times; the mean of
            # u^2 is 1/3 with a standard error of 0.03.
            assert np.abs(scaled).max() > 0.9
            assert abs(np.mean(scaled**2) - 1 / 3) < 0.15


def test_every_epoch_sees_every_point_once_and_pads_the_last_batch():
    runs = make_runs(SMALL)
    weights = batch_weights(700, 64)
    assert weights.shape == runs.batches.shape[2:] == (11, 64)
    assert weights.sum(axis=1).tolist() == [64] * 10 + [60]
    for epoch in runs.batches.reshape(-1, 704):
        assert sorted(epoch[weights.ravel() == 1].tolist()) == list(range(700))


def test_loss_of_a_padded_batch_is_the_mean_over_its_points():
    runs = make_runs(SMALL)
    model, params = Classifier(16), jax.tree.map(lambda a: a[0], runs.params)
    x, y = (a[0][runs.batches[0, 0, -1]] for a in (runs.x_train, runs.y_train))
    padded = cross_entropy(model, params, x, y, jnp.asarray(batch_weights(700, 64)[-1]))
    probability = jax.nn.sigmoid(model.logits(params, x[:60]))
    plain = -np.mean(np.where(y[:60] == 1, np.log(probability), np.log(1 - probability)))
    np.testing.assert_allclose(padded, plain, rtol=1e-5)  # float32, logarithms of a sigmoid


@pytest.mark.slow
def test_training_is_the_loop_that_a_reader_would_write():
    run = jax.tree.map(lambda a: a[0], make_runs(SMALL))
    history = jax.jit(lambda run: train_one(run, 1e-3, 0.01, arm="adam", settings=SMALL))(run)

    tx, model = optax.adam(1e-3), Classifier(16)

    @jax.jit
    def loss(p, x, y):
        return jnp.mean(optax.sigmoid_binary_cross_entropy(model.logits(p, x), y))

    params, state, epochs = run.params, tx.init(run.params), []
    for batches in run.batches:
        losses = []
        for number, batch in enumerate(batches):
            indices = batch if number < 10 else batch[:60]
            value, grads = jax.value_and_grad(loss)(
                params, run.x_train[indices], run.y_train[indices]
            )
            updates, state = tx.update(grads, state)
            params = optax.apply_updates(params, updates)
            losses.append(value)
        epochs.append(np.mean(losses))
    # 22 steps in float32, of sums taken in another order.
    np.testing.assert_allclose(history.loss, epochs, rtol=1e-5)


@pytest.mark.slow
def test_lama_with_alpha_1_has_adams_curve():
    """Paired seeds: the same start, the same batches, so the same curve; 3 seeds pad a block."""
    trainer = Trainer(Settings(seeds=3, epochs=3, alpha_min=1.0, alpha_max=1.0, probes=1))
    (block,) = trainer.blocks(3)
    adam, _ = trainer.train_block("adam", block, 1e-3, 0.01)
    lama, seconds = trainer.train_block("lama", block, 1e-3, 0.01)
    assert adam.loss.shape == lama.loss.shape == (3, 3)
    np.testing.assert_array_equal(adam.initial_loss, lama.initial_loss)
    # The same arithmetic; XLA fuses the two programs differently.
    np.testing.assert_allclose(adam.loss, lama.loss, rtol=1e-5)
    assert (lama.layers.alpha == 1).all()
    np.testing.assert_allclose(lama.layers.gain, 1, rtol=1e-5)
    assert seconds > 0


def test_interval_is_students():
    interval = mean_interval(np.array([1.0, 2.0, 3.0]))
    assert interval.mean == 2
    # t(0.975, 2) = 4.302653, standard error 1/sqrt(3)
    np.testing.assert_allclose([interval.low, interval.high], [2 - 2.48414, 2 + 2.48414], rtol=1e-5)
    assert np.isnan(mean_interval(np.array([1.0])).low)
