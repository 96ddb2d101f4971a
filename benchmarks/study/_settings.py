"""The command line of `python -m benchmarks.study`, and the names of everything it runs."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

#: Part of every unit's settings: results of another protocol are not mixed with these.
PROTOCOL = 2

WORKLOADS = (
    "digits_mlp",
    "digits_cnn",
    "digits_autoencoder",
    "breast_cancer",
    "wine",
    "diabetes",
    "char_lm",
    "pinn",
    "cartpole",
)

#: Tuned, all with the same number of trials.
ARMS = (
    "adam",
    "adam_b1",
    "lama",
    "lama_paper",
    "lama_ema",
    "sgd",
    "amsgrad",
    "radam",
    "nadam",
    "sophia",
    "rmsprop",
    "lam_weight",
    "lam_layer",
    "v1",
    "v2",
    "v3",
    "v3_global",
    "v4",
    "v4_fixed",
    "v5",
    "v6",
)

#: Not tuned: each is made from the selected trial of the arm that it explains.
CONTROLS = {
    "adam_matched": "lama",
    "lama_frozen": "lama",
    "lama_shuffled": "lama",
    "lama_flipped": "lama",
    "v1_shuffled": "v1",
    "v6_shuffled": "v6",
}

PHASES = ("tune", "final", "headroom", "questions", "report")

QUICK_WORKLOADS = ("digits_mlp", "breast_cancer")
QUICK_ARMS = ("adam", "adam_b1", "lama")

EPILOG = """\
examples:
  python -m benchmarks.study all                       everything; hours on two cores
  python -m benchmarks.study all --quick               two workloads, 20 seeds, about a minute
  python -m benchmarks.study tune --workloads wine     one phase of one workload
  python -m benchmarks.study report                    tables and pictures from what is there

Every finished unit is a line of RESULTS/WORKLOAD.jsonl. Started again, after an interruption or
not, a command runs what is missing and nothing twice. Commands on different workloads may run at
the same time. Phases: tune selects on validation loss; final runs the selected on fresh seeds, and
needs tune; questions and headroom need tune. exit status: 0; 2, a wrong option or an earlier
phase is missing; 130, interrupted.
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    phase: str
    results: Path
    workloads: tuple[str, ...]
    arms: tuple[str, ...]
    quick: bool
    scale: float
    output: Path | None
    all_named: bool = False  # whether the workloads were named one by one


def _names(what: str, allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        unknown = [name for name in names if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"unknown {what} {unknown[0]!r}; allowed, separated by commas: {', '.join(allowed)}"
            )
        return names

    return parse


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"must be a number above 0, at most 1000; got {text!r}")
    return value


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Reads the command line; a wrong option ends the program with a message that names it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description="Tunes, compares and explains optimizers on nine workloads.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("phase", choices=(*PHASES, "all"), help="what to do")
    parser.add_argument(
        "--results", type=Path, help="directory of the results (default results/study)"
    )
    parser.add_argument(
        "--workloads", type=_names("workload", WORKLOADS), help="some of: " + ", ".join(WORKLOADS)
    )
    parser.add_argument("--arms", type=_names("arm", ARMS), help="some of: " + ", ".join(ARMS))
    parser.add_argument("--quick", action="store_true", help="2 workloads, 3 arms, 20 seeds")
    parser.add_argument(
        "--scale", type=_positive, default=1.0, help="multiplies the number of seeds (default 1)"
    )
    parser.add_argument("--output", type=Path, help="where the report is written")
    given = parser.parse_args(argv)
    workloads = given.workloads or (QUICK_WORKLOADS if given.quick else WORKLOADS)
    arms = given.arms or (QUICK_ARMS if given.quick else ARMS)
    results = given.results or Path("results/study-quick" if given.quick else "results/study")
    return Settings(
        phase=given.phase,
        results=results,
        workloads=workloads,
        arms=arms,
        quick=given.quick,
        scale=given.scale,
        output=given.output,
        all_named=given.workloads is not None,
    )


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
