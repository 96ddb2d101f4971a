"""The arms: optimizers with two tuned axes each, the boxes they are tuned in, and the trials."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon
from scipy.stats import qmc

from benchmarks.study._workload import Workload
from lama_optax import fisher, lam_scale, lama_scale

Hyper = dict[str, Any]
Box = tuple[tuple[float, float], ...]

TRIALS = 5
#: Of every arm whose b1 is not tuned; LAMA multiplies it.
B1 = 0.9
CLIP = 1.0
WARM_UP = 0.05


def _muon_axes(params: Any) -> Any:
    """Which axes of a GPT's kernels are inputs and outputs; what is no kernel is Adam's."""

    def of(path: Any, x: jax.Array) -> MuonDimensionNumbers | None:
        names = [str(entry.key) for entry in path]
        if names[-1] != "kernel" or "head" in names:
            return None
        if x.ndim == 2:
            return MuonDimensionNumbers(0, 1)
        # Attention: (width, heads, depth), and back at the output.
        return (
            MuonDimensionNumbers((0, 1), 2) if "out" in names else MuonDimensionNumbers(0, (1, 2))
        )

    return jax.tree_util.tree_map_with_path(of, params)


def _lama(hyper: Hyper, workload: Workload) -> optax.GradientTransformation:
    return lama_scale(
        B1,
        workload.b2,
        sensitivity=hyper["lambda"],
        estimator=fisher(),
        update_interval=workload.interval,
        curvature_decay=0.9,
    )


def _adam(hyper: Hyper, workload: Workload) -> optax.GradientTransformation:
    return optax.scale_by_adam(1 - hyper.get("1-b1", 1 - B1), workload.b2)


@dataclasses.dataclass(frozen=True)
class Arm:
    """An optimizer: what is tuned, and the direction that it makes of a gradient."""

    title: str
    axes: tuple[str, str]  # of lr, decay, 1-b1, lambda
    direction: Callable[[Hyper, Workload], optax.GradientTransformation] | None  # None: Muon

    @property
    def estimates(self) -> bool:
        """Whether it measures curvature."""
        return "lambda" in self.axes


ARMS = {
    "A": Arm("AdamW", ("lr", "decay"), _adam),
    "A'": Arm("AdamW again", ("lr", "decay"), _adam),
    "M": Arm("AdamW (b1)", ("lr", "1-b1"), _adam),
    "L": Arm("LAMA", ("lr", "lambda"), _lama),
    "E": Arm("Muon", ("lr", "decay"), None),
    "LAM weight": Arm("LAM per weight", ("lr", "1-b1"), lambda h, w: lam_scale(1 - h["1-b1"])),
    "LAM layer": Arm(
        "LAM per layer",
        ("lr", "1-b1"),
        lambda h, w: lam_scale(1 - h["1-b1"], granularity="layer"),
    ),
    "AMSGrad": Arm("AMSGrad", ("lr", "decay"), lambda h, w: optax.scale_by_amsgrad(B1, w.b2)),
    "RAdam": Arm("RAdam", ("lr", "decay"), lambda h, w: optax.scale_by_radam(B1, w.b2)),
}


def optimizer(name: str, workload: Workload, hyper: Hyper) -> optax.GradientTransformationExtraArgs:
    """Clipping, the arm's direction, decoupled weight decay, warm-up and cosine to 0.

    ``hyper`` may be traced, so that one compiled program serves all trials.
    """
    warm = max(1, round(WARM_UP * workload.steps))
    shape = optax.warmup_cosine_decay_schedule(1 / warm, 1.0, warm, workload.steps)

    def rate(count: jax.Array) -> jax.Array:
        return hyper["lr"] * shape(count)

    decay, direction = hyper.get("decay", workload.decay), ARMS[name].direction
    if direction is None:
        # A root mean square of 0.2, as AdamW's steps have, so that both take like rates.
        inner = muon(
            rate,
            weight_decay=decay,
            adam_b1=B1,
            adam_b2=workload.b2,
            adam_weight_decay=decay,
            muon_weight_dimension_numbers=_muon_axes,
            consistent_rms=0.2,
        )
        return optax.chain(optax.clip_by_global_norm(CLIP), inner)
    return optax.chain(
        optax.clip_by_global_norm(CLIP),
        direction(hyper, workload),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(rate),
    )


#: A decade of rates and one or more of the second axis, around the calibration's best. A, M, L and
#: AMSGrad share their rates, where their bests lie within one decade. Of lambda the magnitude.
BOXES: dict[str, dict[str, Box]] = {
    "gpt": {
        "A": ((1e-3, 1e-2), (0.01, 1.0)),
        "M": ((1e-3, 1e-2), (0.1, 1.0)),
        "L": ((1e-3, 1e-2), (1.0, 100.0)),
        "E": ((3e-3, 3e-2), (0.01, 1.0)),
    },
    "cnn": {
        "A": ((0.01, 0.1), (0.001, 0.1)),
        "M": ((0.01, 0.1), (0.1, 1.0)),
        "L": ((0.01, 0.1), (1.0, 100.0)),
        "LAM weight": ((0.01, 0.1), (0.1, 1.0)),
        "LAM layer": ((0.01, 0.1), (0.1, 1.0)),
        "AMSGrad": ((0.01, 0.1), (0.01, 1.0)),
        "RAdam": ((0.03, 0.3), (0.001, 0.1)),
    },
    "pinn": {
        "A": ((0.02, 0.2), (1e-4, 0.01)),
        "M": ((0.02, 0.2), (0.01, 0.1)),
        "L": ((0.02, 0.2), (0.1, 10.0)),
        "LAM weight": ((0.01, 0.1), (0.1, 1.0)),
        "LAM layer": ((0.01, 0.1), (0.03, 0.3)),
        "AMSGrad": ((0.02, 0.2), (1e-4, 0.01)),
        "RAdam": ((0.03, 0.3), (1e-4, 0.01)),
    },
    "cartpole": {
        "A": ((0.02, 0.2), (1e-4, 0.01)),
        "M": ((0.02, 0.2), (0.1, 1.0)),
        "L": ((0.02, 0.2), (0.1, 10.0)),
        "LAM weight": ((0.01, 0.1), (0.03, 0.3)),
        "LAM layer": ((0.01, 0.1), (0.01, 0.1)),
        "AMSGrad": ((0.02, 0.2), (0.001, 0.1)),
        "RAdam": ((1.0, 10.0), (1e-4, 0.01)),
    },
}


def box(name: str, workload: Workload) -> Box:
    """The ranges of an arm's two axes."""
    return BOXES[workload.name][name.rstrip("'")]


def setting(name: str, ranges: Box, point: np.ndarray) -> Hyper:
    """The hyper-parameters at a point of the unit square: logarithmic in every axis.

    Of lambda the middle is where the sign changes, and the magnitude grows to both sides.
    """
    found = {}
    for axis, (low, high), u in zip(ARMS[name].axes, ranges, point, strict=True):
        if axis == "lambda":
            u = 2 * u - 1
            found[axis] = float(np.copysign(low * (high / low) ** abs(u), u))
        else:
            found[axis] = float(low * (high / low) ** u)
    return found


def trials(name: str, workload: Workload, study: int) -> list[Hyper]:
    """The study's trials: scrambled Halton points, others for every study and arm."""
    rng = np.random.default_rng([study, list(ARMS).index(name)])
    points = qmc.Halton(2, rng=rng).random(TRIALS)
    return [setting(name, box(name, workload), point) for point in points]
