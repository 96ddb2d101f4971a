"""The notebooks run from top to bottom, and their two files hold the same cells."""

import json
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

import lama_optax

pytestmark = pytest.mark.slow

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("0*.py"))
STORED = sorted(NOTEBOOKS.glob("*.ipynb"))
TRAINING = ("05_fewer_bits", "06_batch_size")


@pytest.fixture
def own_kernel(tmp_path, monkeypatch):
    """A kernel ``python3`` that is this interpreter with this library, whatever is registered."""
    write_kernel_spec(tmp_path / "kernels" / "python3")
    spec = json.loads((tmp_path / "kernels" / "python3" / "kernel.json").read_text())
    assert spec["argv"][0] == sys.executable
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    library = str(Path(lama_optax.__file__).parents[1])
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([library, *inherited]))
    # A reader has one CPU device, not the eight virtual ones of the tests.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return "python3"


def test_the_notebooks_are_here():
    names = {
        "01_quickstart",
        "02_exact_vs_finite_differences",
        "04_stability",
        "05_fewer_bits",
        "06_batch_size",
    }
    assert names <= {path.stem for path in SOURCES}
    assert names <= {path.stem for path in STORED}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_it_runs(source, own_kernel, tmp_path, monkeypatch):
    if source.stem not in TRAINING:  # the others compile more than they run
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    else:
        monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
    notebook = jupytext.read(source)
    NotebookClient(
        notebook,
        kernel_name=own_kernel,
        timeout=600,  # seconds for one cell
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    complaints = [
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
        and output.name == "stderr"
        # Said once where matplotlib runs for the first time.
        and "font cache" not in output["text"]
    ]
    assert not complaints


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.stem)
def test_both_files_hold_the_same_cells(stored):
    def cells(notebook):
        return [(cell.cell_type, cell.source) for cell in notebook.cells]

    source = jupytext.read(stored.with_suffix(".py"))
    assert cells(nbformat.read(stored, as_version=4)) == cells(source), "run `make notebooks`"


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.stem)
def test_what_is_stored_is_whole_and_small(stored):
    """Every code cell was executed in order, without complaint; pictures are kept."""
    assert stored.stat().st_size < 300_000
    notebook = nbformat.read(stored, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.get("text", "") for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
    # No path of the machine that it ran on.
    assert not re.search(r"(/home|/Users|/tmp|/root|site-packages|[A-Z]:\\)", text)
