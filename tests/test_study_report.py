"""The study's report: its verdicts follow the numbers, and what was not run is said to be so."""

import json
import math
import re

import numpy as np
import pytest

pytest.importorskip("arch")
pytest.importorskip("matplotlib")

from benchmarks.study import _report, _report_rules, _statistics
from benchmarks.study._report import default_output, main
from benchmarks.study._report_cap import losses_at
from benchmarks.study._report_cost import cost
from benchmarks.study._report_data import Judged, Study, Trial, load
from benchmarks.study._report_help import verdict
from benchmarks.study._report_questions import questions_section
from benchmarks.study._report_rates import range_within, width_difference
from benchmarks.study._report_rules import overall_verdict, verdicts_of
from benchmarks.study._report_text import p_value, percent
from benchmarks.study._report_traces import traces_section
from benchmarks.study._statistics import Aggregate, Comparison, Interval

pytestmark = pytest.mark.slow

SEEDS = 20


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """The texts are tested here, the intervals' quality elsewhere."""
    monkeypatch.setattr(_statistics, "RESAMPLES", 199)


def losses(effect, seeds=SEEDS, stream=0):
    """Held-out losses around 1 + effect, on splits that all arms share."""
    split = np.random.default_rng(0).lognormal(0, 0.3, seeds)
    noise = np.random.default_rng(stream + 1).lognormal(0, 0.002, seeds)
    return split * noise * (1 + effect)


def line(kind, arm, test=None, **fields):
    seeds = SEEDS if test is None else len(test)
    values = [1.0] * seeds if test is None else [float(x) for x in test]
    made = {
        "kind": kind,
        "arm": arm,
        "workload": "wine",
        "hypers": {"lr": 0.01},
        "seeds": list(range(seeds)),
        "steps": 100,
        "diverged": [not math.isfinite(x) for x in values],
        "test_loss": [x if math.isfinite(x) else None for x in values],
    } | fields
    return made | {"id": f"{abs(hash(json.dumps(made, sort_keys=True))):x}"}


def final(arm, effect=0.0, stream=0, **fields):
    return line("final", arm, losses(effect, stream=stream), **fields)


def tune(arm, losses_by_rate, seeds=6, **hypers):
    return [
        line(
            "tune",
            arm,
            hypers={"lr": rate} | hypers,
            seeds=list(range(seeds)),
            validation_loss=[loss if math.isfinite(loss) else None] * seeds,
            diverged=[not math.isfinite(loss)] * seeds,
            round=0,
        )
        for rate, loss in losses_by_rate.items()
    ]


def write(directory, lines, workload="wine"):
    path = directory / f"{workload}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_folder_with_everything_in_it(tmp_path):
    """The whole report of one workload: every section, every picture, every id it cites."""
    curve = {"steps": [50, 100], "validation_loss": [[1.8, 2, 2.2], [0.9, 1, 1.1]]}
    logged = {
        "target": 1.1,
        "steps_to_target": [50] * 15 + [None] * 5,
        "gradient_equivalents_per_step": 1.0,
        "microseconds_per_step": 10.0,
        "curve": curve,
    }
    layers = {
        "layers": ["Dense_0", "Dense_1"],
        "alpha_mean": [0.9, 1.1],
        "gain_mean": [0.8, 1.5],
    } | {key: {t: [1.0, 2.0] for t in ("start", "middle", "end")} for key in ("curvature", "trace")}
    lines = [
        final("adam_b1", stream=1, **logged),
        final("lama", 0.05, stream=2, **logged, **layers),
        *(final(arm, 0.05, stream=3) for arm in ("adam_matched", "v1", "v1_shuffled", "v5")),
        *tune("adam_b1", {0.001: 2, 0.01: 1, 0.1: 2}),
        *tune("lama", {0.001: 2, 0.01: 1.5, 0.1: 2}, sensitivity=1.0),
        *tune("v5", {0.001: 2, 0.01: 1, 0.1: 2}, b1=0.9),
        *(
            line("question", "lama", losses(0, stream=k), question="num_probes", value=k)
            for k in (1, 4, 16)
        ),
        *(
            line("headroom", search, losses(effect, stream=7), search=search, trials=48)
            for search, effect in (("global_momentum", 0), ("layer_momenta", 0.02))
        ),
    ]
    path = write(tmp_path, lines)
    output = main(tmp_path)
    text = output.read_text()
    assert output == tmp_path / "RESULTS.md"
    for name in _report.FIGURES:
        assert (tmp_path / name).exists() == (f"]({name})" in text), name
    assert sum((tmp_path / name).exists() for name in _report.FIGURES) == len(_report.FIGURES)
    ids = {line["id"] for line in lines if line["kind"] != "tune"}
    tables = (tmp_path / "TABLES.md").read_text()
    assert "](TABLES.md)" in text
    assert all(f"`#{one}`" in tables for one in ids)
    assert f"`{path.name}`" in tables
    for written in (text, tables):
        assert "{" not in written
        assert "nan" not in written.lower()
        assert str(tmp_path) not in written
    assert "V2, V3, V4 and V6" in text  # not run
    assert "No: tuned LAMA has a higher held-out loss than Adam(lr, b1)" in text


