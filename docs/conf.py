"""The site: `make docs` builds it, without a network and without running a notebook."""

import importlib.util
import tomllib
from pathlib import Path

from docutils import nodes

import lama_optax

ROOT = Path(__file__).parents[1]
SOURCE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]

project = "lama_optax"
author = copyright = "The lama_optax authors"
version = release = lama_optax.__version__

extensions = [
    "myst_nb",  # pages in Markdown; notebooks as they are committed
    "sphinx.ext.autodoc",
    "sphinx.ext.extlinks",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "notebooks/*.py", "**/.ipynb_checkpoints"]
default_role = "py:obj"  # `fisher` in a docstring links to fisher

# {source}`examples/plain.py` is a link to that file of the repository.
extlinks = {"source": (f"{SOURCE}/blob/main/%s", "%s")}

myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_render_image_options = {"alt": "The picture that the code above it draws"}

autodoc_typehints = "none"  # Args say the types in words, with shapes and units
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 88

html_theme = "furo"  # its fonts are the reader's: nothing is loaded from elsewhere
html_title = f"lama_optax {release}"
html_copy_source = False
html_domain_indices = False  # the one of modules would repeat the API page
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True

# Equations without a network: the one file of MathJax that needs no fonts.
_mathjax = importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations[0]
html_static_path = [f"{_mathjax}/static/mathjax/tex-svg.js"]
mathjax_path = "tex-svg.js"


#: Files of the repository that are pages here.
PAGES = {
    "../benchmarks/README.md": "benchmarks.md",
    "../benchmarks/RESULTS.md": "RESULTS.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../CHANGELOG.md": "changelog.md",
}


def setup(app):
    """Registers what is below."""
    app.connect("source-read", with_pages)
    app.connect("doctree-read", without_last_lines)


def with_pages(app, docname, source):
    """Links that work on the repository's own site lead to pages of this one."""
    for file, page in PAGES.items():
        source[0] = source[0].replace(f"]({file}", f"]({page}")


def without_last_lines(app, doctree):
    """Cuts the empty line at which a doctest's output ends: a reader need not see it."""
    for block in doctree.findall(nodes.literal_block):
        block.rawsource = block.astext().rstrip()
        block.children = [nodes.Text(block.rawsource)]
