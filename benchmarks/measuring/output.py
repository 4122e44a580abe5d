"""Where benchmarks write what they measured."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from measuring import ROOT
from measuring.examples import format_table

DEFAULT = ROOT / "benchmarks" / "results"


def table(rows: Sequence[Mapping[str, Any]], align: str | None = None) -> str:
    """Returns a Markdown table of rows that all have the same columns.

    Args:
        rows: By the columns' names.
        align: As of `format_table`; by default only the first column is text.
    """
    cells = [list(rows[0]), *(row.values() for row in rows)]
    return format_table(cells, align or "<" + ">" * (len(rows[0]) - 1), markdown=True)


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
