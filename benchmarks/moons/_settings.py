"""The settings of `python -m benchmarks.moons` (the paper's config.yaml) and its command line."""

import argparse
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

EPILOG = """\
exit status: 0, the run ended; 2, a LAMA-Adam run with alpha b1 >= 1 diverged (its loss is not
finite or ends above where it began), or an option is wrong; 130, interrupted.

examples:
  python -m benchmarks.moons                       everything, with the paper's settings
  python -m benchmarks.moons --seeds 20 --no-grid  a quick look
  python -m benchmarks.moons --sensitivity -10     Section 5.1's sign: curvature lowers momentum
  python -m benchmarks.moons --seeds 20 --no-grid --loss-scale 1000 --sensitivity 1000 \\
      --max-momentum none                          alpha b1 passes 1 and training diverges
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run depends on; the defaults are the paper's."""

    seeds: int = 200
    base_seed: int = 42
    samples: int = 1000
    noise: float = 0.2
    test_share: float = 0.3
    hidden: int = 16
    epochs: int = 50
    batch_size: int = 64
    learning_rate: float = 0.001
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    probes: int = 10
    fd_step: float = 0.01
    alpha_min: float = 0.5
    alpha_max: float = 1.5
    sensitivity: float = 0.01
    momentum: str = "paper"
    max_momentum: float | None = 0.999
    update_interval: int = 1
    loss_scale: float = 1.0
    loss_epoch: int = 20
    grid: bool = True
    grid_seeds: int = 80
    grid_min: float = 1e-4
    grid_max: float = 1e-1
    grid_points: int = 7
    grid_sensitivity: float = 10.0
    results: Path = Path("results/moons")

    @property
    def reported_epoch(self) -> int:
        """The epoch whose loss is compared with the paper's: `loss_epoch`, if trained so long."""
        return min(self.loss_epoch, self.epochs)

    @property
    def compared_grid_seeds(self) -> int:
        """Seeds of the learning-rate grid: never more than the run has."""
        return min(self.grid_seeds, self.seeds)


def _integer(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {low}; got {text!r}")
        return value

    return parse


def _number(allowed: str, accept: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and accept(value)):
            raise argparse.ArgumentTypeError(f"must be {allowed}; got {text!r}")
        return value

    return parse


_positive = _number("a number above 0", lambda x: x > 0)
_not_negative = _number("a number of at least 0", lambda x: x >= 0)
_finite = _number("a finite number", lambda _: True)
_share = _number("between 0 and 1", lambda x: 0 < x < 1)
_decay = _number("in [0, 1)", lambda x: 0 <= x < 1)


def _max_momentum(text: str) -> float | None:
    return None if text == "none" else _number("'none' or in [0, 1)", lambda x: 0 <= x < 1)(text)


def parser() -> argparse.ArgumentParser:
    """The command line; every option has the default of `Settings`."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.moons",
        description="Reproduces the LAMA-Adam paper's experiment on make_moons, over many seeds.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def option(group: argparse._ArgumentGroup, name: str, kind: Callable, text: str) -> None:
        default = getattr(Settings, name.replace("-", "_"))
        shown = "none" if default is None else default
        group.add_argument(
            f"--{name}", type=kind, default=default, help=f"{text} (default {shown})", metavar="X"
        )

    run = result.add_argument_group("the run")
    option(run, "seeds", _integer(1), "runs, each with its own data, split, start and batches")
    option(run, "base-seed", _integer(0), "first seed; the others follow it")
    option(run, "results", Path, "directory of the figures and tables")
    option(run, "loss-epoch", _integer(1), "epoch whose loss is compared with the paper's")

    data = result.add_argument_group("data and model")
    option(data, "samples", _integer(20), "points of make_moons")
    option(data, "noise", _not_negative, "noise of make_moons")
    option(data, "test-share", _share, "share of the points kept for testing")
    option(data, "hidden", _integer(1), "hidden units of the 2-h-1 network")

    both = result.add_argument_group("training, the same for all optimizers")
    option(both, "epochs", _integer(1), "passes over the training points")
    option(both, "batch-size", _integer(1), "points in a batch")
    option(both, "learning-rate", _positive, "learning rate")
    option(both, "b1", _decay, "decay of the first moment, Eq. 1")
    option(both, "b2", _decay, "decay of the second moment, Eq. 2")
    option(both, "eps", _not_negative, "added to the denominator, Eq. 5")
    option(both, "loss-scale", _positive, "constant that multiplies the training loss")

    lama = result.add_argument_group("LAMA-Adam")
    option(lama, "probes", _integer(1), "K of Eq. 7")
    option(lama, "fd-step", _positive, "delta of the finite-difference products")
    option(lama, "alpha-min", _not_negative, "lower limit of alpha, Eq. 9")
    option(lama, "alpha-max", _not_negative, "upper limit of alpha, Eq. 9")
    option(lama, "sensitivity", _finite, "lambda of Eq. 9, of either sign")
    option(lama, "max-momentum", _max_momentum, "cap of alpha b1, or the word none")
    option(lama, "update-interval", _integer(1), "steps from one estimate to the next")
    lama.add_argument(
        "--momentum",
        choices=("paper", "ema"),
        default=Settings.momentum,
        help="Eq. 6 as the paper writes it, or as a true average (default paper)",
    )

    grid = result.add_argument_group("learning-rate grid")
    grid.add_argument("--no-grid", dest="grid", action="store_false", help="leave the grid out")
    option(grid, "grid-seeds", _integer(2), "seeds used for each learning rate")
    option(grid, "grid-min", _positive, "lowest learning rate")
    option(grid, "grid-max", _positive, "highest learning rate")
    option(grid, "grid-points", _integer(2), "learning rates, evenly spaced in their logarithm")
    option(grid, "grid-sensitivity", _finite, "a second lambda, large enough to move alpha")
    return result


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Reads the command line; a wrong option ends the program with a message that names it."""
    command_line = parser()
    settings = Settings(**vars(command_line.parse_args(argv)))
    if settings.alpha_min > settings.alpha_max:
        command_line.error(
            f"argument --alpha-min: must be at most --alpha-max, {settings.alpha_max};"
            f" got {settings.alpha_min}"
        )
    if settings.grid_min >= settings.grid_max:
        command_line.error(
            f"argument --grid-min: must be below --grid-max, {settings.grid_max};"
            f" got {settings.grid_min}"
        )
    return settings


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
