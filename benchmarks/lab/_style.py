"""How pictures look: Okabe and Ito's colours, which colour-blind readers can tell apart."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

ORANGE, SKY, GREEN = "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

#: In the order in which lines of one picture take them.
COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "black")
MARKERS = ("o", "s", "^", "D", "v", "P", "x")

STYLE: Any = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


def logarithmic(axes: Axes, which: str) -> None:
    """Makes the axes named in ``which`` logarithmic, with plain numbers; call it after drawing."""
    for name in which:
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        low, high = getattr(axes, f"get_{name}lim")()
        # Within two decades powers of ten alone are too few.
        steps = (1.0,) if high / low > 100 else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
        axis.set_minor_formatter(NullFormatter())


def plain_number(value: float) -> str:
    """0.01 to 9999 as they are, what is beyond as a power of ten."""
    if 1e-2 <= abs(value) < 1e4 or value == 0:
        return f"{value:g}"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    factor = value / 10.0**power
    return f"$10^{{{power}}}$" if math.isclose(factor, 1) else f"${factor:g}\\cdot10^{{{power}}}$"


def save_all(folder: Path, figures: Mapping[str, Callable[[], Figure]]) -> None:
    """Draws each figure in the common style and writes it to ``folder``."""
    for name, draw in figures.items():
        with plt.rc_context(STYLE):
            figure = draw()
            figure.savefig(folder / name)
            plt.close(figure)
