"""The example scripts train and log, and one word changes the estimator."""

import importlib.util
import json
import math
import runpy
import sys

import pytest
from example_runs import EXAMPLES, finish

LAYERS = {
    "linen": {"BatchNorm_0", "BatchNorm_1", "Conv_0", "Conv_1", "Dense_0"},
    "nnx": {"first", "norm", "second", "head"},
    "eqx": {"layers/0", "layers/1", "layers/2"},
    "plain": {"dense_0", "dense_1"},
}


def read_log(folder):
    """The rows; each number in them is finite."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    return rows


def names(row, quantity):
    return {key.removeprefix(f"{quantity}/") for key in row if key.startswith(f"{quantity}/")}


@pytest.mark.parametrize(
    "script",
    ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in ("linen", "nnx", "eqx"))],
)
def test_a_script_trains_and_logs(script, tmp_path):
    (printed,) = finish((EXAMPLES / f"{script}.py", "--steps", 60, "--log", tmp_path), devices=1)
    assert printed.startswith("accuracy ")
    rows = read_log(tmp_path)
    assert [row["step"] for row in rows] == [0, 10, 20, 30, 40, 50]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    for row in rows:
        assert names(row, "curvature") == LAYERS[script]
    assert not names(rows[0], "curvature_std_error")  # one estimate alone has none
    assert names(rows[-1], "curvature_std_error") == LAYERS[script]
    if importlib.util.find_spec("tensorboardX"):
        assert any(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_the_language_model_is_drawn(tmp_path):
    finish((EXAMPLES / "transformer.py", "--steps", 12, "--log", tmp_path), devices=1)
    rows = read_log(tmp_path)
    assert [row["step"] for row in rows] == [0, 10, 11]
    assert len(names(rows[-1], "curvature_std_error")) == 36
    assert (tmp_path / "curvature.png").stat().st_size > 10_000


# They promote implicitly, as optax.adamw does.
@pytest.mark.standard_promotion
@pytest.mark.slow
def test_one_word_changes_the_estimator(tmp_path, monkeypatch):
    """The network is piecewise linear in each layer: Gauss-Newton is the Hessian, to rounding."""
    first = {}
    for estimator in ("fisher", "hutchinson", "flipout", "gauss_newton", "exact_trace"):
        folder = tmp_path / estimator
        arguments = ["--steps", "11", "--log", str(folder), "--estimator", estimator]
        monkeypatch.setattr(sys, "argv", ["plain.py", *arguments])
        runpy.run_path(str(EXAMPLES / "plain.py"), run_name="__main__")
        rows = read_log(folder)
        for row in rows:
            assert names(row, "curvature") == LAYERS["plain"]
        first[estimator] = [rows[0][f"curvature/{name}"] for name in sorted(LAYERS["plain"])]
    assert first["gauss_newton"] == pytest.approx(first["exact_trace"], rel=1e-4)
    # Estimates are other numbers: it is not one estimator that ran five times.
    others = [first[name] for name in ("fisher", "hutchinson", "flipout", "exact_trace")]
    assert len({tuple(values) for values in others}) == 4
