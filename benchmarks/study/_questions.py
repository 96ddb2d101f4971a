"""The documents' questions about LAMA's settings, one at a time, at LAMA's tuned rate and lambda.

Nothing is averaged over steps (curvature_decay = 0) unless that is the question, so that the
estimator's noise reaches alpha as it does in the paper.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.study._final import layer_fields, outcome
from benchmarks.study._plan import Bench, final_seeds, tune_seeds
from benchmarks.study._programs import Program, Rearranged, lama_observe, lama_program
from benchmarks.study._train import Trainer
from benchmarks.study._tune import score, selected
from lama_optax import flipout, hutchinson, lama_adam

Hypers = dict[str, Any]

QUESTION_WORKLOADS = ("digits_mlp", "breast_cancer")
SEEDS = 50
LAMBDAS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
QUICK_LAMBDAS = (0.1, 10.0)
ALPHA_RANGES = ((1, 1), (0.9, 1.1), (0.75, 1.25), (0.5, 1.5), (0, 2), (0.5, 1), (1, 1.5))
#: Learning rates tried anew for each lambda, over LAMA's tuned one.
RETUNED = tuple(10 ** (i / 4) for i in range(-5, 4))
#: Trials of the search for a lambda of its own for each layer.
LEARNED_TRIALS = 24
LEARNED_SEED = 0


@dataclasses.dataclass(frozen=True)
class Question:
    """One setting of one question."""

    question: str
    value: float | str
    program: str
    built: Program
    hypers: Hypers


def ask(base: Hypers, steps: int, quick: bool) -> Iterator[Question]:
    """All settings; ``base`` holds LAMA's tuned lr and sensitivity."""
    plain = base | {"curvature_decay": 0.0}
    one = lama_program()

    def with_estimator(question: str, value: float | str, estimator: Any, k: int = 1) -> Question:
        name = f"{question} {value}"
        return Question(question, value, name, lama_program(estimator, probes=k), plain)

    def with_hypers(question: str, value: float | str, **hypers: Any) -> Question:
        return Question(question, value, "lama", one, plain | hypers)

    for decay in (0.0, 0.5, 0.9, 0.99, 0.999):
        yield with_hypers("curvature_decay", decay, curvature_decay=decay)
    for sensitivity in _sensitivities(quick):
        yield with_hypers("sensitivity", sensitivity, sensitivity=sensitivity)
    for low, high in ALPHA_RANGES:
        yield with_hypers("alpha_range", f"{low:g} to {high:g}", alpha_min=low, alpha_max=high)
    for interval in (1, 2, 5, 10, 20, 50, 100):
        yield with_hypers("update_interval", interval, update_interval=interval)
    if quick:
        return
    for k in (1, 2, 4, 8, 16, 32, 64):
        yield with_estimator("num_probes", k, hutchinson(k), k)
    for probe in ("rademacher", "gaussian", "sphere"):
        yield with_estimator("probe", probe, hutchinson(1, probe=probe))
    for scope in ("joint", "block"):
        yield with_estimator("scope", scope, hutchinson(1, scope=scope))
        yield with_estimator("scope", f"flipout {scope}", flipout(1, scope=scope))
    yield with_estimator("hvp", "exact", hutchinson(10), 10)
    for delta in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        difference = hutchinson(10, hvp="finite_difference", fd_step=delta)
        yield with_estimator("hvp", delta, difference, 10)
    layers = {"module": "module", "leaf": "leaf", "whole network": _whole}
    for value, spec in layers.items():
        built = lama_program(layers=spec)
        yield Question("layers", value, f"layers {value}", built, plain)
    for value in SCHEDULES:
        yield Question("schedule", value, f"schedule {value}", _scheduled(value, steps), plain)


def _whole(params: Any) -> Any:
    return jax.tree.map(lambda _: "all", params)


SCHEDULES = ("constant", "lambda falls to 0", "lambda rises from 0", "alpha narrows to 1")


def _scheduled(value: str, steps: int) -> Program:
    """LAMA under `optax.inject_hyperparams`, linear from the first to the last step."""

    def make(h: Hypers, key: jax.Array) -> optax.GradientTransformationExtraArgs:
        def built(sensitivity: Any, alpha_min: Any, alpha_max: Any) -> Any:
            return lama_adam(
                h["lr"],
                sensitivity=sensitivity,
                alpha_min=alpha_min,
                alpha_max=alpha_max,
                estimator=Rearranged(hutchinson(1), 0),
                update_interval=1,
                key=key,
            )

        falling = optax.linear_schedule(1.0, 0.0, steps)
        strength, narrow = lambda t: 1.0, lambda t: 1.0
        if value == "lambda falls to 0":
            strength = falling
        elif value == "lambda rises from 0":
            strength = optax.linear_schedule(0.0, 1.0, steps)
        elif value == "alpha narrows to 1":
            narrow = falling
        return optax.inject_hyperparams(built)(
            sensitivity=lambda t: h["sensitivity"] * strength(t),
            alpha_min=lambda t: 1.0 - 0.5 * narrow(t),
            alpha_max=lambda t: 1.0 + 0.5 * narrow(t),
        )

    program = lama_program()
    return Program(make, program.hypers, lama_observe, program.gradient_equivalents)


