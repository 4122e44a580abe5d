"""Sphinx configuration; `make docs` builds the site."""

import pathlib
import re

from sphinx.errors import ExtensionError

import came_optax

project = "came-optax"
author = "The came-optax authors"
copyright = "2026, the came-optax authors"
version = release = came_optax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # MathJax as a part of the site, not of a CDN's.
    "sphinx_copybutton",
    "sphinxext.opengraph",
]
# The tables in results are included by pages; the protocol is a page itself.
exclude_patterns = [
    "_build",
    "results/*.md",
    "results/[!s]*",
    "results/s[!t]*",
    "results/study/results.md",
]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 2
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

html_theme = "sphinx_book_theme"
html_title = "came-optax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_theme_options = {"navbar_persistent": [], "show_navbar_depth": 1}

ogp_social_cards = {"enable": False}  # A picture of text a page.

copybutton_exclude = ".linenos, .gp, .go"

_pages = pathlib.Path(__file__).parent.joinpath("api").glob("*.md")
_text = "".join(page.read_text(encoding="utf-8") for page in _pages)
_listed = set(re.findall(r"^.. auto(?:function|class):: (\w+)", _text, flags=re.M))
if missing := set(came_optax.__all__) - {"__version__"} - _listed:
    raise ExtensionError(f"the pages in docs/api lack {', '.join(sorted(missing))}")
