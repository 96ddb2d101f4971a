"""Wheel and sdist install and import on their own, away from the checkout."""

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
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


def _run(*args, python=sys.executable, **kwargs):
    result = subprocess.run([python, *args], capture_output=True, text=True, timeout=900, **kwargs)
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
        *("lama_optax", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"),
        *("pyproject.toml", "PKG-INFO", ".gitignore"),
    }


def test_readmes_first_snippet_runs_where_the_wheel_alone_is_installed(archives, tmp_path):
    """With the versions that were tested; the environment holds what the wheel asks for."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = ROOT / "constraints" / "python{}.{}.txt".format(*sys.version_info)
    pinned = ["--constraint", str(constraints)] if constraints.exists() else []
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pinned]
    _run(*pip, str(archives[".whl"]), python=python)
    snippet = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    assert ">>> " in snippet
    (tmp_path / "snippet.txt").write_text(snippet)
    plain = {name: x for name, x in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    options = ["-o", "NORMALIZE_WHITESPACE", "-o", "ELLIPSIS"]
    printed = _run(
        *("-m", "doctest", "-v", *options, "snippet.txt"), python=python, cwd=tmp_path, env=plain
    )
    assert "Test passed" in printed


def test_an_index_shows_readme_with_whole_addresses(archives):
    """An index has README alone: each link and picture names its file of the repository."""
    wheel = zipfile.ZipFile(archives[".whl"])
    (metadata,) = (name for name in wheel.namelist() if name.endswith("dist-info/METADATA"))
    readme = email.message_from_bytes(wheel.read(metadata)).get_payload()
    source = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
    addresses = re.findall(r"\]\(([^)\s]+)", readme) + re.findall(r'src="([^"]+)', readme)
    own = [address for address in addresses if address.startswith(source)]
    assert all(re.match("https?:|#", address) for address in addresses)
    assert any("/raw/" in address for address in own)
    for address in own:
        kind, path = re.fullmatch(f"{source}/(raw|blob)/main/([^#]*).*", address).groups()
        assert (ROOT / path).exists(), address
        assert (kind == "raw") == path.endswith((".png", ".svg"))
