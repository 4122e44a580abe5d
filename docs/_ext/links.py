"""Links that nobody has to write: from names to their API pages, from tables to logs.

And the check that every link within the site leads somewhere.
"""

import pathlib
import re
import zlib
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.errors import ExtensionError

INCLUDED = re.compile(r"^```\{include\} (\S*results/\S+)\.md\n```$", flags=re.M)
# What tables of several studies are made of, by docs/figures/loss_against_memory.py.
STUDIES = {
    "losses": ("gpt2-nano", "bert-nano", "t5-nano"),
    "sizes": ("gpt2-nano", "gpt2-tiny-comparison", "bert-nano", "bert-tiny-comparison"),
}
API = re.compile(r"(optax|jax|nnx|nn)\.[\w.]+|[A-Za-z]\w+")


def mapping(listing: pathlib.Path, folder: pathlib.Path) -> dict:
    """Returns intersphinx's mapping for a list of projects and their names.

    Args:
      listing: a text file; a line for each project with its address, then a line for
        each name with its page and, if it isn't the name, its anchor.
      folder: where to write Sphinx inventories, which are compressed.
    """
    projects: dict = {}
    for line in listing.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        name, page, *anchor = line.split()
        if page.startswith("https:"):
            names = projects.setdefault(name, (page, []))[1]
            continue
        kind = "class" if name.rpartition(".")[2][0].isupper() else "function"
        names.append(f"{name} py:{kind} 1 {page}#{''.join(anchor) or name} -\n")
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for project, (address, names) in projects.items():
        path = folder / f"{project}.inv"
        head = (
            f"# Sphinx inventory version 2\n# Project: {project}\n# Version: latest\n"
            "# The remainder of this file is compressed using zlib.\n"
        )
        path.write_bytes(head.encode() + zlib.compress("".join(names).encode()))
        found[project] = (address, str(path))
    return found


def link_names(app, doctree):
    """Makes references of literals that name something, once a section for each."""
    seen = set()
    for literal in list(doctree.findall(nodes.literal)):
        name = literal.astext()
        section = literal.parent
        while section and not isinstance(section, nodes.section):
            if isinstance(section, nodes.title | nodes.reference | pending_xref):
                break
            section = section.parent
        else:
            own = app.env.docname.rpartition(".")[2] == name
            if own or not API.fullmatch(name) or (name, id(section)) in seen:
                continue
            seen.add((name, id(section)))
            reference = pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=name,
                refwarn=False,
                refdoc=app.env.docname,
                **{"py:module": "came_optax", "py:class": None},
            )
            literal.replace_self(reference)
            reference += literal


def link_logs(app, docname, source):
    """Adds what a table was made from below each table of docs/results."""
    here = pathlib.Path(app.srcdir, docname).parent

    def linked(match):
        folder, _, name = match[1].rpartition("/")
        at = here / folder
        if (at / f"{name}.json").exists():
            logs = [at / f"{name}.json"]
        elif at.name == "memory":  # Counted by a command on the page.
            logs = []
        elif at.name == "results":
            logs = [at / study / "runs.jsonl" for study in STUDIES[name]]
        else:
            logs = sorted([*at.glob("*.jsonl"), *at.glob("results.json")])
        if not logs:
            return match[0]
        text = ", ".join(
            f"{{download}}`{path.parent.name}/{path.name} "
            f"<{folder}/{path.relative_to(at)}>`"
            for path in logs
        )
        return f"{match[0]}\n\n```{{container}} log\nFrom {text}\n```"

    source[0] = INCLUDED.sub(linked, source[0])


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
    app.connect("source-read", link_logs)
    app.connect("doctree-read", link_names)
    app.connect("build-finished", check_links)
    return {"parallel_read_safe": True}
