"""The site: every public name, whole links, pictures with words, nothing from elsewhere."""

import functools
import html.parser
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import lama_optax

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_api_page_has_every_public_name():
    listed = re.findall(
        r"^\.\. auto(?:function|class):: (\w+)$", (DOCS / "api.md").read_text(), re.M
    )
    public = {n for n, x in vars(lama_optax).items() if n[0] != "_" and not inspect.ismodule(x)}
    assert sorted(listed) == sorted(public)


def test_one_version_everywhere():
    version = lama_optax.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{version}}}" in (DOCS / "index.md").read_text()
    assert re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == version


class Page(html.parser.HTMLParser):
    """What a page names: its anchors, what it links to, what it loads, its pictures."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loaded, self.pictures = set(), [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors.add(found.get("id"))
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(found["href"])
        if tag in ("script", "img", "iframe") and "src" in found:
            self.loaded.append(found["src"])
        if tag == "img":
            self.pictures.append((found["src"], found.get("alt", "")))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Every page by its path, from a build that a warning breaks."""
    out = tmp_path_factory.mktemp("site") / "html"
    built = subprocess.run(
        [*(sys.executable, "-m", "sphinx"), *("-W", "--keep-going", "-q"), str(DOCS), str(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **{"capture_output": True, "text": True, "timeout": 600},
    )
    assert built.returncode == 0, built.stderr
    return {path: Page(path) for path in sorted(out.rglob("*.html"))}


@pytest.mark.slow
def test_no_link_is_broken(site):
    anchors = functools.cache(lambda path: site[path].anchors)
    broken = []
    for path, page in site.items():
        for link in page.links + page.loaded:
            target, anchor = urldefrag(link)
            if re.match(r"\w+:", link) or link == "#":
                continue
            file = (path.parent / unquote(target)).resolve() if target else path
            file = Path(str(file).partition("?")[0])  # a file's version follows its name
            if not file.exists() or (anchor and unquote(anchor) not in anchors(file)):
                broken.append((path.name, link))
    assert not broken
    assert sum(len(page.links) for page in site.values()) > 500


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site):
    assert not [link for page in site.values() for link in page.loaded if "//" in link]


@pytest.mark.slow
def test_every_picture_has_words(site):
    pictures = [picture for page in site.values() for picture in page.pictures]
    assert len(pictures) > 5
    # Without words, docutils writes the file's path.
    assert not [src for src, alt in pictures if len(alt) < 10 or alt.endswith((".png", ".svg"))]


@pytest.mark.slow
def test_the_modules_beside_have_their_names(site):
    (api,) = (page for path, page in site.items() if path.name == "api.html")
    assert {
        "lama_optax.rounding.allocate_bits",
        "lama_optax.rounding.loss_increase",
        "lama_optax.rounding.qwix_rules",
        "lama_optax.flax.TrainState.apply_gradients",
        "lama_optax.flax.nnx_apply_fn",
        "lama_optax.plot.plot_report",
        "lama_optax.optimizers.equations.momentum_factor",
    } <= api.anchors