@pytest.mark.parametrize(
    "lines",
    [
        tune("adam_b1", {0.01: 1.0, 0.1: math.inf}),
        [final("lama")],
        [final("adam_b1"), line("final", "lama", [math.inf] * SEEDS)],
        [line("final", arm, [1.0, 2.0]) for arm in ("adam_b1", "lama", "v5", "adam_matched")],
        [line("question", "lama", [1.0, 2.0], question="new", value="a")],
        [line("headroom", "layer_momenta", losses(0), search="layer_momenta")],
    ],
    ids=["only tuned", "no base", "all diverged", "two seeds", "new question", "half a headroom"],
)
def test_a_part_of_the_study_is_reported_as_such(tmp_path, lines):
    write(tmp_path, lines)
    text = main(tmp_path).read_text()
    assert "not run" in text
    assert not re.search(r"\bnan\b|\+nan", text)
    assert text.count("\n## ") == len(_report.SECTIONS)


def test_a_cut_line_is_left_out_and_a_damaged_one_named(tmp_path):
    lines = [final("adam_b1"), final("lama")]
    path = write(tmp_path, lines)
    path.write_text(path.read_text()[:-50])
    assert load(tmp_path).arms() == ["adam_b1"]
    path.write_text("not JSON\n" + json.dumps(lines[0]) + "\n")
    with pytest.raises(ValueError, match=r"wine\.jsonl, line 1"):
        load(tmp_path)
    with pytest.raises(ValueError, match="--results"):
        load(tmp_path / "none")


def test_committed_results_have_their_report_beside_them(tmp_path):
    committed = tmp_path / "benchmarks" / "results" / "study"
    assert default_output(committed) == tmp_path / "benchmarks" / "RESULTS.md"
    assert default_output(tmp_path / "study") == tmp_path / "study" / "RESULTS.md"


def test_pictures_are_linked_from_where_the_report_is(tmp_path):
    results = tmp_path / "benchmarks" / "results" / "study"
    results.mkdir(parents=True)
    write(results, [final("adam_b1"), final("lama", 0.05)])
    text = main(results).read_text()
    assert "](results/study/does_it_help.png)" in text
    assert (tmp_path / "benchmarks" / "results" / "study" / "does_it_help.png").exists()


def test_of_several_lines_of_an_arm_the_last_with_the_most_seeds_counts():
    few, old, new = (line("final", "lama", np.full(n, x)) for n, x in ((3, 1), (5, 2), (5, 3)))
    runs = Study({"wine": [old, new, few]}).runs("wine", "lama")
    assert runs.id == new["id"]
    assert runs.finite_mean == 3


def judged(relative, p=0.001, p_equivalent=1.0, diverged=0.0):
    return Judged(Comparison(Interval(*relative), 0, p, p_equivalent, diverged, 0, 50), p, 1.0)


def test_words_follow_their_rules():
    better, worse = (-0.05, -0.08, -0.02), (0.05, 0.02, 0.08)
    assert judged(better).word == "better"
    assert judged(worse).word == "worse"
    assert judged(better, p=0.2).word == "undecided"
    assert judged((-0.05, -0.08, 0.02)).word == "undecided"
    assert judged(better, diverged=0.05).word == "worse (diverges)"
    assert judged(better)._replace(p_equivalent=0.01).word == "equivalent"


