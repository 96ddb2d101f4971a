"""`plot_report`: every layer is in the picture, at its value, with its interval and its name."""

import matplotlib

matplotlib.use("Agg")  # no display

import matplotlib.pyplot as plt
import numpy as np
import pytest

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
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["hidden", "out"]
    assert "loss per parameter squared" in figure.get_supylabel()


def test_noise_scale_is_drawn_with_its_own_interval():
    row = {"noise_scale/total": 50.0, "noise_scale_std_error/total": 5.0}
    ends = {"noise_scale_at_least/total": 42.0, "noise_scale_at_most/total": 63.0}
    rows = [{"step": 0}, {"step": 10, **row, **ends}, {"step": 20, **row, **ends}]
    figure = plot_report(rows, quantity="noise_scale")
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (42.0, 63.0)
    assert figure.get_supylabel() == "gradient noise scale (examples)"


def test_negative_values_are_drawn_below_zero():
    axes = plot_report(history({"a": -0.1, "b": 0.2}, std_error=0.01)).axes[0]
    assert axes.get_yscale() == "symlog"
    zero, negative = axes.transData.transform([(0, 0), (0, -0.1)])[:, 1]
    assert axes.bbox.y0 < negative < zero < axes.bbox.y1
    assert plot_report(history({"a": 0.0})).axes  # no logarithm of zero is taken


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
