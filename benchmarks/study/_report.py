"""What a person reads: RESULTS.md, at most two pages, and its pictures."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.lab._jobs import Outcome
from benchmarks.lab._statistics import half_width
from benchmarks.study import _statistics as statistics
from benchmarks.study._arms import ARMS, B1, TRIALS
from benchmarks.study._figures import draw_all
from benchmarks.study._train import gradients
from benchmarks.study._workload import Workload

#: An arm whose every layer has a momentum so near to Adam's is Adam.
NEAR = 0.02

PAGE = """# Does LAMA help?

Written by `python -m benchmarks.study`; `benchmarks/README.md` has the protocol, and what each
verdict asks for. Every optimizer tunes two settings by five trials in every study. "AdamW" tunes
learning rate and weight decay, "AdamW (b1)" learning rate and momentum, "LAMA" learning rate and
lambda. "AdamW again" is AdamW with other trials: what lies between the two is luck.

{0}

## Held-out loss, tuned against tuned

![Differences between optimizers with 95 % intervals; grey: too small to be seen]({here}/forest.png)

The mean over studies and its 95 % interval, in % of the loss, where less is better; of cartpole in
points of the return, where more is. Smallest visible: the half width of the interval of AdamW
against itself.

{1}

## What tuning takes

![Loss over that of AdamW with as many trials, of one to five]({here}/tuning.png)

Of k trials drawn at random from the optimizer's box, the one with the least validation loss: the
mean over all subsets of the trials made, and over studies. After one trial, minus AdamW:

{2}

## What the same loss costs

Gradients to the validation loss that AdamW has after nine tenths of its run: the median over
confirmations, and how many of them come so far. LAMA's estimates are counted.

{3}

`{here}/results.txt` has p-values by Holm, what each optimizer was tuned to, its held-out loss,
seconds, diverged runs, and the momentum of LAMA's layers.
"""
DETAILS = """One trial for five: the difference that this makes, in % or points. Tuned: medians of
what validation chose. Seconds: to the loss that AdamW has after nine tenths of its run. Momentum:
the least and the largest of any layer; LAMA with all within {near} of Adam's is Adam.
"""


def summarize(known: dict[str, Workload], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """By workload: contrasts, arms and the noise floor."""
    rows = [unit | result for unit, result in outcomes]
    frame = pd.DataFrame(rows).rename(columns={"section": "arm"})
    return {
        name: _workload(known[name], own.assign(score=known[name].score(own.held_out)))
        for name, own in frame.groupby("model", sort=False)
    }


def _workload(workload: Workload, frame: pd.DataFrame) -> dict[str, Any]:
    confirmed = frame[frame.confirmation.notna()]
    scores = confirmed.groupby(["study", "arm"]).score.mean().unstack()
    pairs = [("L", "A"), ("L", "M")] + [(n, "A") for n in workload.arms[2:] if n != "L"]
    found = [statistics.contrast(scores[one] - scores[other]) for one, other in pairs]
    floor = statistics.contrast(scores["A"] - scores["A'"])
    adjusted = statistics.holm([contrast.p for contrast in found])
    margin, words = workload.margin or -np.log(0.99), "1 %"
    if workload.margin:
        words = f"{workload.margin:g} points"
    near = [_is_adam(own) for _, own in confirmed[confirmed.arm == "L"].groupby("study")]
    is_void = floor.low > 0 or floor.high < 0
    contrasts = []
    for pair, contrast, p in zip(pairs, found, adjusted, strict=True):
        says = statistics.verdict(contrast, p, margin, len(pairs), words)
        if "L" in pair and sum(near) > len(near) / 2:
            says = f"not tested: LAMA tuned itself to Adam in {sum(near)} of {len(near)} studies"
        if is_void:
            says = "void: AdamW differs from AdamW"
        contrasts.append({"pair": pair, "contrast": contrast, "p": p, "verdict": says})
    return {
        "workload": workload,
        "studies": len(scores),
        "contrasts": contrasts,
        "floor": floor,
        "visible": half_width(floor.spread, floor.studies),
        "arms": _arms(workload, frame),
    }


def _is_adam(runs: pd.DataFrame) -> bool:
    ranges = np.asarray(runs.momentum.tolist())
    return bool(np.all(np.abs(ranges - B1) <= NEAR))


def _arms(workload: Workload, frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Of every arm: how it ends, how it tunes, and what the same loss costs it."""
    confirmed = frame[frame.confirmation.notna()]
    targets = {
        study: float(np.mean([_at(curve, 0.9 * workload.steps) for curve in own.curve]))
        for study, own in confirmed[confirmed.arm == "A"].groupby("study")
    }
    found, base = {}, _after_trials(frame[frame.arm == "A"])
    for name, own in frame.groupby("arm", sort=False):
        last = own[own.confirmation.notna()]
        pairs = zip(last.study, last.curve, strict=True)
        steps = np.asarray([statistics.steps_to(curve, targets[study]) for study, curve in pairs])
        after = _after_trials(own)
        per_step = gradients(workload, name, workload.steps) / workload.steps
        found[name] = {
            "score": last.score.mean(),
            "after": after.mean(axis=0),
            "over_adamw": [statistics.contrast(column) for column in (after - base).T],
            "reached": int(np.isfinite(steps).sum()),
            "runs": len(steps),
            "gradients": float(np.median(steps)) * per_step,
            "seconds": float(np.median(steps * last.seconds / workload.steps)),
            "diverged": int(own.diverged.sum()),
            "trained": len(own),
            "momentum": _range(last.momentum),
            "tuned": _tuned(pd.DataFrame(last.hyper.tolist())),
        }
    return found


