"""Draws the pictures of the committed results again: `python -m benchmarks.redraw`.

Of `moons` and `study` they need more than their results hold: these two draw at the end of a run.
"""

import importlib
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """All benchmarks whose tables are there."""
    for name in ("cost", "noise_scale", "rounding", "traces"):
        if (RESULTS / name / "results.json").exists():
            importlib.import_module(f"benchmarks.{name}._figures").draw_all(RESULTS / name)


if __name__ == "__main__":
    main()