def questions(bench: Bench, quick: bool) -> None:
    """Runs the questions that are missing."""
    seeds = question_seeds(bench)
    # A trainer whose chunk is as many runs as a question has; a quick run compiles less instead.
    own = dataclasses.replace(bench.workload, chunk=len(seeds))
    trainer = bench.trainer if quick else Trainer(own)
    chosen = selected(bench, "lama")["hypers"]
    base = {"lr": chosen["lr"], "sensitivity": chosen["sensitivity"]}
    for asked in ask(base, bench.workload.steps, quick):
        identity = bench.identity(
            "question",
            question=asked.question,
            value=asked.value,
            hypers=asked.hypers,
            seeds=seeds,
        )
        if bench.store.get(identity) is None:
            _answer(bench, trainer, asked, identity, {})
        else:
            bench.skip(asked.built, len(seeds))
    _retuned(bench, trainer, base, quick)
    if not quick:
        _learned(bench, trainer, base)


def question_seeds(bench: Bench) -> list[int]:
    """The first of the final seeds."""
    return final_seeds(bench)[:SEEDS]


def question_work(bench: Bench, quick: bool) -> float:
    """Seconds of all questions, as `Bench.work` has them."""
    seeds, selecting = len(question_seeds(bench)), len(tune_seeds(bench))
    base = {"lr": 1.0, "sensitivity": 1.0}
    total = sum(bench.work(q.built, seeds) for q in ask(base, bench.workload.steps, quick))
    runs = len(_sensitivities(quick)) * (len(RETUNED) * selecting + seeds)
    runs += 0 if quick else LEARNED_TRIALS * selecting + 2 * seeds
    return total + bench.work(lama_program(), runs)


def _answer(bench: Bench, trainer: Trainer, asked: Question, identity: str, fields: Hypers) -> None:
    seeds = question_seeds(bench)
    bench.progress.say(f"{bench.workload.name} {asked.question} {asked.value}")
    jobs = [(asked.hypers, seed) for seed in seeds]
    history, seconds = bench.train(asked.program, asked.built, jobs, trainer)
    bench.store.add(
        bench.header("question", identity, "lama", asked.hypers, seeds)
        | {"question": asked.question, "value": asked.value, "seconds": seconds}
        | {"gradient_equivalents_per_step": asked.built.gradient_equivalents}
        | fields
        | outcome(bench, history)
        | layer_fields(bench, history)
    )


def _sensitivities(quick: bool) -> tuple[float, ...]:
    """Of both signs, with 0 between them."""
    positive = QUICK_LAMBDAS if quick else LAMBDAS
    return *(-x for x in reversed(positive)), 0.0, *positive


def _retuned(bench: Bench, trainer: Trainer, base: Hypers, quick: bool) -> None:
    """Lambda again, each with the learning rate that suits it."""
    rates = [float(f"{base['lr'] * factor:.6g}") for factor in RETUNED]
    for sensitivity in _sensitivities(quick):
        hypers = base | {"sensitivity": sensitivity, "curvature_decay": 0.0}
        trials = [hypers | {"lr": rate} for rate in rates]
        _select(bench, trainer, "sensitivity_retuned", sensitivity, trials)


def _learned(bench: Bench, trainer: Trainer, base: Hypers) -> None:
    """A lambda for each layer, found by a small search, beside one lambda for all."""
    ones = [1.0] * bench.trainer.groups.count
    plain = base | {"curvature_decay": 0.0, "scale": ones}
    _select(bench, trainer, "learned", "one lambda", [plain])
    rng = np.random.default_rng(LEARNED_SEED)
    trials = [plain]
    for point in rng.uniform(-3, 3, (LEARNED_TRIALS - 1, len(ones))):
        # Symmetric in the logarithm: each layer's lambda is -1000 to 1000.
        own = np.sign(point) * (10 ** np.abs(point) - 1)
        scale = [float(f"{x:.6g}") for x in own]
        trials.append(plain | {"sensitivity": 1.0, "scale": scale})
    _select(bench, trainer, "learned", "a lambda for each layer", trials)


def _select(
    bench: Bench, trainer: Trainer, question: str, value: float | str, trials: Sequence[Hypers]
) -> None:
    """Answers with the trial of the lowest validation loss on the tuning seeds."""
    selecting, seeds = tune_seeds(bench), question_seeds(bench)
    identity = bench.identity(
        "question",
        question=question,
        value=value,
        trials=list(trials),
        seeds=seeds,
        selecting=selecting,
    )
    tuned = len(trials) > 1
    runs = len(seeds) + tuned * len(trials) * len(selecting)
    if bench.store.get(identity) is not None:
        bench.skip(lama_program(), runs)
        return
    bench.progress.say(f"{bench.workload.name} {question} {value}")
    program, best = lama_program(), trials[0]
    if tuned:
        jobs = [(trial, seed) for trial in trials for seed in selecting]
        history, _ = bench.train("lama", program, jobs, trainer)
        shape = len(trials), len(selecting)
        losses = np.reshape(history.validation_loss, shape)
        diverged = np.reshape(history.diverged, shape)
        scores = [
            score({"validation_loss": loss, "diverged": bad})
            for loss, bad in zip(losses, diverged, strict=True)
        ]
        best = trials[int(np.argmin(scores))]
    asked = Question(question, value, "lama", program, best)
    _answer(bench, trainer, asked, identity, {"trials": len(trials)})
