"""The study's engine: equal trials, pairing, resumption, and the quick run from end to end."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("sklearn")

from benchmarks.study import _language, _plan, _questions
from benchmarks.study._arms import Arm, make_arm
from benchmarks.study._axes import Axis, edges, first_round, next_round
from benchmarks.study._headroom import SEARCHES
from benchmarks.study._programs import PROGRAMS
from benchmarks.study._run import run_phases
from benchmarks.study._settings import ARMS, CONTROLS, WORKLOADS, parse
from benchmarks.study._store import Store
from benchmarks.study._train import CHECKPOINTS, History, Trainer
from benchmarks.study._tune import _grid, best_trial
from benchmarks.study._workload import make_run
from benchmarks.study._workloads import all_workloads

ROOT = Path(__file__).parents[1]

# Flax and optax promote implicitly.
pytestmark = [pytest.mark.standard_promotion, pytest.mark.slow]


class FakeTrainer(Trainer):
    """Trains nothing: a smooth valley over the rate, with an optimum of its own for each seed."""

    count = 0

    def __call__(self, name, program, jobs, done=lambda runs: None):
        losses = []
        for hypers, seed in jobs:
            rate = np.log10(np.mean(hypers.get("lr", 1e-3)))
            losses.append(0.5 + (rate + 2 + seed % 7 / 10) ** 2 / 10)
        losses = np.array(losses)
        curve = losses[:, None] + np.linspace(1, 0, CHECKPOINTS)
        layers = {}
        if name.startswith(("lama", "v", "num", "probe", "sc", "hvp", "layers ")):
            keys = ("q", "momentum") if name[0] == "v" else ("curvature", "alpha", "gain")
            layers = {key: np.ones((len(jobs), CHECKPOINTS, self.groups.count)) for key in keys}
        done(len(jobs))
        FakeTrainer.count += len(jobs)
        start = np.full(len(jobs), 5.0)
        return History(start, curve, losses, 1 - losses, losses / 2, layers), 0.5


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(_plan, "Trainer", FakeTrainer)
    monkeypatch.setattr(_questions, "Trainer", FakeTrainer)
    monkeypatch.setattr(FakeTrainer, "count", 0)


def settings(results, *options):
    return parse(["all", "--results", str(results), "--workloads", "wine", *options])


def lines(results, **values):
    return Store(results, "wine").find(**values)


def test_every_arm_gets_the_same_trials_until_no_optimum_is_at_an_edge(fake, tmp_path):
    run_phases(settings(tmp_path), ["tune", "final", "headroom"])
    tried = {arm: lines(tmp_path, kind="tune", arm=arm) for arm in ARMS}
    assert len({len(found) for found in tried.values()}) == 1
    assert len(tried["adam"]) % 24 == 0
    # v1 has two values of lambda in the first round: its best is at an edge, and all go on.
    assert len(tried["adam"]) >= 48
    for arm, found in tried.items():
        assert len({json.dumps(line["hypers"]) for line in found}) == len(found), arm
        (last,) = lines(tmp_path, kind="final", arm=arm)
        scores = [np.mean(line["validation_loss"]) for line in found]
        chosen = [line["hypers"] for line in found].index(last["hypers"])
        # The best, or one inside the grid that is as good to a tenth of a percent.
        assert scores[chosen] <= (1.001 if not last["edge"] else 1) * min(scores)
        assert last["selected_from"] == len(found)
        assert not set(last["seeds"]) & set(found[0]["seeds"])
        # Refined around log10(lr) = -2.3, the valley's mean over the tuning seeds.
        assert abs(np.log10(last["hypers"]["lr"]) + 2.26) < 0.12 or arm.startswith("v3")
    for control, of in CONTROLS.items():
        (line,) = lines(tmp_path, kind="final", arm=control)
        assert line["control_of"] == of
    searches = lines(tmp_path, kind="headroom")
    assert [line["search"] for line in searches] == list(SEARCHES)
    assert len({line["trials"] for line in searches}) == 1


def test_an_arm_that_comes_later_gets_as_many_trials(fake, tmp_path):
    """v1's first optimum is at an edge, adam's is not: alone it would stop after one round."""
    run_phases(settings(tmp_path, "--arms", "v1"), ["tune"])
    run_phases(settings(tmp_path, "--arms", "v1,adam"), ["tune"])
    first, later = (len(lines(tmp_path, kind="tune", arm=arm)) for arm in ("v1", "adam"))
    assert first == later > 24


def test_controls_are_what_they_say(fake, tmp_path):
    run_phases(settings(tmp_path, "--arms", "adam,lama"), ["tune", "final"])
    (lama,) = lines(tmp_path, kind="final", arm="lama")
    found = {
        name: lines(tmp_path, kind="final", arm=name)[0]["hypers"]
        for name in CONTROLS
        if CONTROLS[name] == "lama"
    }
    assert found["lama_flipped"] == lama["hypers"] | {"sensitivity": -lama["hypers"]["sensitivity"]}
    assert found["lama_shuffled"] == lama["hypers"] | {"shift": 1}
    # The fake's alpha and gain are 1: Adam at LAMA's rate, whichever way it is written.
    adam = {"decay": [0.9, 0.9], "weight": [0.1, 0.1], "correction": [0.9, 0.9]}
    assert (
        found["lama_frozen"] == found["adam_matched"] == adam | {"lr": [lama["hypers"]["lr"]] * 2}
    )


def timeless(content):
    """The lines without their seconds, which are a share of what ran together."""
    found = [json.loads(row) for row in content.splitlines()]
    return [
        {key: x for key, x in line.items() if key not in ("seconds", "microseconds_per_step")}
        for line in found
    ]


def test_resumed_after_a_cut_nothing_is_lost_or_run_twice(fake, tmp_path):
    asked = settings(tmp_path, "--arms", "adam,lama,adam_b1", "--quick")
    run_phases(asked, ["tune", "final", "headroom"])
    path = tmp_path / "wine.jsonl"
    whole, all_runs = path.read_bytes(), FakeTrainer.count
    run_phases(asked, ["tune", "final", "headroom"])
    assert path.read_bytes() == whole
    assert FakeTrainer.count == all_runs

    rows = whole.splitlines(keepends=True)
    for kept in (0, 5, 30, len(rows) - 1):
        FakeTrainer.count = 0
        path.write_bytes(b"".join(rows[:kept]) + rows[kept][:40])  # cut within a line
        run_phases(asked, ["tune", "final", "headroom"])
        assert timeless(path.read_bytes()) == timeless(whole)
        done_before = sum(len(json.loads(row)["seeds"]) for row in rows[:kept])
        # A search's line stands for its trials too.
        if kept <= 30:
            assert FakeTrainer.count == all_runs - done_before


def test_questions_are_answered_once(fake, tmp_path):
    asked = dataclasses.replace(settings(tmp_path, "--arms", "lama"), workloads=("breast_cancer",))
    run_phases(asked, ["tune", "questions"])
    store = Store(tmp_path, "breast_cancer")
    by_question = {}
    for line in store.find(kind="question"):
        by_question.setdefault(line["question"], []).append(line["value"])
        assert len(line["test_loss"]) == 50
    assert by_question["num_probes"] == [1, 2, 4, 8, 16, 32, 64]
    assert set(by_question) == {
        *("num_probes", "probe", "scope", "hvp", "update_interval", "curvature_decay"),
        *("sensitivity", "sensitivity_retuned", "alpha_range", "layers", "schedule", "learned"),
    }
    count = FakeTrainer.count
    run_phases(asked, ["questions"])
    assert FakeTrainer.count == count


@pytest.mark.parametrize("trials", [12, 24])
@pytest.mark.parametrize("name", ARMS)
def test_grids_have_as_many_points_as_trials(name, trials):
    arm = make_arm(name, trials)
    grid = first_round(arm.axes)
    assert len(grid) == trials
    # A best trial in the middle of every axis, and one in a corner.
    for best in (grid[len(grid) // 2], grid[0], grid[-1]):
        following = next_round(arm.axes, grid, best, 1)
        assert len({json.dumps(trial) for trial in following}) == trials
        assert not [trial for trial in following if trial in grid]
    assert set(arm.fixed) | {axis.name for axis in arm.axes} <= set(PROGRAMS[arm.program].hypers)


def test_an_edge_is_followed_outward_and_a_bound_is_none():
    rate = Axis("lr", "log", -4, -1, 4)
    momentum = Axis("b1", "momentum", 0, 1, 2, (0.0, 4.0))
    grid = first_round([rate, momentum])
    best = {"lr": 0.1, "b1": 0.0}
    assert best in grid
    assert edges([rate, momentum], grid, best) == ["lr"]
    further = next_round([rate, momentum], grid, best, 1)
    assert min(trial["lr"] for trial in further) > 0.1
    inside = {"lr": 0.01, "b1": 0.9}
    assert edges([rate, momentum], grid, inside) == ["b1"]
    around = [trial["lr"] for trial in next_round([rate, momentum], grid, inside, 1)]
    assert min(around) > 0.001
    assert max(around) < 0.1


def searched(axes, loss, rounds=8):
    """The rounds of a search: the best after each, whether inside, and all that was tried."""
    arm, known, bests = Arm("adam", "adam", tuple(axes)), [], []
    for number in range(rounds):
        for hypers in _grid(arm, known, number):
            scored = {"hypers": hypers, "validation_loss": [loss(hypers)], "diverged": [False]}
            known.append(scored | {"round": number})
        best = best_trial(arm, known)["hypers"]
        bests.append((best, not edges(axes, [line["hypers"] for line in known], best)))
    return bests


def test_a_search_arrives_at_a_bound_and_follows_a_ridge():
    """Steps that shrink never reach nu = 0; a narrow lr cannot follow lr = gamma / 100."""
    rate, nu = Axis("lr", "log", -4, 0, 8), Axis("nu", "linear", 0.6, 0.9, 2, (0.0, 1.0))
    found = searched([rate, nu], lambda h: 1 + h["nu"] + (np.log10(h["lr"]) + 2) ** 2)
    assert found[3][0]["nu"] == 0
    assert found[3][1]
    gamma = Axis("gamma", "log", -3, -1, 3)

    def ridge(h):
        lr, g = np.log10(h["lr"]), np.log10(h["gamma"])
        return 1 + 0.2 * (lr - g + 2) ** 2 + 0.05 * (g - 2) ** 2

    best, inside = searched([rate, gamma], ridge)[-1]
    assert inside
    assert ridge(best) < 1.1  # 1.14 if all axes are refined in every round, 1.45 after the first


def test_a_flat_direction_has_no_edge():
    rate, gamma = Axis("lr", "log", -4, 0, 8), Axis("gamma", "log", -3, -1, 3)

    def flat(slope):
        def loss(h):
            return 1 + (np.log10(h["lr"]) + 2) ** 2 - slope * np.log10(h["gamma"])

        return searched([rate, gamma], loss, rounds=3)[-1]

    assert flat(0.0001)[1]
    assert not flat(0.01)[1]


@pytest.mark.parametrize("name", [w for w in WORKLOADS if w != "cartpole"])
def test_a_seed_decides_split_start_and_batches(name):
    """Nothing else enters `make_run`: arms and their hyper-parameters cannot."""
    workload = all_workloads()[name]
    first, again, other = (make_run(workload, seed) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for part in ("data", "params"):
        pairs = zip(*(jax.tree.leaves(getattr(run, part)) for run in (first, other)), strict=True)
        assert any((a != b).any() for a, b in pairs)
    if name != "pinn":  # full batch
        assert (first.batches != other.batches).any()
        assert len(first.batches) == workload.steps


@pytest.mark.parametrize("name", ["digits_mlp", "breast_cancer", "wine", "diabetes"])
def test_parts_are_disjoint_and_scaled_by_the_training_part(name):
    data = make_run(all_workloads()[name], 1).data
    sizes = [len(data[part]["x"]) for part in ("train", "validation", "test")]
    np.testing.assert_allclose(np.array(sizes) / sum(sizes), [0.6, 0.2, 0.2], atol=0.01)
    x = data["train"]["x"]
    if name != "digits_mlp":  # rare pixels are clipped, constant ones are 0
        # float32 sums over hundreds of rows
        np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(x.std(axis=0), 1, atol=1e-4)


def test_arms_start_alike_and_adam_is_lama_at_lambda_0():
    """One compilation each of Adam and LAMA on three seeds: paired to the first validation loss."""
    workload = dataclasses.replace(all_workloads()["wine"], steps=20, chunk=8)
    trainer = Trainer(workload)
    hypers = {"lr": 0.01, "sensitivity": 0.0, "b1": 0.9}
    jobs = [(hypers, seed) for seed in range(3)]
    adam, _ = trainer("adam", PROGRAMS["adam"], jobs)
    lama, seconds = trainer("lama", PROGRAMS["lama"], jobs)
    np.testing.assert_array_equal(adam.initial_loss, lama.initial_loss)
    # alpha = 1; XLA fuses the two programs differently, 20 steps in float32.
    np.testing.assert_allclose(adam.validation_curve, lama.validation_curve, rtol=1e-4)
    assert (lama.layers["alpha"] == 1).all()
    assert adam.test_loss.shape == (3,)
    assert seconds > 0
    assert not adam.diverged.any()


def test_divergence_is_a_loss_that_is_not_finite_or_ends_above_its_start():
    def history(end, test=1.0):
        return History(np.array([2.0]), np.array([[1.0, end]]), np.array([test]), 0, 0, {})

    assert not history(1.9).diverged[0]
    assert history(2.1).diverged[0]
    assert history(np.nan).diverged[0]
    assert history(1.0, test=np.inf).diverged[0]


@pytest.mark.parametrize(
    ("options", "named", "allowed"),
    [
        (["tune", "--workloads", "wine,mnist"], "--workloads", "digits_mlp"),
        (["tune", "--arms", "adamw"], "--arms", "lama_paper"),
        (["tune", "--scale", "0"], "--scale", "above 0"),
        (["train"], "phase", "headroom"),
    ],
)
def test_wrong_option_is_named(options, named, allowed, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(options)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {named}: " in error
    assert allowed in error


def test_a_phase_that_needs_another_says_so(fake, tmp_path):
    with pytest.raises(LookupError, match="wine: adam is not tuned yet: run the phase tune first"):
        run_phases(settings(tmp_path), ["final"])


def test_results_of_other_data_are_refused(fake, tmp_path):
    asked = settings(tmp_path, "--quick", "--arms", "adam")
    run_phases(asked, ["tune"])
    path = tmp_path / "wine.jsonl"
    known = lines(tmp_path)[0]["settings"]["data_sha256"]
    path.write_text(path.read_text().replace(known, "0" * 16))
    with pytest.raises(ValueError, match="holds results on other data"):
        run_phases(asked, ["tune"])


def test_a_damaged_line_in_the_middle_is_reported(tmp_path):
    (tmp_path / "wine.jsonl").write_text('{"id": "a"}\n{"id": \n{"id": "b"}\n')
    with pytest.raises(ValueError, match="damaged at byte 12"):
        Store(tmp_path, "wine")


def test_an_unknown_text_is_noted(monkeypatch):
    monkeypatch.setattr(_language, "KNOWN_TEXTS", {"0" * 64: "3.99"})
    note = _language.unknown_text_note()
    assert "not one of the known texts (Python 3.99)" in note
    monkeypatch.setattr(_language, "KNOWN_TEXTS", {_language.text()[1]: "this one"})
    assert _language.unknown_text_note() is None


def test_quick_run_from_end_to_end(tmp_path):
    """What `make study-quick` runs, without LLVM's slow optimizations."""
    fast = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    run = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-m", "benchmarks.study", "all", "--quick"),
            *("--results", tmp_path, "--output", tmp_path / "RESULTS.md"),
        ],
        cwd=ROOT,
        env=os.environ | fast | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "2 workloads: about" in run.stdout
    for name in ("digits_mlp", "breast_cancer"):
        store = Store(tmp_path, name)
        kinds = {line["kind"] for line in store.lines}
        assert kinds == {"tune", "final", "headroom", "question"}
        (adam,) = store.find(kind="final", arm="adam_b1")
        (lama,) = store.find(kind="final", arm="lama")
        assert adam["seeds"] == lama["seeds"] == [_plan.FIRST_FINAL_SEED + i for i in range(20)]
        assert {"python", "jax", "optax", "lama_optax"} <= set(lama["versions"])
        assert not any(adam["diverged"])
        # Both learn: chance is ln 10 and ln 2.
        assert np.mean(adam["test_loss"]) < 0.5
        assert np.mean(lama["test_loss"]) < 0.5
        assert len(lama["curvature"]["start"]) == len(lama["layers"]) == 2
    report = (tmp_path / "RESULTS.md").read_text()
    assert "digits_mlp" in report
    assert str(tmp_path) not in report
