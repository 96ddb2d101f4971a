"""The study's arithmetic, its trials, and that an interrupted one goes on."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from benchmarks.lab._jobs import Outcome
from benchmarks.lab._statistics import half_width
from benchmarks.lab._store import Store
from benchmarks.study import _plan as plan
from benchmarks.study import _statistics as statistics
from benchmarks.study import _train as train
from benchmarks.study import _workload as workloads
from benchmarks.study.__main__ import main, parse
from benchmarks.study._arms import ARMS, B1, BOXES, TRIALS, _muon_axes, box, setting, trials
from benchmarks.study._report import summarize

KNOWN = workloads.workloads(False, None, None)
TINY = workloads.workloads(True, None, None)
MARGIN = 0.01

pytestmark = pytest.mark.standard_promotion  # networks are written as their users write them


def test_interval_is_scipys_paired_t():
    one, other = np.random.default_rng(0).normal(size=(2, 9))
    found = statistics.contrast(one - other)
    expected = stats.ttest_rel(one, other)
    ends = expected.confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high, found.p], [*ends, expected.pvalue])


def test_holm_by_hand():
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2, 0.5 * 1, each at least the one before.
    np.testing.assert_allclose(statistics.holm([0.5, 0.01, 0.03, 0.02]), [0.5, 0.04, 0.06, 0.06])


@pytest.mark.parametrize(
    ("mean", "spread", "adjusted", "begin"),
    [
        (-0.03, 0.01, 0.01, "helps"),
        (-0.03, 0.01, 0.06, "undecided"),  # Holm says no
        (-0.03, 0.05, 0.01, "undecided"),  # the interval holds 0
        (-0.008, 0.004, 0.01, "undecided"),  # better, but not by the margin, which is inside
        (-0.005, 0.004, 0.01, "does not help by 1 % or more"),
        (0.0, 0.01, 1.0, "does not help by 1 % or more"),
        (0.0, 0.02, 1.0, "undecided"),
        (0.05, 0.01, 0.01, "does not help by 1 % or more"),
    ],
)
def test_verdicts(mean, spread, adjusted, begin):
    reach = half_width(spread, 8)
    found = statistics.Contrast(mean, mean - reach, mean + reach, spread, 0.0, 8)
    assert statistics.verdict(found, adjusted, MARGIN, 4).startswith(begin)


@pytest.mark.parametrize(("mean", "level"), [(0.0, 0.05), (-0.03, 0.05 / 4)])
def test_number_of_studies_that_would_decide(mean, level):
    found = statistics.Contrast(mean, -1, 1, 0.05, 1.0, 8)
    count = statistics.studies_needed(found, MARGIN, 4)
    room = max(mean + MARGIN, -mean)
    reaches = [stats.t.ppf(1 - level / 2, n - 1) * 0.05 / n**0.5 for n in (count - 1, count)]
    assert reaches[0] >= room > reaches[1]


def test_mean_over_subsets_is_unbiased():
    # A world of four settings, drawn independently: what 1, 2 and 3 trials give is known exactly.
    validation, held_out = np.asarray([3.0, 1.0, 2.0, 4.0]), np.asarray([1.0, 5.0, 2.0, 3.0])

    def expected(count):
        draws = itertools.product(range(4), repeat=count)
        return np.mean([held_out[min(draw, key=lambda i: validation[i])] for draw in draws])

    for count in (1, 2, 3):
        estimates = [
            statistics.after_trials(validation[list(draw)], held_out[list(draw)], count)
            for draw in itertools.product(range(4), repeat=3)
        ]
        np.testing.assert_allclose(np.mean(estimates), expected(count))


def test_steps_to_a_loss():
    curve = [(0, 4.0), (10, 2.0), (20, 3.0), (30, 1.0)]
    assert statistics.steps_to(curve, 3.0) == 5
    assert statistics.steps_to(curve, 1.5) == 27.5
    assert statistics.steps_to(curve, 0.5) == np.inf


@pytest.mark.parametrize("name", KNOWN)
def test_trials_lie_in_the_box_and_are_no_others(name):
    workload = KNOWN[name]
    seen = set()
    for arm, study in itertools.product(workload.arms, range(2)):
        found = trials(arm, workload, study)
        assert found == trials(arm, workload, study)
        assert len(found) == TRIALS
        for hyper in found:
            seen.add(hyper["lr"])
            for axis, (low, high) in zip(ARMS[arm].axes, box(arm, workload), strict=True):
                assert low <= abs(hyper[axis]) <= high
                assert axis == "lambda" or hyper[axis] > 0
    assert len(seen) == 2 * TRIALS * len(workload.arms)  # A' has points of its own


def test_lambda_has_both_signs():
    ranges = ((1e-3, 1e-2), (1.0, 100.0))
    found = [setting("L", ranges, np.asarray([0.5, u]))["lambda"] for u in (0, 0.25, 0.75, 1)]
    np.testing.assert_allclose(found, [-100, -10, 10, 100])


def test_boxes_hold_the_calibrations_best():
    path = pathlib.Path("benchmarks/results/study/calibration.jsonl")
    best = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        unit, loss = record["unit"], record["result"]["validation"]
        key = unit["model"], unit["section"]
        best[key] = min(best.get(key, (np.inf, {})), (loss, unit["hyper"]), key=lambda x: x[0])
    assert {name for name, _ in best} == set(BOXES)
    for (name, arm), (_, hyper) in best.items():
        for axis, (low, high) in zip(ARMS[arm].axes, BOXES[name][arm], strict=True):
            # lambda = 0 is Adam: the middle of its box, near which the least magnitudes are.
            inside = low < abs(hyper[axis]) < high or (axis == "lambda" and hyper[axis] == 0)
            assert inside or hyper[axis] == high == 1.0  # no momentum is less than none


def test_laplacian_of_a_known_solution():
    waves = np.asarray([[1.0, 0, 0], [0, 0, 2.0], [0, 0, 0]])
    points = np.random.default_rng(0).uniform(size=(5, 2))
    solution = workloads.Poisson._waves

    def second(axis, step=1e-4):
        shift = np.eye(2)[axis] * step
        ends = [solution_64(points + shift), solution_64(points - shift)]
        return (ends[0] - 2 * solution_64(points) + ends[1]) / step**2

    def solution_64(points):
        x, y = np.pi * points.T
        parts = np.sin(x) * np.sin(y) / (2 * np.pi**2), np.sin(2 * x) * np.sin(3 * y)
        return parts[0] + 2 * parts[1] / (13 * np.pi**2)

    u, f = solution(waves, points)
    np.testing.assert_allclose(u, solution_64(points), rtol=1e-5)
    np.testing.assert_allclose(f, second(0) + second(1), rtol=1e-4, atol=1e-5)


def test_pole_moves_by_the_laws_of_motion():
    # Forces on cart and pole as two linear equations in both accelerations; then an Euler step.
    state, (mass, half, force) = np.asarray([0.01, -0.02, 0.03, 0.4]), (0.1, 0.5, 10.0)
    _, speed, angle, turning = state
    sine, cosine = np.sin(angle), np.cos(angle)
    laws = [[1 + mass, mass * half * cosine], [cosine, half * 4 / 3]]
    push, bend = np.linalg.solve(laws, [force + mass * half * turning**2 * sine, 9.8 * sine])
    expected = state + 0.02 * np.asarray([speed, push, turning, bend])
    found = workloads._pole(jnp.asarray(state[None], jnp.float32), jnp.asarray([1]))
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_returns_to_go_end_with_the_fall():
    workload = TINY["cartpole"]
    seen = workload.prepare(workload.init(jax.random.key(0)), jnp.asarray(3))
    alive, advantage = np.asarray(seen["alive"]), np.asarray(seen["advantage"])
    lengths = alive.sum(0)
    to_go = [(1 - 0.99 ** (lengths - t)) / 0.01 * alive[t] for t in range(len(alive))]
    played = np.asarray(to_go)[alive > 0]
    np.testing.assert_allclose(
        advantage[alive > 0], (played - played.mean()) / played.std(), rtol=1e-3, atol=1e-4
    )
    assert np.all(advantage[alive == 0] == 0)


@pytest.mark.parametrize("lr", [1e-3, 1e4, np.inf])
def test_a_diverged_run_counts_with_its_start(lr):
    found = train.run(TINY["pinn"], "A", {"lr": lr, "decay": 0.01}, 0, 0)
    start = found["curve"][0][1]
    assert found["diverged"] == (lr > 1)
    assert (found["validation"] == start) if lr > 1 else (found["validation"] < start)
    assert np.isfinite(found["held_out"])


def test_lama_of_lambda_0_is_adamw():
    workload = TINY["pinn"]
    lama = train.run(workload, "L", {"lr": 1e-3, "lambda": 0.0}, 0, 0)
    adam = train.run(workload, "A", {"lr": 1e-3, "decay": workload.decay}, 0, 0)
    np.testing.assert_allclose(lama["validation"], adam["validation"], rtol=1e-5)
    assert (adam["gradients"], lama["gradients"]) == (20, 22)  # estimates at steps 1 and 11
    np.testing.assert_allclose(lama["momentum"], B1)


def test_muon_takes_the_kernels_as_matrices():
    params = jax.eval_shape(TINY["gpt"].init, jax.random.key(0))
    axes = _muon_axes(params)["params"]
    attention = axes["block_0"]["attention"]
    assert (attention["query"]["kernel"], attention["out"]["kernel"]) == ((0, (1, 2)), ((0, 1), 2))
    assert axes["block_0"]["up"]["kernel"] == (0, 1)
    others = axes["head"]["kernel"], axes["bytes"]["embedding"], axes["norm"]["scale"]
    assert others == (None, None, None)


def _outcomes(workload, effects, momentum):
    """Eight studies of made-up losses: each arm's effect on the logarithm, and a little noise."""
    rng, found = np.random.default_rng(0), []
    for study, name, i in itertools.product(range(8), workload.arms, range(TRIALS + 2)):
        which = {"trial": i} if i < TRIALS else {"confirmation": i - TRIALS + 1}
        loss = float(np.exp(effects.get(name, 0.0) + 0.002 * rng.normal()))
        result = {"hyper": {"lr": 1e-3}, "validation": loss, "held_out": loss, "diverged": False}
        result |= {"curve": [(0, 2.0), (20, loss)], "seconds": 1.0, "gradients": 20}
        result["momentum"] = momentum if name == "L" else None
        found.append(
            Outcome({"model": workload.name, "section": name, "study": study} | which, result)
        )
    return found


