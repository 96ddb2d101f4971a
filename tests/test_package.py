"""Wheel and sdist install and import on their own, away from the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    _run("-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT))
    return {path.suffix: path for path in out.iterdir()}


def _run(*args, **kwargs):
    result = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=300, **kwargs
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("suffix", [".whl", ".gz"])
def test_archive_installs_and_imports_on_its_own(archives, suffix, tmp_path):
    target = tmp_path / "site"
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    _run(*pip, "--target", str(target), str(archives[suffix]))
    code = "import lama_optax; print(lama_optax.__file__); lama_optax.lama_adam(1e-3)"
    printed = _run("-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(target)})
    assert Path(printed.strip()).is_relative_to(target)


def test_archives_hold_the_package_alone(archives):
    names = zipfile.ZipFile(archives[".whl"]).namelist()
    assert "lama_optax/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lama_optax"}
    with tarfile.open(archives[".gz"]) as sdist:
        top = {member.split("/")[1] for member in sdist.getnames()}
    assert top <= {
        *("lama_optax", "README.md", "CHANGELOG.md", "LICENSE"),
        *("pyproject.toml", "PKG-INFO", ".gitignore"),
    }
