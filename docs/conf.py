"""Sphinx configuration; `make docs` builds the site."""

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
]
exclude_patterns = ["_build", "results"]
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "sphinx_book_theme"
html_title = "came-optax"
