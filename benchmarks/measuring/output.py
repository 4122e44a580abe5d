"""Where benchmarks write what they measured."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from measuring import ROOT

DEFAULT = ROOT / "benchmarks" / "results"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table of rows that all have the same columns."""
    cells = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join(
        "| "
        + " | ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in cells
    )


def write(
    directory: pathlib.Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    **facts: Any,
) -> None:
    """Prints rows as a table, and writes them as Markdown and, with facts, as JSON."""
    text = table(rows)
    print(text)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    result = json.dumps(facts | {"rows": rows}, indent=2, ensure_ascii=False)
    (directory / f"{name}.json").write_text(result + "\n", encoding="utf-8")
