"""Tables in plain text and in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any


def format_table(
    rows: Sequence[Iterable[Any]], align: str, *, markdown: bool = False
) -> str:
    """Returns rows as lines, their cells as wide as the widest of their column.

    Args:
        rows: The cells; in Markdown the first row is the head.
        align: For each column "<" for left or ">" for right.
        markdown: Whether to draw what makes it a table in Markdown.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if markdown:
        rule = ["-" * width for width in widths]
        cells.insert(
            1,
            [r[:-1] + ":" if a == ">" else r for r, a in zip(rule, align, strict=True)],
        )
    lines = [
        [f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)]
        for row in cells
    ]
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in lines)
