"""Tables in plain text and in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def format_table(rows: Sequence[Iterable[Any]], *, markdown: bool = False) -> str:
    """Returns rows as lines, their cells as wide as the widest of their column.

    Args:
        rows: The cells, the first of a row on the left, the others on the right; in
            Markdown the first row is the head.
        markdown: Whether to draw what makes it a table in Markdown.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if markdown:
        first, *others = widths
        cells.insert(1, ["-" * first, *("-" * (n - 1) + ":" for n in others)])
    lines = [
        [f"{row[0]:<{widths[0]}}"]
        + [f"{cell:>{n}}" for cell, n in zip(row[1:], widths[1:], strict=True)]
        for row in cells
    ]
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def of_columns(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table of rows by the columns' names; what lacks is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([row.get(name, "") for name in names] for row in rows)]
    return format_table(cells, markdown=True)
