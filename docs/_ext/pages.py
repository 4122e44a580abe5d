"""A description for search engines, frames for figures, dashes in empty cells."""

import html
import textwrap

from docutils import nodes


def describe(app, pagename, templatename, context, doctree):
    """Describes a page by its first paragraph of more than a few words."""
    if doctree is None:
        return
    for paragraph in doctree.findall(nodes.paragraph):
        text = textwrap.shorten(paragraph.astext(), 200, placeholder=" …")
        if len(text) > 50 and isinstance(paragraph.parent, nodes.section):
            content = html.escape(text)
            context["metatags"] += f'<meta name="description" content="{content}">'
            return


def frame(app, doctree):
    """Wraps images that stand alone in figures, so that they scroll when narrow."""
    for image in list(doctree.findall(nodes.image)):
        if isinstance(image.parent, nodes.section | nodes.paragraph):
            alone = image.parent if len(image.parent) == 1 else image
            if isinstance(image.parent, nodes.section):
                alone = image
            figure = nodes.figure()
            alone.replace_self(figure)
            figure += image


def fill(app, doctree):
    """Puts a dash into the cells of tables that have nothing in them."""
    for entry in doctree.findall(nodes.entry):
        if not entry.astext():
            entry.children = []
            entry += nodes.paragraph("", "–")


def setup(app):
    app.connect("doctree-read", frame)
    app.connect("doctree-read", fill)
    app.connect("html-page-context", describe)
    return {"parallel_read_safe": True}
