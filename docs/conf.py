"""Sphinx configuration; `make docs` builds the site."""

import pathlib
import re
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup
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
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # MathJax as a part of the site, not of a CDN's.
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "results"]
templates_path = ["_templates"]
myst_enable_extensions = ["dollarmath"]
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

copybutton_exclude = ".linenos, .gp, .go"

_api = (pathlib.Path(__file__).parent / "api.md").read_text(encoding="utf-8")
_listed = set(re.findall(r"^   (\w+)$", _api, flags=re.M))
if missing := set(came_optax.__all__) - {"__version__"} - _listed:
    raise ExtensionError(f"api.md lacks {', '.join(sorted(missing))}")


def check_links(app, exception):
    """Fails on links to pages, files or anchors of this site that aren't there."""
    if exception or app.builder.format != "html":
        return
    pages = {
        path.resolve(): BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        for path in pathlib.Path(app.outdir).rglob("*.html")
        if "_static" not in path.parts  # the theme's templates
    }
    broken = []
    for page, soup in pages.items():
        for tag in soup.select("[href], [src]"):
            link = tag.get("href") or tag.get("src")
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            anchor = unquote(url.fragment)
            if not target.is_file() or (
                anchor and target in pages and not pages[target].find(id=anchor)
            ):
                broken.append(f"{page.name}: {link}")
    if broken:
        raise ExtensionError("broken links: " + ", ".join(broken))


def setup(app):
    app.connect("build-finished", check_links)
