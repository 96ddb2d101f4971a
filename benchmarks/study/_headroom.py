"""How much could momenta for each layer win at best? Three searches with equal budgets.

Each is a random search in shrinking boxes around the best so far, from tuned Adam(lr, b1) on:
"global_momentum" over one rate and one b1, "layer_momenta" over one rate and a b1 for each layer,
"layer_rates" over a rate for each layer and one b1. All are static, all of gain 1. They select on
validation loss and are reported on the final seeds.
"""

import numpy as np

from benchmarks.study._axes import Axis
from benchmarks.study._final import outcome
from benchmarks.study._plan import Bench, final_seeds, tune_seeds
from benchmarks.study._programs import PROGRAMS
from benchmarks.study._tune import score, selected

SEARCHES = ("global_momentum", "layer_momenta", "layer_rates")
ROUNDS = 3
TRIALS = 16  # of a round
#: Half the box's width in the first round, in decades of the rate and of 1 - b1; then half that.
HALF_WIDTH = 1.0
SEED = 0  # of the random searches

RATE = Axis("lr", "log", 0, 0, 1)
MOMENTUM = Axis("b1", "momentum", 0, 0, 1, (0.0, 4.0))


def headroom_work(bench: Bench) -> float:
    """Seconds of all searches, as `Bench.work` has them."""
    runs = ROUNDS * TRIALS * len(tune_seeds(bench)) + len(final_seeds(bench))
    return len(SEARCHES) * bench.work(PROGRAMS["layered"], runs)


def headroom(bench: Bench) -> None:
    """Runs the searches that are missing."""
    for search in SEARCHES:
        _search(bench, search)


def _search(bench: Bench, search: str) -> None:
    start = selected(bench, "adam_b1")["hypers"]
    seeds, selecting = final_seeds(bench), tune_seeds(bench)
    identity = bench.identity(
        "headroom",
        arm=search,
        start=start,
        seeds=seeds,
        selecting=selecting,
        budget=[ROUNDS, TRIALS, HALF_WIDTH, SEED],
    )
    if bench.store.get(identity) is not None:
        bench.progress.expect(-headroom_work(bench) / len(SEARCHES))
        return
    bench.progress.say(f"{bench.workload.name} headroom {search}")
    count = bench.trainer.groups.count
    num_rates = count if search == "layer_rates" else 1
    num_momenta = count if search == "layer_momenta" else 1
    first = [RATE.coordinate(start["lr"])] * num_rates
    first += [MOMENTUM.coordinate(start["b1"])] * num_momenta
    best, best_score, total = np.array(first), float("inf"), 0.0
    rng = np.random.default_rng(SEED)
    for number in range(ROUNDS):
        width = HALF_WIDTH / 2**number
        # Tuned Adam itself is the first trial of all three, so that none starts behind.
        points = best + rng.uniform(-width, width, (TRIALS, len(best)))
        if number == 0:
            points[0] = best
        points[:, num_rates:] = np.clip(points[:, num_rates:], *MOMENTUM.bounds)
        trials = [_hypers(point, num_rates, count) for point in points]
        jobs = [(trial, seed) for trial in trials for seed in selecting]
        history, seconds = bench.train("layered", PROGRAMS["layered"], jobs)
        total += seconds
        shape = TRIALS, len(selecting)
        losses = np.reshape(history.validation_loss, shape)
        diverged = np.reshape(history.diverged, shape)
        for point, loss, bad in zip(points, losses, diverged, strict=True):
            found = score({"validation_loss": loss, "diverged": bad})
            if found < best_score:
                best, best_score = point, found
    hypers = _hypers(best, num_rates, count)
    jobs = [(hypers, seed) for seed in seeds]
    history, seconds = bench.train("layered", PROGRAMS["layered"], jobs)
    bench.store.add(
        bench.header("headroom", identity, search, hypers, seeds)
        | {
            "search": search,
            "trials": ROUNDS * TRIALS,
            "best_validation": best_score,
            "layers": list(bench.trainer.groups.names),
            "seconds": total + seconds,
        }
        | outcome(bench, history)
    )


def _hypers(point: np.ndarray, num_rates: int, count: int) -> dict[str, list[float]]:
    rates = [RATE.value(u) for u in point[:num_rates]]
    momenta = [MOMENTUM.value(u) for u in point[num_rates:]]
    rates *= count // len(rates)
    momenta *= count // len(momenta)
    weights = [float(f"{1 - b:.6g}") for b in momenta]
    return {"lr": rates, "decay": momenta, "weight": weights, "correction": momenta}