def test_the_answer_is_no_unless_the_interval_says_yes():
    def of(estimate, low, high):
        interval = Interval(estimate, low, high)
        return verdict("LAMA", "Adam", Aggregate(0, interval, interval, 9))

    assert of(-0.05, -0.08, -0.02).startswith("Yes: LAMA has a lower")
    assert of(0.05, 0.02, 0.08).startswith("No: LAMA has a higher")
    assert of(-0.01, -0.03, 0.01).startswith("No: LAMA cannot be told from Adam")
    assert of(-0.005, -0.008, -0.002).startswith("No: LAMA equals Adam within 1 %")
    assert of(-0.05, math.nan, math.nan).startswith("Not settled")


def rule_study(effects):
    workloads = ("wine", "digits_mlp")
    return Study(
        {
            w: [final(arm, e, stream=i, workload=w) for i, (arm, e) in enumerate(effects.items())]
            for w in workloads
        }
    )


@pytest.mark.parametrize(
    ("rule", "effects", "expected"),
    [
        ("v1", {"adam_b1": 0, "v1": -0.05, "v1_shuffled": 0.0}, "survives"),
        ("v1", {"adam_b1": 0, "v1": -0.05, "v1_shuffled": -0.05}, "falsified"),
        ("v1", {"adam_b1": 0, "v1": 0.0, "v1_shuffled": 0.05}, "falsified"),
        ("v2", {"adam_b1": 0, "v2": 0.0}, "survives"),
        ("v2", {"adam_b1": 0, "v2": 0.05}, "falsified"),
        ("v3", {"adam_b1": 0, "v3": -0.05, "v3_global": 0.0}, "survives"),
        ("v3", {"adam_b1": 0, "v3": -0.05, "v3_global": -0.05}, "falsified"),
        ("v4", {"v4": 0.0, "v4_fixed": 0.05}, "survives"),
        ("v4", {"v4": 0.0, "v4_fixed": 0.0}, "falsified"),
        ("v6", {"adam_b1": 0, "v6": -0.05, "v6_shuffled": 0.0}, "survives"),
        ("v6", {"adam_b1": 0, "v6": -0.05, "v6_shuffled": -0.05}, "falsified"),
    ],
)
def test_rules_are_falsified_by_the_issues_criteria(rule, effects, expected):
    study = rule_study(effects)
    assert overall_verdict(study, rule)[0] == expected
    assert set(verdicts_of(study, rule).values()) == {expected}


@pytest.mark.parametrize(
    ("effects", "worth"),
    [
        ({"adam_b1": 0, "adam": 0.1, "v3": -0.05, "v3_global": 0.0}, "V3"),
        ({"adam_b1": 0, "adam": 0.1, "v3": 0.05, "v3_global": 0.1}, "none"),  # it beats no Adam
        ({"adam_b1": 0.05, "adam": 0.1, "v3": 0.0, "v3_global": 0.006}, "none"),  # in name only
    ],
)
def test_a_rule_worth_having_also_beats_adam(effects, worth):
    answer = _report_rules.rules_section(rule_study(effects)).answer
    assert f"Worth having beside Adam(lr, b1): {worth}." in answer
    assert answer.startswith("Survives: V3.")


def test_the_better_adam_is_chosen_on_validation_loss():
    lines = [final("adam", -0.5), final("adam_b1")]
    lines += [*tune("adam", {0.1: 2}), *tune("adam_b1", {0.1: 1})]
    assert Study({"wine": lines}).runs("wine", "better_adam").arm == "adam_b1"
    lines += tune("adam", {0.01: 0.5})
    assert Study({"wine": lines}).runs("wine", "better_adam").arm == "adam"


def test_a_rule_without_its_control_is_not_decided():
    assert overall_verdict(rule_study({"adam_b1": 0, "v1": -0.05}), "v1")[0] == "not decided"


def test_the_cap_is_judged_by_its_range_of_learning_rates():
    narrow = {0.001: 2.0, 0.01: 1.0, 0.1: 2.0}
    wide = {0.001: 2.0, 0.01: 1.0, 0.1: 1.01}
    for cap, expected in ((narrow, "falsified"), (wide, "survives")):
        lines = [*tune("adam_b1", narrow, b1=0.9), *tune("v5", cap, c=1.0)]
        study = Study({f"w{i}": lines for i in range(5)})
        assert overall_verdict(study, "v5")[0] == expected
        assert set(verdicts_of(study, "v5").values()) == {expected}
    # No wider, yet finite where Adam diverges.
    diverging = [*tune("adam_b1", {0.01: 1, 0.1: math.inf}), *tune("v5", {0.01: 1, 0.1: 2})]
    assert set(verdicts_of(Study({"wine": diverging}), "v5").values()) == {"survives"}