def _after_trials(runs: pd.DataFrame) -> np.ndarray:
    """Scores by study and number of trials."""
    studies = [own for _, own in runs[runs.trial.notna()].groupby("study")]
    rows = [(list(own.validation), list(own.score)) for own in studies]
    counts = range(1, TRIALS + 1)
    return np.asarray([[statistics.after_trials(*row, count) for count in counts] for row in rows])


def _tuned(hyper: pd.DataFrame) -> str:
    """Medians; of lambda that of the magnitude, and how often it was positive."""
    words = ", ".join(f"{axis} {x:.2g}" for axis, x in hyper.abs().median().items())
    if "lambda" in hyper:
        words += f" (above 0: {(hyper['lambda'] > 0).sum()} of {len(hyper)})"
    return words


def _at(curve: Sequence[tuple[int, float]], step: float) -> float:
    return float(np.interp(step, *np.transpose(curve)))


def _range(momenta: pd.Series) -> tuple[float, float] | None:
    values = momenta.dropna().tolist()
    return (float(np.min(values)), float(np.max(values))) if values else None


def write(folder: Path, page: Path, known: dict[str, Workload], outcomes: Sequence[Outcome]) -> str:
    """Draws the pictures into ``folder`` and writes the page; returns its text."""
    summary = summarize(known, outcomes)
    draw_all(folder, summary)
    parts = [part(own) for own in summary.values() for part in (_contrast_table, _arm_table)]
    (folder / "results.txt").write_text("\n\n".join([*parts, DETAILS.format(near=NEAR)]))
    sentences = "\n\n".join(map(_sentence, summary.values()))
    tables = [_by_task(summary, cells) for cells in (_differences, _one_trial, _cost)]
    text = PAGE.format(sentences, *tables, here=os.path.relpath(folder, page.parent))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
    return text


def _interval(workload: Workload, contrast: statistics.Contrast) -> str:
    mean = workload.shown(contrast.mean)
    low, high = sorted(workload.shown([contrast.low, contrast.high]))
    return f"{mean:+.3g} [{low:+.3g}, {high:+.3g}]"


def _sentence(own: dict[str, Any]) -> str:
    """What is shown, not shown and unknown of a workload."""
    workload, rows = own["workload"], {row["pair"]: row for row in own["contrasts"]}
    unit = "points" if workload.margin else "%"
    against = [
        f"{ARMS[other].title}: {_interval(workload, rows['L', other]['contrast'])} {unit},"
        f" {rows['L', other]['verdict']}"
        for other in "AM"
    ]
    text = (
        f"**{workload.title}**, {own['studies']} of {workload.studies} studies. LAMA against"
        f" {'; against '.join(against)}."
    )
    if ("E", "A") in rows:
        control = rows["E", "A"]["contrast"]
        if control.low > 0 or control.high < 0:
            text += " Muon, the positive control, differs from AdamW: the study sees a difference."
        else:
            text += (
                " Muon, the positive control, cannot be told from AdamW: the study sees too little."
            )
    return text


def _by_task(summary: dict[str, Any], cells: Callable[[dict[str, Any]], dict[str, str]]) -> str:
    """A column for each task."""
    columns = {name: cells(own) for name, own in summary.items()}
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    return _table([{"": r} | {k: own.get(r, "") for k, own in columns.items()} for r in rows])


def _differences(own: dict[str, Any]) -> dict[str, str]:
    workload = own["workload"]
    floor = {
        "AdamW minus AdamW again": _interval(workload, own["floor"]),
        "smallest visible": f"{abs(workload.shown(own['visible'])):.2g}",
    }
    return floor | {
        _words(row["pair"]): f"{_interval(workload, row['contrast'])}:"
        f" {row['verdict'].partition(':')[0]}"
        for row in own["contrasts"]
    }


def _one_trial(own: dict[str, Any]) -> dict[str, str]:
    return {
        ARMS[name].title: _interval(own["workload"], arm["over_adamw"][0])
        for name, arm in own["arms"].items()
        if name != "A"
    }


def _cost(own: dict[str, Any]) -> dict[str, str]:
    return {
        ARMS[name].title: (f"{arm['gradients']:.0f}" if np.isfinite(arm["gradients"]) else "-")
        + f" ({arm['reached']} of {arm['runs']})"
        for name, arm in own["arms"].items()
    }


def _words(pair: tuple[str, str]) -> str:
    return " minus ".join(ARMS[name].title for name in pair)


def _contrast_table(own: dict[str, Any]) -> str:
    return _table(
        [
            {
                own["workload"].name: _words(row["pair"]),
                "p (Holm)": f"{row['p']:.2g}",
                "verdict": row["verdict"],
            }
            for row in own["contrasts"]
        ]
    )


def _arm_table(own: dict[str, Any]) -> str:
    workload, lines = own["workload"], []
    for name, arm in own["arms"].items():
        value = -arm["score"] if workload.margin else np.exp(arm["score"])
        line = {
            workload.name: ARMS[name].title,
            "held-out": f"{value:.4g}",
            "one trial for five": f"{workload.shown(arm['after'][0] - arm['after'][-1]):+.3g}",
            "tuned": arm["tuned"],
            "diverged": f"{arm['diverged']} of {arm['trained']}",
            "seconds": f"{arm['seconds']:.2g}",
        }
        if arm["momentum"]:
            line["momentum"] = "{:.3f} to {:.3f}".format(*arm["momentum"])
        lines.append(line)
    return _table(lines)


def _table(lines: list[dict[str, str]]) -> str:
    """Markdown, without a package for it."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    rows = [names, [":--"] * len(names), *([line.get(n, "") for n in names] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
