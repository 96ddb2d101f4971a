"""How pictures look: the moons' style and colours, which colour-blind readers can tell apart."""

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from benchmarks.moons._figures import BLUE, GREEN, ORANGE, PURPLE, SKY, STYLE, VERMILLION

__all__ = ["BLUE", "COLORS", "MARKERS", "VERMILLION", "logarithmic", "save_all"]

#: In the order in which lines of one picture take them.
COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "black")
MARKERS = ("o", "s", "^", "D", "v", "P", "x")


def logarithmic(axes: Axes, which: str) -> None:
    """Makes the axes named in ``which`` logarithmic, with plain numbers on them."""
    for name in which:
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


def save_all(folder: Path, figures: Mapping[str, Callable[[], Figure]]) -> None:
    """Draws each figure in the common style and writes it to ``folder``."""
    for name, draw in figures.items():
        with plt.rc_context(STYLE):
            figure = draw()
            figure.savefig(folder / name)
            plt.close(figure)