def trial(rate, losses, name="a"):
    return Trial(rate, {"lr": rate}, np.asarray(losses, float), name)


def test_range_of_learning_rates_by_hand():
    rates = np.array([0.001, 0.01, 0.1])
    # 5 % of 1 is a tenth of the way from 1 to 1.5: a tenth of a decade on either side.
    found = range_within(rates, np.array([1.5, 1.0, 1.5]))
    np.testing.assert_allclose(found, (-2.1, -1.9, False, False))
    np.testing.assert_allclose(found.decades, 0.2)
    assert range_within(rates, np.array([1.0, 1.0, 1.5])).open_low
    # Beyond the last good rate everything diverges: the range ends at it.
    found = range_within(rates, np.array([1.5, 1.0, np.inf]))
    assert (found.high, found.open_high) == (-2, False)
    assert range_within(rates, np.full(3, np.inf)) is None
    # A negative loss: within 5 % of its size.
    np.testing.assert_allclose(range_within(rates, np.array([-5, -10, -5.0])).decades, 0.2)


def test_width_difference_takes_the_best_of_the_other_settings():
    base = [trial(r, [loss] * 6) for r, loss in ((0.001, 1.5), (0.01, 1.0), (0.1, 1.5))]
    arm = [*base, trial(0.1, [1.0] * 6)]
    np.testing.assert_allclose(width_difference(arm, base), 0.9)  # -2.1 to -1 is 1.1 decades
    uneven = width_difference(arm, [trial(0.01, [1.0] * 3)])
    np.testing.assert_allclose(uneven, (1.1, math.nan, math.nan))


def test_losses_between_two_rates_lie_on_a_line():
    trials = [trial(0.01, [1, 2]), trial(0.1, [3, 6]), trial(0.1, [9, 9])]
    np.testing.assert_allclose(losses_at(trials, 10**-1.5), [2, 4])
    np.testing.assert_allclose(losses_at(trials, 0.1), [3, 6])
    assert (losses_at([trials[0], trial(1.0, [np.inf, 1])], 0.1) == [np.inf, 1.5]).all()


def test_cost_is_infinite_where_most_runs_miss_the_target():
    def of(steps):
        made = final("lama", steps_to_target=steps, gradient_equivalents_per_step=3.0)
        return cost(Study({"wine": [made | {"microseconds_per_step": 10.0}]}).runs("wine", "lama"))

    found = of([40] * 12 + [None] * 8)
    np.testing.assert_allclose(found, (0.6, 40, 120, 400e-6))
    missed = of([40] * 8 + [None] * 12)
    assert missed.steps == math.inf
    assert np.isnan(found.over(missed)).all()
    np.testing.assert_allclose(found.over(of([20] * 20)), 2)


def test_open_choices_are_compared_with_the_usual_one():
    lines = [
        line("question", "lama", losses(e, stream=i), question="sensitivity", value=v)
        for i, (v, e) in enumerate({10.0: 0.05, 0.0: 0.0, -10.0: 0.0}.items())
    ]
    text = questions_section(Study({"wine": lines})).markdown()
    assert "1 of 1 choice have a value that changes" in text
    assert "1 equivalent; worse on wine: 10 (+5" in text


def test_the_first_layers_trace_is_counted():
    def logged(trace):
        times = ("start", "middle", "end")
        fields = {"trace": dict.fromkeys(times, trace), "curvature": {t: [1, 2] for t in times}}
        return [final("lama", layers=["a", "b"], **fields)]

    answer = traces_section(Study({"wine": logged([2, 1]), "pinn": logged([1, 2])})).answer
    assert "Of 2 workloads the first layer has the largest trace on 1 at the start" in answer
    assert "the largest curvature per parameter on 0 at the start" in answer


def test_numbers_are_written_with_sign_and_interval():
    assert percent(Interval(-0.0123, -0.02, 0.105)) == "-1.23 % [-2.00, +10.5]"
    assert percent(Interval(0.5)) == "+50.0 %"
    assert percent(Interval(math.nan)) == "-"
    assert [p_value(p) for p in (math.nan, 0.0004, 0.0314)] == ["-", "<0.001", "0.031"]


def test_the_reading_rules_stand_in_the_report():
    section = _report_rules.rules_section(rule_study({"adam_b1": 0, "v2": 0.0})).markdown()
    assert _report_rules.READING in section
    assert "survives in name only" in section