@pytest.mark.parametrize(
    ("effects", "momentum", "verdict"),
    [
        ({"L": -0.05}, [0.8, 0.95], "helps"),
        ({"L": 0.05}, [0.8, 0.95], "does not help by 1 % or more"),
        ({"L": -0.05}, [0.89, 0.91], "not tested: LAMA tuned itself to Adam in 8 of 8 studies"),
        ({"L": -0.05, "A'": 0.02}, [0.8, 0.95], "void: AdamW differs from AdamW"),
    ],
)
def test_what_the_report_concludes(effects, momentum, verdict):
    workload = KNOWN["gpt"]
    (found,) = summarize(KNOWN, _outcomes(workload, effects, momentum)).values()
    first = found["contrasts"][0]
    assert (first["pair"], first["verdict"]) == (("L", "A"), verdict)
    assert abs(first["contrast"].mean - effects["L"]) < 0.005
    assert found["floor"].studies == 8


def test_an_interrupted_study_goes_on(tmp_path, monkeypatch):
    workload, calls = TINY["pinn"], []

    def run(workload, name, hyper, study, seed):
        calls.append((name, study, seed))
        return {"validation": abs(np.log(hyper["lr"] / 3e-3)), "hyper": hyper}

    monkeypatch.setattr(plan, "run", run)
    store = Store(tmp_path / "m.jsonl", {})
    todo = list(plan.jobs(store, [workload], 0, None))
    per_arm = TRIALS + plan.CONFIRMATIONS
    assert len(todo) == workload.studies * len(workload.arms) * per_arm
    assert [job.unit["study"] for job in todo] == sorted(job.unit["study"] for job in todo)
    with pytest.raises(ValueError, match="not finished"):
        plan.best(store, workload, "A", 0)
    for job in todo[:per_arm]:
        store.run(job.unit, job.measure)
    again = Store(tmp_path / "m.jsonl", {})
    results = [again.run(job.unit, job.measure) for job in plan.jobs(again, [workload], 0, None)]
    assert len(calls) == len(todo)
    assert calls[:per_arm] == [("A", 0, 0)] * TRIALS + [("A", 0, 1), ("A", 0, 2)]
    chosen = min(results[:TRIALS], key=lambda result: result["validation"])
    assert results[TRIALS]["hyper"] == chosen["hyper"]


def test_an_edited_line_is_refused(tmp_path):
    Store(tmp_path / "m.jsonl", {}).run({"x": 1}, lambda: {"loss": 1.5})
    text = (tmp_path / "m.jsonl").read_text()
    (tmp_path / "m.jsonl").write_text(text.replace("1.5", "1.4"))
    with pytest.raises(ValueError, match="line 1"):
        Store(tmp_path / "m.jsonl", {})


@pytest.mark.parametrize(
    ("option", "value"),
    [("--workloads", "gtp"), ("--steps", "30"), ("--width", "6"), ("--studies", "1")],
)
def test_wrong_options_are_named(option, value, capsys):
    with pytest.raises(SystemExit):
        parse([option, value])
    assert value in capsys.readouterr().err


@pytest.mark.slow
def test_quick_run(tmp_path):
    assert main(["--quick", "--workloads", "pinn,cartpole", "--results", str(tmp_path)]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    for phrase in ("LAMA minus AdamW", "AdamW minus AdamW again", "forest.png", "results.txt"):
        assert phrase in text
    assert "1-b1" in (tmp_path / "results.txt").read_text()
    assert (tmp_path / "tuning.png").stat().st_size > 0
