"""The benchmarks but `moons` and `study`, end to end."""

import json

import pytest

pytest.importorskip("flax")
pytest.importorskip("sklearn")

import benchmarks.cost.__main__ as cost
import benchmarks.noise_scale.__main__ as noise_scale
import benchmarks.rounding.__main__ as rounding
import benchmarks.traces.__main__ as traces
from benchmarks.lab._steps import ADAM, Step
from benchmarks.traces._sums import Sums

# Flax and optax promote implicitly.
pytestmark = [pytest.mark.standard_promotion, pytest.mark.slow]

QUICK = ["--quick", "--models", "mlp"]


@pytest.fixture(scope="module")
def quick_traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    assert traces.main([*QUICK, "--results", str(folder)]) == 0
    return folder


def test_traces_measure_and_report(quick_traces):
    names = {path.name for path in quick_traces.iterdir()}
    files = {"measurements.jsonl", "results.json", "results.txt"}
    assert names == {"gauss-newton.png", "hessian.png", "trained", *files}
    text = (quick_traces / "results.txt").read_text()
    for phrase in ("flipout block", "gradients", "matfree", "over the Hessian's"):
        assert phrase in text
    results = json.loads((quick_traces / "results.json").read_text())
    for matrix, one in (("hessian", "flipout block"), ("gauss-newton", "fisher")):
        model = results["matrices"][matrix]["mlp"]
        found = model["contenders"][one]
        assert found["count"] == 3  # a block of three rounds
        assert len(found["sd"]) == 2
        assert found["work"] == {"seconds": 1, "gradients": 1}
        assert model["compile"][one] > 0
        exact = model["contenders"]["gauss_newton"]
        assert exact["largest_z"] == exact["work"]["seconds"] == 0  # what others are held against
    assert len(results["over_hessian"]["mlp"]["ratio"]) == 2
    assert {"jax", "lama_optax"} <= set(results["context"]["versions"])
    assert str(quick_traces) not in json.dumps(results)


def test_finished_traces_are_not_measured_again(quick_traces, monkeypatch):
    before = (quick_traces / "measurements.jsonl").read_bytes()
    monkeypatch.setattr(Sums, "visit", None)  # measuring would raise
    assert traces.main([*QUICK, "--results", str(quick_traces)]) == 0
    assert (quick_traces / "measurements.jsonl").read_bytes() == before


def test_interrupted_run_keeps_what_was_finished(quick_traces, tmp_path, monkeypatch, capsys):
    """Cut within the third unit: the same command measures that, what follows and no other."""
    # Of each matrix compilation and a block; of the Hessian a reference, which is the third.
    whole = (quick_traces / "measurements.jsonl").read_bytes().splitlines(keepends=True)
    folder = tmp_path / "cut"
    (folder / "trained").mkdir(parents=True)
    trained_file = quick_traces / "trained" / "mlp.npz"
    (folder / "trained" / "mlp.npz").write_bytes(trained_file.read_bytes())
    kept = b"".join(whole[:2])
    (folder / "measurements.jsonl").write_bytes(kept + whole[2][:40])

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.traces._reference.reference", interrupted)
        assert traces.main([*QUICK, "--results", str(folder)]) == 130
    assert "goes on" in capsys.readouterr().err
    assert (folder / "measurements.jsonl").read_bytes() == kept

    assert traces.main([*QUICK, "--results", str(folder)]) == 0
    again = (folder / "measurements.jsonl").read_bytes().splitlines(keepends=True)
    # References keep no times: from the same seed it is the same.
    assert again[:3] == whole[:3]
    assert len(again) == len(whole) == 5


def test_cost_measures_and_reports(tmp_path, monkeypatch):
    folder = tmp_path / "cost"
    options = [*QUICK, "--results", str(folder)]
    assert cost.main(options) == 0
    names = {path.name for path in folder.iterdir()}
    assert {"steps.png", "results.txt", "results.json"} <= names
    text = (folder / "results.txt").read_text()
    for phrase in (
        "track_curvature(fisher())",
        "compile, s",
        "over that of a gradient",
        "below 10",
    ):
        assert phrase in text
    results = json.loads((folder / "results.json").read_text())
    assert results["models"]["mlp"]["steps"][ADAM]["over_adam"] == 1

    before = (folder / "measurements.jsonl").read_bytes()
    monkeypatch.setattr(Step, "run", None)  # measuring would raise
    assert cost.main(options) == 0
    assert (folder / "measurements.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("benchmark", "phrases", "pictures"),
    [
        (noise_scale, ["Tracked over true", "signs, every 50"], set()),
        (rounding, ["validation data", "greedy"], {"prediction.png", "rises.png"}),
    ],
)
def test_quick_look_reports(benchmark, phrases, pictures, tmp_path):
    assert benchmark.main([*QUICK, "--results", str(tmp_path)]) == 0
    text = (tmp_path / "results.txt").read_text()
    assert all(phrase in text for phrase in phrases)
    assert pictures <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("main", [cost.main, traces.main])
@pytest.mark.parametrize(
    "options", [["--models", "mlp,alexnet"], ["--seed", "-1"], ["--results", __file__]]
)
def test_wrong_option_is_named(main, options, capsys):
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2
    assert f"argument {options[0]}: " in capsys.readouterr().err
