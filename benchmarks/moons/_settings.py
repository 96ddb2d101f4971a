"""The settings of `python -m benchmarks.moons` (the paper's config.yaml) and its command line."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
    def compared_grid_seeds(self) -> int:
        """Seeds of the learning-rate grid: never more than the run has."""
        return min(self.grid_seeds, self.seeds)


def _number(kind: type, allowed: str, accept: Callable[[Any], bool]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and accept(value)):
            raise argparse.ArgumentTypeError(f"must be {allowed}; got {text!r}")
        return value

    return parse


def _max_momentum(text: str) -> float | None:
    decay = _number(float, "'none' or in [0, 1)", lambda x: 0 <= x < 1)
    return None if text == "none" else decay(text)


_count = _number(int, "an integer of at least 1", lambda x: x >= 1)
_seed = _number(int, "an integer of at least 0", lambda x: x >= 0)
_positive = _number(float, "a number above 0", lambda x: x > 0)
_finite = _number(float, "a finite number", lambda _: True)

#: Option -> its type and what it says. What is not here is the paper's.
OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "seeds": (_count, "runs, each with its own data, split, start and batches"),
    "base-seed": (_seed, "first seed; the others follow it"),
    "results": (Path, "directory of the figures and tables"),
    "epochs": (_count, "passes over the training points"),
    "learning-rate": (_positive, "learning rate"),
    "loss-scale": (_positive, "constant that multiplies the training loss"),
    "probes": (_count, "K of Eq. 7"),
    "sensitivity": (_finite, "lambda of Eq. 9, of either sign"),
    "max-momentum": (_max_momentum, "cap of alpha b1, or the word none"),
    "grid-points": (_count, "learning rates of the grid"),
}


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Reads the command line; a wrong option ends the program with a message that names it."""
    command_line = argparse.ArgumentParser(
        prog="python -m benchmarks.moons",
        description="Reproduces the LAMA-Adam paper's experiment on make_moons, over many seeds.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, (kind, text) in OPTIONS.items():
        default = getattr(Settings, name.replace("-", "_"))
        words = f"{text} (default {default})"
        command_line.add_argument(f"--{name}", type=kind, default=default, help=words, metavar="X")
    words = "Eq. 6 as the paper writes it, or as a true average (default paper)"
    command_line.add_argument("--momentum", choices=("paper", "ema"), default="paper", help=words)
    command_line.add_argument(
        "--no-grid", dest="grid", action="store_false", help="leave the learning-rate grid out"
    )
    return Settings(**vars(command_line.parse_args(argv)))
