"""The documentation's sources, for the tests of it."""

import json
import pathlib
import re

import came_optax

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("examples/*.md")])


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def source(page):
    """Returns a page's text: the code of a notebook, the docstrings of an API page."""
    path = DOCS / f"{page}.md"
    if not path.exists():
        cells = json.loads(read(DOCS / f"{page}.ipynb"))["cells"]
        return "".join("".join(cell["source"]) + "\n" for cell in cells)
    text = read(path)
    if page == "index":
        text += read("README.md").partition("<!-- The documentation's first page")[0]
    for name in re.findall(r"^.. auto(?:function|class):: (\w+)", text, flags=re.M):
        text += getattr(came_optax, name).__doc__
    for name in re.findall(r"{(?:literal)?include} (\S+)", text):
        if not name.startswith(".."):
            text += read((path.parent / name).resolve())
    return text
