"""`plot_report`: every layer is in the picture, at its value, with its interval and its name."""

import itertools

import matplotlib

matplotlib.use("Agg")  # no display

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.text import Text

from lama_optax.plot import plot_report


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def history(curvature, std_error=None, steps=4):
    """Rows as ``layer_report(flat=True)`` gives them: no standard error at the first step."""
    rows = []
    for step in range(steps):
        row = {"step": 10 * step, "loss": 0.5}
        row |= {f"curvature/{name}": value for name, value in curvature.items()}
        if step and std_error:
            row |= {f"curvature_std_error/{name}": std_error for name in curvature}
        rows.append(row)
    return rows


def test_the_line_and_the_band():
    figure = plot_report(history({"hidden": 0.2, "out": 0.4}, std_error=0.01))
    axes = figure.axes[0]
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.2] * 4, [0.4] * 4]
    assert axes.lines[0].get_xdata().tolist() == [0, 10, 20, 30]
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 0].min(), band[:, 0].max()) == (10, 30)  # none where no error is known
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.2 - 0.0196, 0.2 + 0.0196))
    assert axes.get_yscale() == "log"
    assert figure.get_suptitle() == "At step 30, the curvature of out is 2.0 times that of hidden"
    assert "loss per parameter squared" in figure.get_supylabel()


def test_what_is_not_known_is_not_claimed():
    overlapping = plot_report(history({"a": 0.2, "b": 0.21}, std_error=0.1))
    assert overlapping.get_suptitle().endswith("cannot be told apart")
    assert plot_report(history({"a": 0.2, "b": 0.3})).get_suptitle() == "curvature"


def test_negative_values_are_drawn_below_zero():
    axes = plot_report(history({"a": -0.1, "b": 0.2}, std_error=0.01)).axes[0]
    assert axes.get_yscale() == "symlog"
    zero, negative = axes.transData.transform([(0, 0), (0, -0.1)])[:, 1]
    assert axes.bbox.y0 < negative < zero < axes.bbox.y1
    assert plot_report(history({"a": 0.0})).axes  # no logarithm of zero is taken


def test_names_of_equal_layers_do_not_collide():
    figure = plot_report(history({f"layer_{i}": 0.1 for i in range(8)}))
    figure.canvas.draw()
    # Of the text alone: an annotation's own extent holds its leader line.
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
    boxes.sort(key=lambda box: box.y0)
    assert len(boxes) == 8
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))


def test_many_layers_share_panels_by_kind():
    """60 layers: each is drawn once, in the panel of its kind, in the order of its number."""
    curvature = {f"block_{i}/{kind}": i + 1 for i in range(12) for kind in "abcde"}
    figure = plot_report(history(curvature, std_error=0.1))
    panels = [axes for axes in figure.axes if axes.lines]
    assert [axes.get_title("left") for axes in panels] == [f"block_*/{kind}" for kind in "abcde"]
    for axes in panels:
        assert [line.get_ydata()[0] for line in axes.lines] == list(range(1, 13))
    limits = {axes.get_ylim() for axes in panels}
    assert len(limits) == 1
    colors = [line.get_color() for line in panels[0].lines]
    assert len(np.unique(colors, axis=0)) == 12


def test_another_quantity_and_a_file(tmp_path):
    rows = [{"step": step, "momentum/a": 0.9, "curvature/a": 1.0} for step in range(2)]
    figure = plot_report(rows, tmp_path / "momentum.png", quantity="momentum")
    assert figure.axes[0].lines[0].get_ydata().tolist() == [0.9, 0.9]
    assert (tmp_path / "momentum.png").read_bytes().startswith(b"\x89PNG")
    assert not plt.get_fignums()  # a loop that draws at every epoch leaves no figures behind


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([], r"0 rows"),
        ([{"step": 1, "alpha/a": 1.0}], r"1 rows.*\['alpha'\]"),
        ([{"step": 1, "curvature/a": None}], r"1 rows.*\['curvature'\]"),
    ],
)
def test_history_without_the_quantity(rows, found):
    with pytest.raises(ValueError, match=rf"history must hold.*'curvature/NAME'.*{found}"):
        plot_report(rows)
