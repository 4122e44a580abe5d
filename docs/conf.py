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
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "results"]
templates_path = ["_templates"]
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

html_theme = "sphinx_book_theme"
html_title = "came-optax"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_theme_options = {"navbar_persistent": []}

_api = (pathlib.Path(__file__).parent / "api.md").read_text(encoding="utf-8")
_listed = set(re.findall(r"^   (\w+)$", _api, flags=re.M))
if missing := set(came_optax.__all__) - {"__version__"} - _listed:
    raise ExtensionError(f"api.md lacks {', '.join(sorted(missing))}")
